"""When full pages are sealed: moved from a class of open pages, in the model's type, to a class of sealed ones, which
are quantised whole and never written again (KIVI, arXiv 2402.02750). Closed forms of token counts, as retentions are.

Sealing runs between steps. What is left open is renumbered from slot 0 on, as a compaction would; what is sealed grows
by whole pages and by nothing else. A sequence that has sealed pages publishes nothing any more: what it computes then
depends on rounded tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvlab.ledger.answers import Wait
from kvlab.ledger.classes import StateClass
from kvlab.ledger.paged import PageStore
from kvlab.ledger.plan import Seals, pairs
from kvlab.ledger.publisher import Publisher
from kvlab.ledger.store import Holding
from kvlab.ledger.stores import Stores
from kvlab.ledger.tracked import Tracked


@dataclass(frozen=True)
class Sealed:
    """What one sequence sealed of one class at a length: the pages that were its first ones."""

    state_class: int
    length: int
    num_pages: int


def num_sealable(state: StateClass, held: Tracked, holding: Holding) -> int:
    """Pages of a class of open ones that are to be sealed before the sequence's next step."""
    if state.sealing is None or held.compress_at is None or not held.length:
        return 0
    num_open = held.length - holding.dropped
    if state.retention is not None and state.retention.due(held.compress_at, held.length, num_open) is not None:
        return 0  # first it is compacted
    return state.sealing.due(held.compress_at, held.length, num_open)


def seal(publisher: Publisher, sequences: Sequence[Tracked]) -> tuple[Seals, list[list[Sealed]]] | Wait | None:
    """See `Ledger.seal`; with the plan, what each sequence sealed."""
    stores = publisher.stores
    wanted = [
        (row, store.number, count)
        for row, held in enumerate(sequences)
        for store in stores
        if (count := num_sealable(store.state, held, held.holdings[store.number]))
    ]
    if not wanted:
        return None
    needed = [0] * len(stores)
    for _, number, count in wanted:
        needed[_target(stores, number)] += count
    for number, count in enumerate(needed):
        if wait := stores[number].shortage(count):
            return wait
    taken = [iter(pages) for pages in stores.take(needed)]
    moved: list[list[tuple[int, int]]] = [[] for _ in stores]
    done: list[list[Sealed]] = [[] for _ in sequences]
    for row, number, count in wanted:
        held, target = sequences[row], _target(stores, number)
        moved[number] += _move(stores, number, target, held, [next(taken[target]) for _ in range(count)])
        done[row].append(Sealed(number, held.length, count))
    stores.note_peak()
    for held, sealed in zip(sequences, done, strict=True):
        if sealed:
            publisher.close(held)
            stores.refresh(held)
    return Seals(tuple(pairs(each) for each in moved)), done


def _target(stores: Stores, number: int) -> int:
    """The class that takes what a class of open pages seals."""
    name = stores.classes[number].sealed_name
    return next(target for target, state in enumerate(stores.classes) if state.name == name)


def _move(stores: Stores, number: int, target: int, held: Tracked, taken: Sequence[int]) -> list[tuple[int, int]]:
    """A sequence's first open pages become sealed ones; (open page, sealed page) of each."""
    store, sealed = stores[number], stores[target]
    assert isinstance(store, PageStore)
    holding, into = held.holdings[number], held.holdings[target]
    pages, count = list(holding.pages.values()), len(taken)
    num_open = held.length - holding.dropped - count * store.state.page_size
    store.repack(holding, pages[count:])
    store.shorten(holding, held.length, num_open)
    for page in taken:
        sealed.assign(into, len(into.pages), page)
    return list(zip(pages[:count], taken, strict=True))
