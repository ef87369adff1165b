"""The stores of all state classes, as one: whatever a sequence takes, it takes of every class or of none."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvlab.ledger.accounting import Account, Held, account
from kvlab.ledger.answers import Never
from kvlab.ledger.classes import StateClass
from kvlab.ledger.contiguous import BlockStore
from kvlab.ledger.due import next_due
from kvlab.ledger.paged import PageStore
from kvlab.ledger.prefix import PrefixIndex
from kvlab.ledger.recurrent import StateStore
from kvlab.ledger.sealed import SealedStore
from kvlab.ledger.store import NEVER_WAKES, Store
from kvlab.ledger.tracked import Tracked
from kvlab.units import counted


@dataclass
class Counters:
    """What happened so far. Tokens looked up and hit are those of every sequence that began with a hit, a second time
    too: what a preempted one finds again of its own is told apart by the scheduler. `peak_bytes` is the most that
    sequences and hits held at once, `peak_pages` the same for each class on its own: their difference is what pools of
    fixed types cost beside one pool for all."""

    looked_up_tokens: int = 0
    hit_tokens: int = 0
    deduplicated_pages: int = 0
    swapped_pages: int = 0
    dropped_slots: int = 0
    peak_bytes: int = 0
    peak_pages: list[int] = field(default_factory=list)


class Stores:
    """One store a class, the index that all of them publish to, and the rows of their page tables."""

    def __init__(self, classes: Sequence[StateClass], index: PrefixIndex, max_len: int, chunk_len: int):
        self.classes, self.index = tuple(classes), index
        self.max_len, self.chunk_len = max_len, chunk_len
        self.each: tuple[Store, ...] = tuple(
            BlockStore(number, state, index, max_len)
            if state.contiguous
            else (SealedStore if state.is_sealed else PageStore if state.paged else StateStore)(number, state, index)
            for number, state in enumerate(self.classes)
        )
        self.of_states = [store for store in self.each if not store.state.spec.per_token]
        """Those of recurrent classes."""
        self.has_dense_prompts = any(store.has_dense_prompts for store in self.each)
        """Whether the queries of prompts read in another way than those of answers."""
        shortens = any(state.retention or state.sealing for state in self.classes)
        self.compresses = shortens or self.has_dense_prompts
        """Whether it matters where a sequence's prompt ends: it is compacted, its pages are sealed, or what follows is
        read in another way."""
        self.can_share = not any(state.contiguous for state in self.classes)
        """Whether sequences can share pages and leave the device: contiguous blocks can do neither."""
        self.free_rows: list[int] = []
        self.counters = Counters(peak_pages=[0] * len(self.classes))

    def __iter__(self) -> Iterator[Store]:
        return iter(self.each)

    def __len__(self) -> int:
        return len(self.each)

    def __getitem__(self, number: int) -> Store:
        return self.each[number]

    def never(self, total_len: int, held: Tracked | None = None, prompt_len: int | None = None) -> Never | None:
        """Why a sequence of `total_len` tokens could not run alone in an empty pool, less what compaction took of it,
        or, of one that begins with a prompt of `prompt_len`, will have taken; None: it could."""
        if total_len > self.max_len:
            return Never(f"{counted(total_len, 'token')} exceed max_len = {self.max_len}")
        for number, state in enumerate(self.classes):
            num_stored = total_len - (held.holdings[number].dropped if held else 0)
            if prompt_len is None:
                needed = state.stored_pages(num_stored, self.chunk_len)
            else:
                needed = state.max_pages(num_stored, self.chunk_len, prompt_len)
            shortened = state.retention or state.sealing
            room = min(state.num_usable, state.table_len) if shortened else state.num_usable
            if needed > room:
                sizes = f"{counted(state.page_size, 'token')} a page, steps of up to {self.chunk_len}"
                pages = f"{counted(num_stored, 'token')} need {counted(needed, 'page')}"
                return Never(f"{state.name}: {pages} ({sizes}), the pool has {room}")
        return None

    def take(self, counts: Sequence[int]) -> list[list[int]]:
        """New pages of every class, or none at all: what was taken before a failure goes back."""
        taken: list[list[int]] = [[] for _ in self.each]
        try:
            for store, pages, count in zip(self.each, taken, counts, strict=True):
                for _ in range(count):
                    pages.append(store.take())
        except BaseException:
            for store, pages in zip(self.each, taken, strict=True):
                for page in pages:
                    store.drop(page)
            raise
        return taken

    def evict(self, name: str, num_pages: int) -> int:
        """See `Ledger.evict`."""
        store = next((store for store in self.each if store.state.name == name), None)
        if store is None or num_pages < 0:
            legal = ", ".join(state.name for state in self.classes)
            raise ValueError(f"evict({name!r}, {num_pages}): must be at least 0 pages of one of {legal}")
        count = min(num_pages, self.index.num_loose[store.number])
        for _ in range(count):
            store.evict()
        return count

    def new_row(self) -> int:
        """A row of every page table."""
        if not self.free_rows:
            num_rows = len(self.each[0].table)
            more = max(8, num_rows)
            for store in self.each:
                store.add_rows(more)
            self.free_rows = list(range(num_rows + more - 1, num_rows - 1, -1))
        return self.free_rows.pop()

    def let_go(self, held: Tracked) -> None:
        """A sequence leaves the device: its pages and its row."""
        for store, holding in zip(self.each, held.holdings, strict=True):
            store.let_go(holding)
        self.free_rows.append(held.holdings[0].row)

    def refresh(self, held: Tracked) -> None:
        """Until when the next steps need nothing: see `Tracked.room`, `wake` and `full`."""
        room, wake, busy = self.max_len, NEVER_WAKES, held.lookahead > 0
        for store, holding in zip(self.each, held.holdings, strict=True):
            room, wake = min(room, store.room(holding, held.length)), min(wake, store.wake(holding))
            busy = busy or bool(holding.copies) or holding.writing is not None
        page_size = self.index.page_size
        held.full = NEVER_WAKES if held.ids is None else (held.length // page_size + 1) * page_size
        if self.of_states:  # the next step overwrites what is to be kept
            wake = min(wake, held.full)
        if held.compress_at is not None:
            wake = min(wake, next_due(self.classes, held))
        held.room, held.wake = room, 0 if busy else wake

    def note_peak(self) -> None:
        """Raises the counters' peaks to what is held now."""
        total, counters = 0, self.counters
        for number, store in enumerate(self.each):
            num_held = store.state.num_usable - store.num_available
            total += num_held * store.state.page_bytes
            counters.peak_pages[number] = max(counters.peak_pages[number], num_held)
        counters.peak_bytes = max(counters.peak_bytes, total)

    def audit(self, running: Sequence[Tracked]) -> tuple[Account, ...]:
        """Where every byte is now, one account a class."""
        starving = [store.num_available == 0 for store in self.each]
        accounts = []
        for number, store in enumerate(self.each):
            num_free = store.num_available - self.index.num_loose[number]
            others_starve = any(starving[:number] + starving[number + 1 :])
            stranded = num_free * store.state.page_bytes if others_starve else 0
            sequences = [Held(held.length, held.num_new, held.lookahead, held.holdings[number]) for held in running]
            accounts.append(account(store.state, num_free, sequences, self.index.cached[number], stranded))
        return tuple(accounts)
