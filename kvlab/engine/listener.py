"""The second pass: what a prompt's sequence would attend to if it read on, noted on a fork that is thrown away."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kvlab.compression import SecondPass
from kvlab.engine.step import MemoryStep, Pools
from kvlab.ledger.answers import Ready, Wait
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import Compaction, Plan
from kvlab.typing import Params

type Slots = Mapping[int, int]
"""Where a sequence's statistics lie: by class, a slot."""


class Fork(NamedTuple):
    """The name of a fork that reads on."""

    of: Hashable


class Listener:
    """Reads on behind the prompts of a memory whose compression asks for it, a sequence at a time."""

    def __init__(self, step: MemoryStep):
        methods = [joined.method for layer in step.layout.joined for joined in layer.values()]
        self.step = step
        self.method = next((method for method in methods if isinstance(method, SecondPass)), None)
        self.statistics = [number for number, state in enumerate(step.layout.classes) if state.is_statistics]

    def __bool__(self) -> bool:
        return self.method is not None

    def listen(
        self,
        params: Params,
        ledger: Ledger,
        pools: Pools,
        sequence: Hashable,
        prompt: Sequence[int],
        future: Sequence[int] | None = None,
    ) -> tuple[Pools, Slots | Wait]:
        """Reads on behind the `prompt` that a sequence stores; `future` is what will follow it, where that is known.

        Returns the pools, and where the statistics of the pass lie: free slots, which whatever is reserved next may
        take, so that the sequence is to be compacted at once (`Compactor.run`). `Wait` where pages are short; nothing
        of the sequence has changed then, and the next call begins anew.
        """
        assert self.method is not None
        slots: dict[int, int] = {}
        for piece in self.method.pieces(prompt, future):
            pools, answer = self._read(params, ledger, pools, sequence, piece, slots)
            if isinstance(answer, Wait):
                return pools, answer
            slots = answer
        return pools, slots

    def _read(
        self, params: Params, ledger: Ledger, pools: Pools, sequence: Hashable, piece: Sequence[int], before: Slots
    ) -> tuple[Pools, dict[int, int] | Wait]:
        """Reads a piece on a fork whose statistics continue those in the slots `before`."""
        fork, width = Fork(sequence), self.step.layout.chunk_len
        ledger.fork(sequence, fork)
        for start in range(0, len(piece), width):
            chunk = piece[start : start + width]
            answer = ledger.reserve(fork, len(chunk))
            if not isinstance(answer, Ready):
                ledger.release(fork)
                return pools, Wait(f"second pass: {answer.reason}")
            plan = ledger.plan([fork], 1, width)
            if not start:
                plan = _continuing(plan, before)
            plan, pools = self.step.copied(pools, plan)
            tokens = np.zeros((1, width), np.int32)
            tokens[0, : len(chunk)] = chunk
            pools = self.step.listen(params, pools, plan, jnp.asarray(tokens))
            ledger.commit(fork, len(chunk))
        slots = {number: ledger.pages(fork, number)[0] for number in self.statistics}
        ledger.release(fork)
        return pools, slots


def heard(plan: Compaction, sequences: Sequence[Hashable], slots: Mapping[Hashable, Slots]) -> Compaction:
    """A compaction of these sequences, which reads the statistics of some from where a pass left them."""
    classes = list(plan.classes)
    for row, sequence in enumerate(sequences):
        for number, slot in slots.get(sequence, {}).items():
            pages = classes[number].pages.copy()
            pages[row] = slot
            classes[number] = classes[number]._replace(pages=pages)
    return plan._replace(classes=tuple(classes))


def _continuing(plan: Plan, slots: Slots) -> Plan:
    """The plan of one sequence's step, its statistics read from these slots."""
    classes = list(plan.classes)
    for number, slot in slots.items():
        classes[number] = classes[number]._replace(pages=np.full_like(classes[number].pages, slot))
    return plan._replace(classes=tuple(classes))
