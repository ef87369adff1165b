"""Token states in pages of `page_size` tokens: on demand, copied before a shared one is written, freed when
forgotten."""

from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np

from kvlab.ledger.classes import StateClass
from kvlab.ledger.plan import Ints
from kvlab.ledger.prefix import PrefixIndex
from kvlab.ledger.states import page_forgotten_at
from kvlab.ledger.store import NEVER_WAKES, Holding, Store
from pallas_kernels.visible import NOWHERE


class PageStore(Store):
    """Token states in pages of `page_size` tokens."""

    def __init__(self, number: int, state: StateClass, index: PrefixIndex):
        super().__init__(number, state, index)
        self.forgets = state.spec.span is not None

    def missing(self, holding: Holding, start: int, end: int, lookahead: int) -> list[int]:
        first, last = start - holding.dropped, end - holding.dropped - 1
        needed = range(first // self.state.page_size, last // self.state.page_size + 1)
        return [page for page in needed if page not in holding.pages or self.refs[holding.pages[page]] > 1]

    def give(self, holding: Holding, missing: Sequence[int], taken: Sequence[int]) -> None:
        for logical, page in zip(missing, taken, strict=True):
            if logical in holding.pages:
                holding.copies.append((logical, holding.pages[logical]))
                self.copied += 1
            self.assign(holding, logical, page)

    def settle(self, holding: Holding, length: int, num_accepted: int, *, ran: bool) -> None:
        for logical, source in holding.copies:
            if ran:
                self.drop(source)
            else:
                self.drop(holding.pages[logical])
                self.assign(holding, logical, source)
        holding.copies.clear()
        num_stored = length - holding.dropped
        behind = takewhile(lambda page: page * self.state.page_size >= num_stored, reversed(holding.pages))
        self._give_up(holding, list(behind))

    def forget(self, holding: Holding, length: int) -> None:
        if self.forgets:
            ends = {page: page_forgotten_at(self.state.spec, page, self.state.page_size) for page in holding.pages}
            self._give_up(holding, [page for page, end in ends.items() if end is not None and end <= length])

    def _give_up(self, holding: Holding, logical_pages: Iterable[int]) -> None:
        for logical in logical_pages:
            place = self.state.table_index(logical)
            self.table[holding.row, place], self.starts[holding.row, place] = self.state.unused_page, NOWHERE
            self.drop(holding.pages.pop(logical))

    def room(self, holding: Holding, length: int) -> int:
        if not holding.pages:
            return 0
        last = next(reversed(holding.pages))
        end = holding.dropped + (last + 1) * self.state.page_size
        return 0 if length < end and self.refs[holding.pages[last]] > 1 else end

    def is_shared(self, holding: Holding, num_stored: int) -> bool:
        """Whether somebody else, or the index, holds a page of the first `num_stored` slots."""
        num_pages = -(-num_stored // self.state.page_size)
        return any(self.refs[page] > 1 for logical, page in holding.pages.items() if logical < num_pages)

    def shorten(self, holding: Holding, length: int, num_stored: int) -> None:
        """Of `length` tokens, only the first `num_stored` slots are stored from now on; their pages stay."""
        self.is_exact = False
        holding.dropped = length - num_stored

    def repack(self, holding: Holding, destinations: Sequence[int]) -> None:
        """A sequence holds these pages, from the first on, in place of those it had: some of its own among them, the
        others with a reference that the caller gives."""
        kept = set(destinations)
        for logical, page in reversed(list(holding.pages.items())):
            if page in kept:
                self.share(page)
            self._give_up(holding, [logical])
        for logical, page in enumerate(destinations):
            self.assign(holding, logical, page)

    def wake(self, holding: Holding) -> int:
        if not self.forgets:
            return NEVER_WAKES
        ends = (page_forgotten_at(self.state.spec, page, self.state.page_size) for page in holding.pages)
        return next((end for end in ends if end is not None), NEVER_WAKES)

    def _write_slots(self, pages: Ints, steps: Sequence[Holding], starts: Ints, counts: Ints, width: int) -> Ints:
        offsets = np.arange(width, dtype=np.int32)
        positions = starts[:, None] + offsets
        columns, places = np.divmod(positions, self.state.page_size)
        num_pinned, table_len = self.state.num_pinned_pages, self.state.table_len
        if columns.max(initial=0) >= table_len:
            ring = num_pinned + (columns - num_pinned) % max(1, table_len - num_pinned)
            columns = np.where(columns < table_len, columns, ring)
        slots = pages[np.arange(len(pages))[:, None], columns] * self.state.page_size + places
        slots[offsets >= counts[:, None]] = self.state.num_pages * self.state.page_size
        return slots
