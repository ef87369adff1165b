"""The second pass, planned: what a prompt's sequence would attend to if it read on is noted on a fork, which is thrown
away. Host only; `MemoryStep.read_on` runs it."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvlab.compression import Oracle, SecondPass
from kvlab.engine.entries import Planned, Slots
from kvlab.ledger.answers import Ready, Wait
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import Compaction, Plan
from kvlab.memory.layout import MemoryLayout


class Fork(NamedTuple):
    """The name of a fork that reads on."""

    of: Hashable


class Listener:
    """Plans to read on behind the prompts of a memory whose compression asks for it, a sequence at a time."""

    def __init__(self, layout: MemoryLayout):
        methods = [joined.method for layer in layout.joined for joined in layer.values()]
        self.method = next((method for method in methods if isinstance(method, SecondPass)), None)
        self.chunk_len = layout.chunk_len
        self.statistics = [number for number, state in enumerate(layout.classes) if state.is_statistics]

    def __bool__(self) -> bool:
        return self.method is not None

    @property
    def knows_future(self) -> bool:
        """Whether the pass reads what will follow, as only an evaluation can."""
        return isinstance(self.method, Oracle)

    @property
    def name(self) -> str:
        """The method's."""
        return self.method.name if self.method else ""

    def plan(
        self, ledger: Ledger, sequence: Hashable, prompt: Sequence[int], future: Sequence[int] | None = None
    ) -> Planned | Wait:
        """Reads on behind the `prompt` that a sequence stores; `future` is what will follow it, where that is known.
        `Wait` where pages are short: then nothing has changed. Raises ValueError where the future must be known."""
        assert self.method is not None
        steps, slots = list[tuple[Plan, npt.NDArray[np.int32]]](), dict[int, int]()
        for piece in self.method.pieces(prompt, future):
            fork = Fork(sequence)
            ledger.fork(sequence, fork)
            for start in range(0, len(piece), self.chunk_len):
                chunk = piece[start : start + self.chunk_len]
                answer = ledger.reserve(fork, len(chunk))
                if not isinstance(answer, Ready):
                    ledger.release(fork)
                    return Wait(f"second pass: {answer.reason}")
                plan = ledger.plan([fork], 1, self.chunk_len)
                tokens = np.zeros((1, self.chunk_len), np.int32)
                tokens[0, : len(chunk)] = chunk
                steps.append((plan if start else heard(plan, slots), tokens))
                ledger.commit(fork, len(chunk))
            slots = {number: ledger.pages(fork, number)[0] for number in self.statistics}
            ledger.release(fork)
        return Planned(tuple(steps), slots)


def heard[P: (Plan, Compaction)](plan: P, slots: Slots) -> P:
    """A compaction of one sequence, or the step of one, that reads its statistics from where a second pass left
    them."""
    classes = list(plan.classes)
    for number, slot in slots.items():
        classes[number] = classes[number]._replace(pages=np.full_like(classes[number].pages, slot))
    return plan._replace(classes=tuple(classes))
