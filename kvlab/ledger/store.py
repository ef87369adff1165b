"""The pages of one state class: references, free list, page tables. The rules of each kind of state have a file of
their own.

PageStore    (`paged`)       pages on demand, copied before a shared one is written, freed when forgotten
StateStore   (`recurrent`)   one slot a sequence; what others hold is read from one slot and written to another
BlockStore   (`contiguous`)  one block a sequence, its size fixed when it begins
SealedStore  (`sealed`)      pages that come full from another class, and are never written
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvlab.ledger.answers import Never, Wait
from kvlab.ledger.classes import Lengths, StateClass
from kvlab.ledger.plan import ClassPlan, Ints
from kvlab.ledger.prefix import PrefixIndex
from kvlab.ledger.trie import CachedPage, Node
from kvlab.units import counted
from pallas_kernels.visible import NOWHERE

NEVER_WAKES = 2**62
"""A length that no sequence reaches."""


@dataclass(eq=False, slots=True)
class Holding:
    """What one sequence holds of one class. Everything here is a reference, except `block`."""

    pages: dict[int, int] = field(default_factory=dict)
    """Logical page (slots [i * page_size, (i + 1) * page_size)) to physical page, ascending; of a recurrent state {0:
    slot}, of a contiguous block {0: its first page}."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(logical page, source) of pages copied for the step in flight; the source is held until it ends."""
    writing: int | None = None
    """Where the step in flight writes a recurrent state that it does not write in place."""
    row: int = -1
    """The sequence's row of the page table; -1 while it has none."""
    lengths: Lengths | None = None
    """What was known of the sequence when it began."""
    block: tuple[int, int] = (0, 0)
    """Of a contiguous block: its slots, and the slots asked for."""
    dropped: int = 0
    """Slots that compactions took: of a sequence of `length` tokens, length - dropped are stored, in slots from 0
    on."""


