"""What systems did before paging: one contiguous block of slots a sequence, its size fixed when it begins (arXiv
2309.06180, section 3.1). The same ledger runs it, so the same account shows what it wastes."""

from collections.abc import Sequence

import numpy as np

from kvlab.ledger.answers import Never, Wait
from kvlab.ledger.classes import RESERVATIONS, Lengths, StateClass
from kvlab.ledger.plan import Ints
from kvlab.ledger.prefix import PrefixIndex
from kvlab.ledger.store import Holding, Store
from kvlab.units import counted


class Buddy:
    """A buddy allocator over [0, num_pages): blocks of powers of two that split, and merge with their neighbour.

    A pool whose size is no power of two starts as the aligned blocks of its binary digits.
    """

    def __init__(self, num_pages: int):
        self._largest = 1 << (num_pages.bit_length() - 1)
        self._free: dict[int, set[int]] = {}
        start = 0
        for order in range(num_pages.bit_length() - 1, -1, -1):
            if num_pages >> order & 1:
                self._free.setdefault(order, set()).add(start)
                start += 1 << order

    @property
    def num_free(self) -> int:
        """Pages in no block."""
        return sum(len(starts) << order for order, starts in self._free.items())

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The free blocks, as (first page, pages in it)."""
        return sorted((start, 1 << order) for order, starts in self._free.items() for start in starts)

    def fits(self, num_pages: int) -> bool:
        """Whether a block of that size can be had."""
        order = (num_pages - 1).bit_length()
        return any(starts for size, starts in self._free.items() if size >= order)

    def fits_empty(self, num_pages: int) -> bool:
        """Whether a block of that size could be had if nothing were taken."""
        return num_pages <= self._largest

    def take(self, num_pages: int) -> tuple[int, int]:
        """The smallest, then lowest fitting block, as (first page, pages in it). Raises MemoryError when there is
        none."""
        order = (num_pages - 1).bit_length()
        have = min((size for size, starts in self._free.items() if size >= order and starts), default=None)
        if have is None:
            raise MemoryError(f"no block of {1 << order} pages")
        start = min(self._free[have])
        self._free[have].remove(start)
        while have > order:
            have -= 1
            self._free.setdefault(have, set()).add(start + (1 << have))
        return start, 1 << order

    def give(self, start: int, size: int) -> None:
        """Returns a block, which merges with its free neighbours."""
        order = size.bit_length() - 1
        while (neighbour := start ^ (1 << order)) in self._free.get(order, ()):
            self._free[order].remove(neighbour)
            start, order = min(start, neighbour), order + 1
        self._free.setdefault(order, set()).add(start)


class BlockStore(Store):
    """One block a sequence, as large as the class's reservation says. Nothing is shared, forgotten or evicted."""

    def __init__(self, number: int, state: StateClass, index: PrefixIndex, max_len: int):
        super().__init__(number, state, index)
        self.max_len, self.buddy, self.free = max_len, Buddy(state.num_pages), []

    @property
    def num_available(self) -> int:
        return self.buddy.num_free

    def _asked(self, holding: Holding) -> int:
        """Slots that a sequence reserves; what is not known is the maximum."""
        assert self.state.reservation is not None
        return RESERVATIONS[self.state.reservation](holding.lengths or Lengths(0, self.max_len), self.max_len)

    def missing(self, holding: Holding, start: int, end: int, lookahead: int) -> list[int]:
        return []

    def refusal(self, holding: Holding, missing: Sequence[int], end: int) -> Wait | Never | None:
        asked = holding.block[1] or self._asked(holding)
        if end > asked:
            return Never(f"{self.state.name}: tokens [0, {end}) exceed the {counted(asked, 'slot')} reserved")
        num_pages = -(-asked // self.state.page_size)
        if not self.buddy.fits_empty(num_pages):
            pages = counted(num_pages, "page")
            return Never(f"{self.state.name}: no block of {pages} in a pool of {self.state.num_pages}")
        if holding.pages or self.buddy.fits(num_pages):
            return None
        needed = counted(num_pages, "adjacent page")
        return Wait(f"{self.state.name}: {needed} needed, {self.buddy.num_free} free, not in one block")

    def give(self, holding: Holding, missing: Sequence[int], taken: Sequence[int]) -> None:
        if not holding.pages:
            asked = self._asked(holding)
            first, num_pages = self.buddy.take(-(-asked // self.state.page_size))
            holding.block = (num_pages * self.state.page_size, asked)
            self.assign(holding, 0, first)
            for page in range(first, first + num_pages):
                self.refs[page] = 1

    def settle(self, holding: Holding, length: int, num_accepted: int, *, ran: bool) -> None:
        pass

    def let_go(self, holding: Holding) -> None:
        first, num_pages = holding.pages.pop(0), holding.block[0] // self.state.page_size
        self.buddy.give(first, num_pages)
        for page in range(first, first + num_pages):
            self.refs[page] = 0
        super().let_go(holding)

    def room(self, holding: Holding, length: int) -> int:
        return holding.block[1]

    def _write_slots(self, pages: Ints, steps: Sequence[Holding], starts: Ints, counts: Ints, width: int) -> Ints:
        offsets = np.arange(width, dtype=np.int32)
        slots = pages[:, :1] * self.state.page_size + starts[:, None] + offsets
        slots[offsets >= counts[:, None]] = self.state.num_pages * self.state.page_size
        return slots
