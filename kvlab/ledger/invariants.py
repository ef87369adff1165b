"""What must hold between any two calls of a ledger. Slow and plain: everything is counted again from the start."""

from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from typing import NamedTuple

from kvlab.ledger.contiguous import BlockStore
from kvlab.ledger.store import Store
from kvlab.ledger.stores import Stores
from kvlab.ledger.tracked import Tracked


class Holders(NamedTuple):
    """Everybody who holds pages, beside the index."""

    running: Mapping[Hashable, Tracked]
    suspended: Mapping[Hashable, Tracked]
    hits: Collection[Tracked]


def check(
    stores: Stores,
    running: Mapping[Hashable, Tracked],
    suspended: Mapping[Hashable, Tracked],
    hits: Collection[Tracked],
) -> None:
    """Raises AssertionError, with what differs, unless

    1. every page is free exactly once, or held; the null page neither;
    2. references are holders (tables, steps in flight, hits, the index), exactly;
    3. page tables list what sequences hold, and nothing else;
    4. accounts balance;
    5. a node's page is the index's page; a cached page that needs its prefix has it; locks are paths that end there;
    6. what the index alone holds, and nothing else, can be evicted, descendants first;
    7. host pages are free or held, exactly once;
    8. a class that forgets nothing holds the pages of the slots it stores and of the step in flight;
    9. no page of what was compacted is published;
    10. sealed pages are full ones that nothing writes or publishes; their slots are no open ones any more, and whoever
        has some publishes nothing.
    """
    holders = Holders(running, suspended, hits)
    for store in stores:
        _check_pages(holders, store)
        _check_table(holders, store, stores.free_rows)
        _check_index(holders, store)
        _check_slots(holders, store)
        host = [page for held in suspended.values() for page in held.holdings[store.number].pages.values()]
        assert sorted(host + store.host_free) == list(range(store.state.num_host_pages)), (
            f"{store.state.name}: host pages"
        )
    for account in stores.audit(list(running.values())):
        assert account.balanced, f"{account.name}: the parts do not sum to the pool:\n{account}"
    _check_sealed(holders, stores)
    _check_nodes(holders, stores)


def _check_pages(holders: Holders, store: Store) -> None:
    name, number = store.state.name, store.number
    found: Counter[int] = Counter(list(store.index.cached[number]))
    for held in (*holders.running.values(), *holders.hits):
        holding = held.holdings[number]
        if store.state.contiguous:
            first, size = next(iter(holding.pages.values()), 0), holding.block[0] // store.state.page_size
            found.update(range(first, first + size))
            continue
        found.update(holding.pages.values())
        found.update(source for _, source in holding.copies)
        if holding.writing is not None:
            found[holding.writing] += 1
    references = {page: count for page, count in enumerate(store.refs) if count}
    assert references == dict(found), f"{name}: references {references}, holders {dict(found)}"
    free = store.free
    if isinstance(store, BlockStore):
        free = [page for start, size in store.buddy.blocks for page in range(start, start + size)]
    everything = sorted([*free, *found])
    assert everything == list(range(int(store.state.has_null_page), store.state.num_pages)), f"{name}: {everything}"


def _check_table(holders: Holders, store: Store, free_rows: Collection[int]) -> None:
    rows = [held.holdings[0].row for held in holders.running.values()]
    assert sorted([*rows, *free_rows]) == list(range(len(store.table))), f"rows {rows}, free {free_rows}"
    for sequence, held in holders.running.items():
        holding = held.holdings[store.number]
        expected = {store.state.table_index(logical): page for logical, page in holding.pages.items()}
        listed = {
            place: page
            for place, page in enumerate(store.table[holding.row].tolist())
            if page != store.state.unused_page
        }
        assert listed == expected, f"{store.state.name}: table of {sequence!r} lists {listed}, it holds {expected}"
        for logical in holding.pages:
            start = store.starts[holding.row, store.state.table_index(logical)]
            assert start == logical * store.state.page_size, (
                f"{store.state.name}: {sequence!r} page {logical} starts at {start}"
            )


