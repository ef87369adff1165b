"""Sequences that store fewer slots than they have tokens: which pages they keep, and where what is kept is packed.

The device packs the slots that stay to the front of whole pages; the pages behind return at once. A sequence writes no
page that somebody else or the index holds: where it has too few of its own, it is given others.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kvlab.ledger.answers import Wait
from kvlab.ledger.classes import StateClass
from kvlab.ledger.paged import PageStore
from kvlab.ledger.plan import ClassCompaction, Compaction, Ints
from kvlab.ledger.recurrent import StateStore
from kvlab.ledger.store import Holding, Store
from kvlab.ledger.stores import Stores
from kvlab.ledger.tracked import Tracked
from kvlab.ledger.trie import CachedPage

type Stored = Mapping[str | int, int]
"""Slots that a sequence stores from now on, by the name or the number of a class; a class that is left out stays as it
is."""


class Shortened(NamedTuple):
    """One sequence's state of one class, and how many slots it keeps."""

    row: int
    """Of the compaction."""
    held: Tracked
    holding: Holding
    keep: int

    @property
    def num_stored(self) -> int:
        """Slots before."""
        return self.held.length - self.holding.dropped


def kept_slots(classes: Sequence[StateClass], held: Tracked, length: int, stored: Stored) -> dict[int, int]:
    """Slots to keep by class number, for a sequence of `length` tokens; classes that would keep all are left out.
    Raises ValueError for a class that there is not, or that is never compacted, and for counts out of range."""
    numbers, kept = {state.name: number for number, state in enumerate(classes)}, dict[int, int]()
    named = set[int]()
    for key, value in stored.items():
        number = numbers.get(key) if isinstance(key, str) else operator.index(key)
        if number is None or not 0 <= number < len(classes):
            raise ValueError(f"stored[{key!r}]: must be one of {', '.join(numbers)}, or a number below {len(classes)}")
        state, keep = classes[number], operator.index(value)
        if number in named:
            raise ValueError(f"stored[{key!r}]: {state.name} is named twice")
        named.add(number)
        if not state.compactable:
            why = (
                "is recurrent"
                if not state.spec.per_token
                else "is contiguous"
                if state.contiguous
                else "forgets by itself"
            )
            raise ValueError(f"stored[{state.name!r}] = {keep}: must be left out, since {state.name} {why}")
        most = length - held.holdings[number].dropped
        if not min(1, most) <= keep <= most:
            raise ValueError(f"stored[{state.name!r}] = {keep}: must be in [{min(1, most)}, {most}] slots")
        if keep < most:
            kept[number] = keep
    return kept


def check_own(stores: Stores, held: Tracked, kept: Mapping[int, int]) -> None:
    """Raises ValueError where the pages that a step packed these slots into are not the sequence's own."""
    for number, keep in kept.items():
        store, holding = _paged(stores, number), held.holdings[number]
        if store.is_shared(holding, keep):
            name = store.state.name
            legal = "must be left out while others share these pages: compact after the commit"
            raise ValueError(f"stored[{name!r}] = {keep}: {legal}")


def shorten(stores: Stores, held: Tracked, length: int, kept: Mapping[int, int]) -> None:
    """A step left only these slots of a sequence that has `length` tokens now."""
    for number, keep in kept.items():
        stores.counters.dropped_slots += length - held.holdings[number].dropped - keep
        _paged(stores, number).shorten(held.holdings[number], length, keep)


def compact(
    stores: Stores, sequences: Sequence[tuple[Tracked, Mapping[int, int]]], seeds: Sequence[int]
) -> Compaction | Wait:
    """See `Ledger.compact`; `sequences` with the slots that each keeps, by class, and the seed of each."""
    wanted: list[list[Shortened]] = [[] for _ in stores]
    for row, (held, kept) in enumerate(sequences):
        for number, keep in kept.items():
            wanted[number].append(Shortened(row, held, held.holdings[number], keep))
    missing, given_up = [[0] * len(each) for each in wanted], list[CachedPage]()
    weighed = {row: held for row, (held, kept) in enumerate(sequences) if kept}
    for number, each in enumerate(wanted):
        if stores[number].state.is_statistics:
            missing[number], lent = _shared_statistics(stores[number], list(weighed.values()))
            given_up += lent
            if wait := stores[number].shortage(sum(missing[number])):
                return wait
            continue
        missing[number] = [_num_missing(_paged(stores, number), shortened) for shortened in each]
        short = sum(missing[number]) - stores[number].num_available
        for place, shortened in enumerate(each):
            found = _reclaimable(_paged(stores, number), shortened, min(short, missing[number][place]))
            missing[number][place] -= len(found)
            short -= len(found)
            given_up += found
        if wait := stores[number].shortage(sum(missing[number])):
            return wait
    taken = stores.take([sum(counts) for counts in missing])
    stores.note_peak()
    for cached in given_up:
        stores[cached.state_class].withdraw(cached)
    classes = [
        _moved(stores[number], len(sequences), weighed, missing[number], taken[number])
        if stores[number].state.is_statistics
        else _packed(stores, number, len(sequences), each, missing[number], taken[number])
        for number, each in enumerate(wanted)
    ]
    lengths = np.array([held.length for held, _ in sequences], np.int32)
    return Compaction(tuple(classes), np.array(seeds, np.int32), lengths)


