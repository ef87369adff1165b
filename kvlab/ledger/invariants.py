"""What must hold between any two calls of a ledger. Slow and plain: everything is counted again from the start."""

from collections import Counter

from kvlab.ledger.contiguous import BlockStore
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.stores import Store


def check(ledger: Ledger) -> None:
    """Raises AssertionError, with what differs, unless

    1. every page is free exactly once, or held; the null page neither;
    2. references are holders (tables, steps in flight, hits, the index), exactly;
    3. page tables list what sequences hold, and nothing else;
    4. accounts balance;
    5. a node's page is the index's page; a cached page that needs its prefix has it; locks are paths that end there;
    6. what the index alone holds, and nothing else, can be evicted, descendants first;
    7. host pages are free or held, exactly once.
    """
    for store in ledger.stores:
        _check_pages(ledger, store)
        _check_table(ledger, store)
        _check_index(ledger, store)
        host = [page for held in ledger.suspended.values() for page in held.holdings[store.number].pages.values()]
        assert sorted(host + store.host_free) == list(range(store.state.num_host_pages)), (
            f"{store.state.name}: host pages"
        )
    for one in ledger.audit():
        assert one.balanced, f"{one.name}: the parts do not sum to the pool:\n{one}"
    _check_nodes(ledger)


def _check_pages(ledger: Ledger, store: Store) -> None:
    name, number = store.state.name, store.number
    holders: Counter[int] = Counter(list(store.index.cached[number]))
    for held in (*ledger.running.values(), *ledger.hits):
        holding = held.holdings[number]
        if store.state.contiguous:
            first, size = next(iter(holding.pages.values()), 0), holding.block[0] // store.state.page_size
            holders.update(range(first, first + size))
            continue
        holders.update(holding.pages.values())
        holders.update(source for _, source in holding.copies)
        if holding.writing is not None:
            holders[holding.writing] += 1
    references = {page: count for page, count in enumerate(store.refs) if count}
    assert references == dict(holders), f"{name}: references {references}, holders {dict(holders)}"
    free = store.free
    if isinstance(store, BlockStore):
        free = [page for start, size in store.buddy.blocks for page in range(start, start + size)]
    everything = sorted([*free, *holders])
    assert everything == list(range(int(store.state.has_null_page), store.state.num_pages)), f"{name}: {everything}"


def _check_table(ledger: Ledger, store: Store) -> None:
    rows = [held.holdings[0].row for held in ledger.running.values()]
    assert sorted([*rows, *ledger.free_rows]) == list(range(len(store.table))), f"rows {rows}, free {ledger.free_rows}"
    for sequence, held in ledger.running.items():
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


def _check_index(ledger: Ledger, store: Store) -> None:
    name, number, index = store.state.name, store.number, ledger.index
    for held in ledger.running.values():
        for logical, page in held.holdings[number].pages.items() if store.state.paged else ():
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


def _check_nodes(ledger: Ledger) -> None:
    sequences = [*ledger.running.values(), *ledger.suspended.values(), *ledger.hits]
    ends = Counter(id(held.path[-1]) for held in sequences if held.path)
    nodes = list(ledger.index.nodes())
    for node in (*nodes, *ledger.index.roots.values()):
        below = [child for child in nodes if child.parent is node]
        assert node.locks == ends.get(id(node), 0), (
            f"{node.locks} locks on a node where {ends.get(id(node), 0)} paths end"
        )
        assert node.children == len(below), f"{node.children} children counted, {len(below)} there"
        for number in range(len(ledger.classes)):
            resident = sum(child.pages[number] is not None for child in below)
            assert node.resident_children[number] == resident, "resident children are miscounted"
        assert node.locks or node.children or any(node.pages), "a node that holds nothing and leads nowhere"
    reachable = {id(node) for node in (*nodes, *ledger.index.roots.values())}
    for held in sequences:
        assert all(id(node) in reachable for node in held.path), "a path through a node that is not in the index"