def _check_index(holders: Holders, store: Store) -> None:
    name, number, index = store.state.name, store.number, store.index
    for held in holders.running.values():
        holding = held.holdings[number]
        for logical, page in holding.pages.items() if store.state.paged and not holding.dropped else ():
            indexed = held.path[logical + 1].pages[number] if logical + 1 < len(held.path) else None
            assert indexed is None or indexed.page == page, f"{name}: page {page} is a duplicate of {indexed}"
    in_nodes = {}
    for node in index.nodes():
        if cached := node.pages[number]:
            assert cached.node is node, f"{name}: page {cached.page} is at another node"
            assert cached.page not in in_nodes, f"{name}: page {cached.page} is at two nodes"
            in_nodes[cached.page] = cached
            if index.whole_prefix[number] and node.parent and node.parent.parent:
                assert node.parent.pages[number], f"{name}: page {cached.page} is cached, its parent is not"
    assert in_nodes == index.cached[number], (
        f"{name}: pages at nodes {sorted(in_nodes)}, indexed {sorted(index.cached[number])}"
    )
    for cached in in_nodes.values():
        alone = store.refs[cached.page] == 1
        assert cached.loose == alone, f"{name}: page {cached.page} is {'not ' * (not cached.loose)}loose"
        built_on = index.whole_prefix[number] and cached.node.resident_children[number] > 0
        assert (cached.queued is not None) == (alone and not built_on), f"{name}: page {cached.page} in the wrong queue"
    loose = sum(cached.loose for cached in in_nodes.values())
    assert index.num_loose[number] == loose, f"{name}: {index.num_loose[number]} counted loose, {loose} are"


def _check_slots(holders: Holders, store: Store) -> None:
    name, page_size, cached = store.state.name, store.state.page_size, store.index.cached[store.number]
    for held in (*holders.running.values(), *holders.suspended.values()):
        holding = held.holdings[store.number]
        if not store.state.compactable:
            assert not holding.dropped, f"{name}: slots of a class that is never compacted are dropped"
            continue
        num_slots = held.length - holding.dropped + held.num_new + held.lookahead
        pages = list(range(-(-num_slots // page_size)))
        assert sorted(holding.pages) == pages, f"{name}: {num_slots} slots in pages {sorted(holding.pages)}"
        assert 0 <= holding.dropped <= held.length, f"{name}: {holding.dropped} of {held.length} slots dropped"
        if holding.dropped and store.state.sealing is None:
            assert held.ids is None, f"{name}: a compacted sequence goes on publishing"
            published = [] if held in holders.suspended.values() else set(holding.pages.values()) & set(cached)
            assert not published, f"{name}: pages {published} of a compacted sequence are published"


def _check_sealed(holders: Holders, stores: Stores) -> None:
    numbers = {store.state.name: store.number for store in stores}
    for store in stores:
        name, page_size, sealed_name = store.state.name, store.state.page_size, store.state.sealed_name
        if store.state.is_sealed:
            assert not store.index.cached[store.number], f"{name}: sealed pages are published"
        for held in (*holders.running.values(), *holders.suspended.values()) if sealed_name else ():
            open_pages, sealed = held.holdings[store.number], held.holdings[numbers[sealed_name]]
            count = len(sealed.pages)
            assert list(sealed.pages) == list(range(count)), f"{sealed_name}: pages {list(sealed.pages)}"
            assert not sealed.copies, f"{sealed_name}: sealed pages are copied"
            assert sealed.writing is None, f"{sealed_name}: sealed pages are written"
            assert count * page_size <= open_pages.dropped, f"{name}: {count} pages are sealed and open"
            assert not count or held.ids is None, f"{name}: a sequence with sealed pages goes on publishing"


def _check_nodes(holders: Holders, stores: Stores) -> None:
    sequences = [*holders.running.values(), *holders.suspended.values(), *holders.hits]
    ends = Counter(id(held.path[-1]) for held in sequences if held.path)
    nodes = list(stores.index.nodes())
    for node in (*nodes, *stores.index.roots.values()):
        below = [child for child in nodes if child.parent is node]
        assert node.locks == ends.get(id(node), 0), (
            f"{node.locks} locks on a node where {ends.get(id(node), 0)} paths end"
        )
        assert node.children == len(below), f"{node.children} children counted, {len(below)} there"
        for number in range(len(stores)):
            resident = sum(child.pages[number] is not None for child in below)
            assert node.resident_children[number] == resident, "resident children are miscounted"
        assert node.locks or node.children or any(node.pages), "a node that holds nothing and leads nowhere"
    reachable = {id(node) for node in (*nodes, *stores.index.roots.values())}
    for held in sequences:
        assert all(id(node) in reachable for node in held.path), "a path through a node that is not in the index"
