"""Sealed pages: no step writes them, and a sequence has as many slots of them as its pages have."""

from collections.abc import Sequence

import numpy as np

from kvlab.ledger.paged import PageStore
from kvlab.ledger.plan import Ints
from kvlab.ledger.store import NEVER_WAKES, Holding


class SealedStore(PageStore):
    """Pages that are filled by sealing alone (`kvlab.ledger.sealing`)."""

    def missing(self, holding: Holding, start: int, end: int, lookahead: int) -> list[int]:
        return []

    def settle(self, holding: Holding, length: int, num_accepted: int, *, ran: bool) -> None:
        pass

    def room(self, holding: Holding, length: int) -> int:
        return NEVER_WAKES

    def num_stored(self, holding: Holding, length: int) -> int:
        return len(holding.pages) * self.state.page_size

    def _own_starts(self, steps: Sequence[Holding], starts: Ints) -> Ints:
        own = np.zeros_like(starts)
        own[: len(steps)] = [self.num_stored(holding, 0) for holding in steps]
        return own

    def _write_slots(self, pages: Ints, steps: Sequence[Holding], starts: Ints, counts: Ints, width: int) -> Ints:
        return np.full((len(pages), width), self.state.num_pages * self.state.page_size, np.int32)