def _shared_statistics(store: Store, sequences: Sequence[Tracked]) -> tuple[list[int], list[CachedPage]]:
    """How many slots each sequence must be given to write its statistics, 1 where somebody else reads them; and what
    the index lends no longer where slots are short."""
    missing, given_up = list[int](), list[CachedPage]()
    for held in sequences:
        if _ends(store, held):
            missing.append(0)
            continue
        slot = held.holdings[store.number].pages[0]
        cached = store.index.cached[store.number].get(slot)
        is_shared = store.refs[slot] > 1
        if is_shared and cached is not None and store.refs[slot] == 2 and sum(missing) >= store.num_available:
            given_up.append(cached)
            is_shared = False
        missing.append(int(is_shared))
    return missing, given_up


def _moved(
    store: Store, num_rows: int, weighed: Mapping[int, Tracked], missing: Sequence[int], taken: list[int]
) -> ClassCompaction:
    """Where statistics are read and written; the sequences hold the latter afterwards, or nothing where they end."""
    state, fresh = store.state, iter(taken)
    pages, destinations = np.full((2, num_rows, 1), state.num_pages, np.int32)
    for (row, held), is_shared in zip(weighed.items(), missing, strict=True):
        holding = held.holdings[store.number]
        if not holding.pages:  # let go at an earlier compaction
            continue
        pages[row] = slot = holding.pages[0]
        if _ends(store, held):
            _states(store).end(holding)
            continue
        destinations[row] = slot
        if is_shared:
            destinations[row] = new = next(fresh)
            store.drop(slot)
            store.assign(holding, 0, new)
    none = np.zeros(num_rows, np.int32)
    return ClassCompaction(pages, destinations, none, none.copy())


def _ends(store: Store, held: Tracked) -> bool:
    """Whether a compaction that is due now is the last use of a sequence's statistics."""
    return store.state.until_compacted and held.compress_at is not None and held.length >= held.compress_at


def _packed(
    stores: Stores, number: int, num_rows: int, wanted: Sequence[Shortened], missing: Sequence[int], taken: list[int]
) -> ClassCompaction:
    """One class's arrays; the sequences hold their destinations afterwards, and nothing else."""
    state, fresh = stores.classes[number], iter(taken)
    pages, destinations = [[[] for _ in range(num_rows)] for _ in range(2)]
    stored, keep = np.zeros((2, num_rows), np.int32)
    for shortened, num_fresh in zip(wanted, missing, strict=True):  # all of them before any page is let go
        store = _paged(stores, number)
        given = [next(fresh) for _ in range(num_fresh)]
        pages[shortened.row] = list(shortened.holding.pages.values())
        destinations[shortened.row] = (_own(store, shortened.holding) + given)[: _num_pages(store, shortened.keep)]
        stored[shortened.row], keep[shortened.row] = shortened.num_stored, shortened.keep
    for shortened in wanted:
        store = _paged(stores, number)
        stores.counters.dropped_slots += shortened.num_stored - shortened.keep
        store.repack(shortened.holding, destinations[shortened.row])
        store.shorten(shortened.holding, shortened.held.length, shortened.keep)
    return ClassCompaction(_padded(pages, state.unused_page), _padded(destinations, state.num_pages), stored, keep)


def _paged(stores: Stores, number: int) -> PageStore:
    """A store whose class is compactable."""
    store = stores[number]
    assert isinstance(store, PageStore)
    return store


def _states(store: Store) -> StateStore:
    """A store of statistics."""
    assert isinstance(store, StateStore)
    return store


def _num_pages(store: PageStore, num_slots: int) -> int:
    return -(-num_slots // store.state.page_size)


def _own(store: PageStore, holding: Holding) -> list[int]:
    """Pages that nobody else holds: they may be written."""
    return [page for page in holding.pages.values() if store.refs[page] == 1]


def _num_missing(store: PageStore, shortened: Shortened) -> int:
    """Pages that a sequence must be given to have enough of its own."""
    return max(0, _num_pages(store, shortened.keep) - len(_own(store, shortened.holding)))


def _reclaimable(store: PageStore, shortened: Shortened, count: int) -> list[CachedPage]:
    """Up to `count` pages of a sequence that only the index holds as well, last first: given up when pages are short,
    so that a sequence can always go on. A page on which cached ones build stays; those that `take` will have evicted do
    not count."""
    cached_pages, found = store.index.cached[store.number], list[CachedPage]()
    for page in reversed(shortened.holding.pages.values()):
        if len(found) >= count:
            break
        if store.refs[page] == 1:
            continue
        cached = cached_pages.get(page)
        if cached is None or store.refs[page] != 2:
            break
        behind = [other for other in cached_pages.values() if other.node.parent is cached.node]
        if not all(other.loose or other in found for other in behind):
            break
        found.append(cached)
    return found


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Ints:
    """Rows of different lengths as one array."""
    array = np.full((len(rows), max(map(len, rows), default=0)), filler, np.int32)
    for row, pages in enumerate(rows):
        array[row, : len(pages)] = pages
    return array
