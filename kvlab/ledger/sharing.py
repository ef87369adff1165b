"""What sequences share: the prefix that a prompt finds in the index, and everything that a fork takes over."""

import operator
from dataclasses import replace

from kvlab.ledger.classes import Lengths
from kvlab.ledger.due import first_due
from kvlab.ledger.store import Holding
from kvlab.ledger.stores import Stores
from kvlab.ledger.tokens import ITEM
from kvlab.ledger.tracked import Tracked


def look_up(stores: Stores, ids: bytes, num_tokens: int, namespace: str, prompt_len: int) -> Tracked:
    """See `Ledger.lookup`: a hit that holds its pages and the end of its path."""
    if stores.has_dense_prompts:  # nothing behind a prompt is found, or published
        ids, num_tokens = ids[: prompt_len * ITEM], min(num_tokens, prompt_len)
    index, most = stores.index, num_tokens
    if stores.compresses:
        most = min(most, first_due(stores.classes, prompt_len))
    path, num_pages = index.match(namespace, ids, most) if stores.can_share else ([], 0)
    holdings = [Holding() for _ in stores]
    for store, holding in zip(stores, holdings, strict=True):
        for logical, cached in index.needed(path, store.number, num_pages):
            holding.pages[logical] = cached.page
            store.share(cached.page)
    nodes = [index.root(namespace), *path[:num_pages]]
    hit = Tracked(holdings, nodes, bytearray(ids) if stores.can_share else None)
    hit.prompt_len, hit.junction, hit.length = num_tokens, len(path), num_pages * index.page_size
    hit.compress_at = prompt_len if stores.compresses else None
    hit.path[-1].locks += 1
    stores.note_peak()
    return hit


def unpin(stores: Stores, hit: Tracked) -> None:
    """A hit lets go of its pages and its path."""
    for store, holding in zip(stores, hit.holdings, strict=True):
        for page in reversed(holding.pages.values()):
            store.drop(page)
    stores.index.unlock(hit.path[-1])


def begun(stores: Stores, hit: Tracked | None, lengths: Lengths | None) -> Tracked:
    """A sequence that is not installed yet and holds what its hit pins. Raises ValueError for lengths that cannot
    be."""
    lengths = lengths and Lengths(*map(operator.index, lengths))
    if lengths and not 0 <= lengths.prompt_len <= lengths.final_len:
        raise ValueError(f"lengths = {tuple(lengths)}: must be 0 <= prompt_len <= final_len")
    compress_at = lengths.prompt_len if lengths and stores.compresses else None
    if hit is None:
        return Tracked([Holding(lengths=lengths) for _ in stores], compress_at=compress_at)
    holdings = [replace(holding, lengths=lengths) for holding in hit.holdings]
    return replace(hit, holdings=holdings, path=list(hit.path), compress_at=compress_at)


def install(stores: Stores, held: Tracked, hit: Tracked | None) -> None:
    """A sequence begins: it has a row, and the pins and the lock of its hit are its own from now on."""
    row = stores.new_row()
    for store, holding in zip(stores, held.holdings, strict=True):
        holding.row = row
        for logical, page in holding.pages.items():
            store.assign(holding, logical, page)
    if hit is not None:
        stores.counters.looked_up_tokens += hit.prompt_len
        stores.counters.hit_tokens += hit.length
        for store, holding in zip(stores, held.holdings, strict=True):
            stores.index.policies[store.number].num_lookups += 1
            for page in holding.pages.values():
                stores.index.hit(stores.index.cached[store.number][page])


def forked(stores: Stores, held: Tracked) -> Tracked:
    """A sequence that continues from where another is, and holds every page that it holds."""
    ids = None if held.ids is None else bytearray(held.ids)
    twin, row = Tracked([], list(held.path), ids, held.prompt_len, held.junction, held.length), stores.new_row()
    twin.compress_at = held.compress_at
    for store, holding in zip(stores, held.holdings, strict=True):
        twin.holdings.append(Holding(dict(holding.pages), row=row, lengths=holding.lengths, dropped=holding.dropped))
        for page in holding.pages.values():
            store.share(page)
        store.table[row], store.starts[row] = store.table[holding.row], store.starts[holding.row]
    if twin.path:
        twin.path[-1].locks += 1
    return twin
