"""When sequences are compacted, and the compaction itself: between the steps of whoever drives a memory."""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

from kvlab.engine.listener import Slots, heard
from kvlab.engine.step import MemoryStep, Pools
from kvlab.ledger.answers import Wait
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import Compaction
from kvlab.memory.compacting import Kept


class Compacted(NamedTuple):
    """A compaction that was dispatched: who was compacted, as the host planned it, and which slots stayed, still on the
    device. A row of the plan is a sequence."""

    sequences: tuple[Hashable, ...]
    plan: Compaction
    kept: Kept


class Compactor:
    """Compacts the sequences of a ledger where the retentions of its classes say."""

    def __init__(self, step: MemoryStep):
        self.step = step
        self.retained = [(state.name, state.retention) for state in step.layout.classes if state.retention is not None]

    def __bool__(self) -> bool:
        return bool(self.retained)

    def clip(self, ledger: Ledger, sequence: Hashable, prompt_len: int, num_new: int, *, has_begun: bool) -> int:
        """`num_new` tokens of a sequence, shortened so that its next step ends where it is to be compacted."""
        stored = ledger.stored(sequence) if has_begun else {}
        length = ledger.length(sequence) if has_begun else 0
        for name, retention in self.retained:
            num_new = retention.clip(prompt_len, length, stored.get(name, length), num_new)
        return num_new

    def due(self, ledger: Ledger, prompt_lens: Mapping[Hashable, int]) -> dict[Hashable, dict[str | int, int]]:
        """Sequences to compact before their next step, with the slots that each class keeps; `prompt_lens` are tokens
        of each one's prompt."""
        found = dict[Hashable, dict[str | int, int]]()
        for sequence, prompt_len in prompt_lens.items():
            length, stored = ledger.length(sequence), ledger.stored(sequence)
            for name, retention in self.retained:
                keep = retention.due(prompt_len, length, stored[name])
                if keep is not None:
                    found.setdefault(sequence, {})[name] = keep
        return found

    def run(
        self,
        ledger: Ledger,
        pools: Pools,
        due: Mapping[Hashable, Mapping[str | int, int]],
        seeds: Mapping[Hashable, int],
        slots: Mapping[Hashable, Slots] | None = None,
    ) -> tuple[Pools, Compacted] | Wait:
        """Shortens these sequences; their freed pages are the ledger's at once. `slots` are where a second pass left
        the statistics of some (`Listener.listen`), with nothing reserved since. `Wait`, and nothing changed, where
        pages are short."""
        plan = ledger.compact(due, seeds)
        if isinstance(plan, Wait):
            return plan
        plan = heard(plan, tuple(due), slots or {})
        pools, kept = self.step.compact(pools, plan)
        return pools, Compacted(tuple(due), plan, kept)
