"""The ledger's host tier: which pages of a sequence go where when it leaves the device for a while, and when it returns."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvlab.ledger.answers import Wait
from kvlab.ledger.plan import Swap
from kvlab.ledger.stores import Holding
from kvlab.ledger.trie import CachedPage

if TYPE_CHECKING:
    from kvlab.ledger.ledger import Ledger, Tracked


def swap_out(ledger: "Ledger", sequence: Hashable, held: "Tracked") -> Swap | Wait:
    """See `Ledger.swap_out`."""
    for store, holding in zip(ledger.stores, held.holdings, strict=True):
        if len(holding.pages) > len(store.host_free):
            needed = f"{len(holding.pages)} host pages needed, {len(store.host_free)} free"
            return Wait(f"{store.state.name}: {needed}")
    moves, host = [], []
    for store, holding in zip(ledger.stores, held.holdings, strict=True):
        pages = {logical: store.host_free.pop() for logical in holding.pages}
        host.append(Holding(pages, lengths=holding.lengths))
        moves.append([(page, host[-1].pages[logical]) for logical, page in holding.pages.items()])
    ledger._let_go(held)
    held.holdings = host
    ledger.suspended[sequence] = held
    del ledger.running[sequence]
    return _swap(ledger, moves)


def swap_in(ledger: "Ledger", sequence: Hashable) -> Swap | Wait:
    """See `Ledger.swap_in`."""
    held = ledger.suspended[sequence]
    resident: list[dict[int, CachedPage]] = []
    for store, holding in zip(ledger.stores, held.holdings, strict=True):
        sealed = [i for i in holding.pages if store.state.paged and i + 1 < len(held.path)]
        nodes = {i: held.path[i + 1].pages[store.number] for i in sealed}
        resident.append({i: cached for i, cached in nodes.items() if cached is not None})
        pinned = sum(cached.loose for cached in resident[-1].values())
        if wait := store.shortage(len(holding.pages) - len(resident[-1]) + pinned):
            return wait
    for store, cached_pages in zip(ledger.stores, resident, strict=True):
        for cached in cached_pages.values():
            store.share(cached.page)
    host, moves = held.holdings, []
    missing = [[i for i in one.pages if i not in found] for one, found in zip(host, resident, strict=True)]
    taken = ledger._take([len(pages) for pages in missing])
    row = ledger._new_row()
    held.holdings = [Holding(row=row, lengths=one.lengths) for one in host]
    for store, old, new, found, need, pages in zip(
        ledger.stores, host, held.holdings, resident, missing, taken, strict=True
    ):
        fresh = dict(zip(need, pages, strict=True))
        for logical in old.pages:
            store.assign(new, logical, found[logical].page if logical in found else fresh[logical])
            if logical in fresh and store.state.paged and logical + 1 < len(held.path):
                store.publish(held.path[logical + 1], fresh[logical])
        moves.append([(page, old.pages[logical]) for logical, page in fresh.items()])
        store.host_free.extend(old.pages.values())
    ledger.running[sequence] = held
    del ledger.suspended[sequence]
    ledger._refresh(held)
    ledger._note_peak()
    return _swap(ledger, moves)


def _swap(ledger: "Ledger", moves: Sequence[Sequence[tuple[int, int]]]) -> Swap:
    ledger.counters.swapped_pages += sum(len(one) for one in moves)
    return Swap(tuple(np.array(one, np.int32).reshape(-1, 2) for one in moves))
