"""The ledger's host tier: which pages of a sequence go where when it leaves the device for a while, and when it
returns."""

from collections.abc import Sequence

import numpy as np

from kvlab.ledger.answers import Wait
from kvlab.ledger.plan import Swap
from kvlab.ledger.store import Holding, Store
from kvlab.ledger.stores import Stores
from kvlab.ledger.tracked import Tracked
from kvlab.ledger.trie import CachedPage
from kvlab.units import counted


def swap_out(stores: Stores, held: Tracked) -> Swap | Wait:
    """See `Ledger.swap_out`; the sequence holds host pages afterwards."""
    for store, holding in zip(stores, held.holdings, strict=True):
        if len(holding.pages) > len(store.host_free):
            needed = f"{counted(len(holding.pages), 'host page')} needed, {len(store.host_free)} free"
            return Wait(f"{store.state.name}: {needed}")
    moves, host = [], []
    for store, holding in zip(stores, held.holdings, strict=True):
        pages = {logical: store.host_free.pop() for logical in holding.pages}
        host.append(Holding(pages, lengths=holding.lengths, dropped=holding.dropped))
        moves.append([(page, pages[logical]) for logical, page in holding.pages.items()])
    stores.let_go(held)
    held.holdings = host
    return _swap(stores, moves)


def swap_in(stores: Stores, held: Tracked) -> Swap | Wait:
    """See `Ledger.swap_in`; the sequence holds device pages afterwards."""
    host = held.holdings
    resident = [_resident(store, holding, held) for store, holding in zip(stores, host, strict=True)]
    for store, holding, found in zip(stores, host, resident, strict=True):
        pinned = sum(cached.loose for cached in found.values())
        if wait := store.shortage(len(holding.pages) - len(found) + pinned):
            return wait
    for store, found in zip(stores, resident, strict=True):
        for cached in found.values():
            store.share(cached.page)
    missing = [[i for i in old.pages if i not in found] for old, found in zip(host, resident, strict=True)]
    taken = stores.take([len(pages) for pages in missing])
    row = stores.new_row()
    held.holdings = [Holding(row=row, lengths=old.lengths, dropped=old.dropped) for old in host]
    moves = []
    for store, old, found, need, pages in zip(stores, host, resident, missing, taken, strict=True):
        fresh, new = dict(zip(need, pages, strict=True)), held.holdings[store.number]
        for logical in old.pages:
            store.assign(new, logical, found[logical].page if logical in found else fresh[logical])
            if logical in fresh and _is_sealed(store, old, held, logical):
                store.publish(held.path[logical + 1], fresh[logical])
        moves.append([(page, old.pages[logical]) for logical, page in fresh.items()])
        store.host_free.extend(old.pages.values())
    stores.refresh(held)
    stores.note_peak()
    return _swap(stores, moves)


def _is_sealed(store: Store, holding: Holding, held: Tracked, logical: int) -> bool:
    """Whether a page is what its tokens' node in the index has or had: full, and never compacted."""
    is_open = store.state.paged and not store.state.is_sealed
    return is_open and not holding.dropped and logical + 1 < len(held.path)


def _resident(store: Store, holding: Holding, held: Tracked) -> dict[int, CachedPage]:
    """Logical pages of a sequence that the index holds, so that they need not be moved."""
    sealed = (logical for logical in holding.pages if _is_sealed(store, holding, held, logical))
    nodes = {logical: held.path[logical + 1].pages[store.number] for logical in sealed}
    return {logical: cached for logical, cached in nodes.items() if cached is not None}


def _swap(stores: Stores, moves: Sequence[Sequence[tuple[int, int]]]) -> Swap:
    stores.counters.swapped_pages += sum(len(pages) for pages in moves)
    return Swap(tuple(np.array(pages, np.int32).reshape(-1, 2) for pages in moves))
