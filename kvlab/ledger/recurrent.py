"""Recurrent states: one slot a sequence, or none of what is let go for good. What others hold is read from one slot and
written to another."""

from collections.abc import Sequence

from kvlab.ledger.answers import Never, Wait
from kvlab.ledger.plan import Ints
from kvlab.ledger.store import NEVER_WAKES, Holding, Store
from pallas_kernels.visible import NOWHERE


class StateStore(Store):
    """Recurrent states: one slot a sequence."""

    def missing(self, holding: Holding, start: int, end: int, lookahead: int) -> list[int]:
        if not holding.pages:
            return [] if start and self.state.until_compacted else [0]  # what was let go for good is not missed
        if self.refs[holding.pages[0]] == 1 and not lookahead:
            return []
        # A checkpoint that only the index shares is given up when slots are short, so that a sequence can always go on.
        return [] if self._sole(holding) and not lookahead and not self.num_available else [0]

    def refusal(self, holding: Holding, missing: Sequence[int], end: int) -> Wait | Never | None:
        if missing and holding.pages and self._sole(holding) and self.state.num_usable < 2:
            return Never(f"{self.state.name}: a step that may be rejected needs 2 slots, the pool has 1")
        return self.shortage(len(missing))

    def _sole(self, holding: Holding) -> bool:
        """Whether no other sequence or hit shares the state."""
        slot = holding.pages[0]
        return self.refs[slot] == 1 + (slot in self.index.cached[self.number])

    def give(self, holding: Holding, missing: Sequence[int], taken: Sequence[int]) -> None:
        if missing and holding.pages:
            (holding.writing,) = taken
        elif missing:
            self.assign(holding, 0, taken[0])
        elif holding.pages and (cached := self.index.cached[self.number].get(holding.pages[0])):
            self.withdraw(cached)

    def settle(self, holding: Holding, length: int, num_accepted: int, *, ran: bool) -> None:
        if holding.writing is not None:
            old, new = holding.pages[0], holding.writing
            self.drop(old if num_accepted else new)
            self.assign(holding, 0, new if num_accepted else old)
            holding.writing = None

    def room(self, holding: Holding, length: int) -> int:
        return NEVER_WAKES if not holding.pages or self.refs[holding.pages[0]] == 1 else 0

    def end(self, holding: Holding) -> None:
        """A sequence lets go of its state for good, and goes on without."""
        self.drop(holding.pages.pop(0))
        self.table[holding.row], self.starts[holding.row] = self.state.unused_page, NOWHERE

    def _write_slots(self, pages: Ints, steps: Sequence[Holding], starts: Ints, counts: Ints, width: int) -> Ints:
        slots = pages.copy()
        for row, holding in enumerate(steps):
            if holding.writing is not None:
                slots[row, 0] = holding.writing
        return slots