class Store(abc.ABC):
    """Pages of one class. A page is free (no references) or held: references are tables, pins and the index,
    exactly."""

    def __init__(self, number: int, state: StateClass, index: PrefixIndex):
        self.number, self.state, self.index = number, state, index
        self.refs = [0] * state.num_pages
        self.free = list(range(state.num_pages - 1, state.has_null_page - 1, -1))
        self.host_free = list(range(state.num_host_pages - 1, -1, -1))
        self.table = np.zeros((0, state.table_len), np.int32)
        self.starts = np.zeros((0, state.table_len), np.int32)
        self.evicted = self.copied = 0
        self.has_dense_prompts = state.spec.reading is not None and state.spec.reading.dense_prompts
        self.is_exact = True
        """Whether every sequence that was ever here stores all its tokens."""

    @property
    def num_available(self) -> int:
        """Pages that are free or only cached."""
        return len(self.free) + self.index.num_loose[self.number]

    def take(self) -> int:
        """A page with one reference: a free one, or the policy's victim. Raises MemoryError when there is none."""
        if not self.free:
            self.evict()
        page = self.free.pop()
        self.refs[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more reference."""
        self.refs[page] += 1
        if self.refs[page] == 2 and (cached := self.index.cached[self.number].get(page)):
            self.index.pin(cached)

    def drop(self, page: int) -> None:
        """One reference less; the last one frees the page."""
        assert self.refs[page] > 0, f"{self.state.name}: page {page} is free already"
        self.refs[page] -= 1
        if self.refs[page] == 0:
            self.free.append(page)
        elif self.refs[page] == 1 and (cached := self.index.cached[self.number].get(page)):
            self.index.loosen(cached)

    def publish(self, node: Node, page: int) -> None:
        """The index holds a page as well."""
        self.refs[page] += 1
        self.index.publish(node, self.number, page)

    def withdraw(self, cached: CachedPage) -> None:
        """The index lets go of a page."""
        self.index.withdraw(cached)
        self.drop(cached.page)

    def evict(self) -> None:
        """Frees the cached page that the policy would miss least. Raises MemoryError when every page is pinned."""
        for cached in self.index.in_the_way(self.number):
            self.withdraw(cached)
        victim = self.index.victim(self.number)
        self.withdraw(victim)
        self.index.policies[self.number].evicted(victim)
        self.evicted += 1

    def add_rows(self, count: int) -> None:
        """Room for more sequences."""
        unused = np.full((count, self.state.table_len), self.state.unused_page, np.int32)
        self.table = np.concatenate([self.table, unused])
        self.starts = np.concatenate([self.starts, np.full_like(unused, NOWHERE)])

    def assign(self, holding: Holding, logical: int, page: int) -> None:
        """A sequence reads a page from now on; the reference is the caller's."""
        holding.pages[logical] = page
        place = self.state.table_index(logical)
        self.table[holding.row, place], self.starts[holding.row, place] = page, logical * self.state.page_size

    def let_go(self, holding: Holding) -> None:
        """A sequence leaves the device: every reference, latest pages first, and its row."""
        for _, source in holding.copies:
            self.drop(source)
        if holding.writing is not None:
            self.drop(holding.writing)
        for logical in reversed(holding.pages):
            self.drop(holding.pages[logical])
        self.table[holding.row], self.starts[holding.row] = self.state.unused_page, NOWHERE

    def plan(self, steps: Sequence[Holding], starts: Ints, counts: Ints, width: int) -> ClassPlan:
        """One step's arrays for these sequences; starts and counts [B], of which the rest is padding."""
        rows = np.array([holding.row for holding in steps], np.intp)
        starts = self._own_starts(steps, starts)
        pages, page_starts = self.table[rows], self.starts[rows]
        if padding := len(starts) - len(rows):
            pages = np.pad(pages, ((0, padding), (0, 0)), constant_values=self.state.unused_page)
            page_starts = np.pad(page_starts, ((0, padding), (0, 0)), constant_values=NOWHERE)
        slots = self._write_slots(pages, steps, starts, counts, width)
        copied = [(source, holding.pages[logical]) for holding in steps for logical, source in holding.copies]
        copies = np.array(copied, np.int32).reshape(-1, 2)
        return ClassPlan(pages, page_starts, slots, copies, starts, prompts=self._prompts(steps, len(starts)))

    def _prompts(self, steps: Sequence[Holding], num_rows: int) -> Ints | None:
        """`ClassPlan.prompts`."""
        if not self.has_dense_prompts:
            return None
        prompts = np.zeros(num_rows, np.int32)
        prompts[: len(steps)] = [holding.lengths.prompt_len if holding.lengths else 0 for holding in steps]
        return prompts

    def num_stored(self, holding: Holding, length: int) -> int:
        """Slots that a sequence of `length` tokens stores here."""
        return length - holding.dropped

    def _own_starts(self, steps: Sequence[Holding], starts: Ints) -> Ints:
        """The class's own starts: tokens, less what compactions took."""
        if self.is_exact:
            return starts
        starts = starts.copy()
        starts[: len(steps)] -= np.array([holding.dropped for holding in steps], np.int32)
        return starts

    @abc.abstractmethod
    def missing(self, holding: Holding, start: int, end: int, lookahead: int) -> list[int]:
        """Logical pages that a step of the tokens [start, end) must be given: new ones, and those it may not write in
        place."""

    def refusal(self, holding: Holding, missing: Sequence[int], end: int) -> Wait | Never | None:
        """Why the missing pages cannot be had; None: they can. What could never fit alone, `Ledger.never` has
        refused."""
        return self.shortage(len(missing))

    def shortage(self, num_pages: int) -> Wait | None:
        """`Wait` when that many pages cannot be had now."""
        if num_pages <= self.num_available:
            return None
        return Wait(f"{self.state.name}: {counted(num_pages, 'page')} needed, {self.num_available} free or cached")

    @abc.abstractmethod
    def give(self, holding: Holding, missing: Sequence[int], taken: Sequence[int]) -> None:
        """Gives a sequence the pages taken for those missing."""

    @abc.abstractmethod
    def settle(self, holding: Holding, length: int, num_accepted: int, *, ran: bool) -> None:
        """Ends a step after which the sequence has `length` tokens; undoes what a step that never ran was to copy."""

    def forget(self, holding: Holding, length: int) -> None:  # noqa: B027  most states forget nothing
        """Lets go of pages outside live(length)."""

    @abc.abstractmethod
    def room(self, holding: Holding, length: int) -> int:
        """A step that ends at this length needs no page and no copy."""

    def wake(self, holding: Holding) -> int:
        """The first length at which a page is forgotten."""
        return NEVER_WAKES

    @abc.abstractmethod
    def _write_slots(self, pages: Ints, steps: Sequence[Holding], starts: Ints, counts: Ints, width: int) -> Ints:
        """`ClassPlan.write_slots`; `starts` are the class's own."""
