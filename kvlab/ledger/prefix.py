"""The prefix index: a trie of sealed pages. What one sequence computed, another that begins with the same tokens can
read.

A node is one page of tokens behind its parent's; it holds, for each state class, the page with their state or nothing
(evicted, never kept). Tokens are compared exactly; a SHA-256 chain only finds the candidates, so that a colliding hash
costs time and nothing else. Namespaces (parameters, spec, page format, salt) are separate tries.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence

from kvlab.ledger.classes import StateClass
from kvlab.ledger.replacement import Order, Policy
from kvlab.ledger.states import live_pages
from kvlab.ledger.tokens import ITEM, sha256
from kvlab.ledger.trie import CachedPage, Node


class PrefixIndex:
    """The trie, and the order of eviction. It owns one reference on every page it holds; the ledger counts
    references."""

    def __init__(
        self,
        classes: Sequence[StateClass],
        policy: Callable[[int], Policy],
        page_size: int,
        digest: Callable[[bytes], bytes] = sha256,
    ):
        self._classes, self._digest = tuple(classes), digest
        self.page_size = page_size
        self.policies = [policy(state.num_usable) for state in classes]
        self.num_loose = [0] * len(classes)
        """Pages held by the index alone: all of them can be evicted, descendants first."""
        # Per class: whether a cached page is of use only behind all its ancestors; the pages held, by number.
        self.whole_prefix = [state.spec.per_token and state.spec.span is None for state in classes]
        self._nodes: dict[bytes, list[Node]] = {}
        self.roots: dict[str, Node] = {}
        self.cached: list[dict[int, CachedPage]] = [{} for _ in classes]
        self._heaps: list[tuple[list[tuple[Order, int, int, int, CachedPage]], ...]] = [([], []) for _ in classes]
        self._evictable = [[0, 0] for _ in classes]
        self._resident = [[0, 0] for _ in classes]
        self._stamps = itertools.count()

    def root(self, name: str) -> Node:
        """The root of a namespace."""
        if name not in self.roots:
            self.roots[name] = Node(None, b"", self._digest(name.encode()), 0, len(self._classes))
        return self.roots[name]

    def find(self, parent: Node, tokens: bytes, *, grow: bool = False) -> Node | None:
        """The child with exactly these tokens; made if it is missing and may `grow`."""
        key = self._digest(parent.key + tokens)
        for node in self._nodes.get(key, ()):
            if node.parent is parent and node.tokens == tokens:
                return node
        if not grow:
            return None
        node = Node(parent, tokens, key, parent.depth + 1, len(self._classes))
        parent.children += 1
        self._nodes.setdefault(key, []).append(node)
        return node

    def match(self, name: str, ids: bytes, num_tokens: int) -> tuple[list[Node], int]:
        """The path of nodes that the first num_tokens - 1 tokens follow, and the longest joint hit on it, in pages.

        A hit of p pages is valid iff, for every class, all pages of live(p * page_size) are resident on the path, and a
        recurrent class holds a state at exactly p.
        """
        step, path, node = self.page_size * ITEM, [], self.root(name)
        for page in range(max(0, num_tokens - 1) // self.page_size):
            found = self.find(node, ids[page * step : (page + 1) * step])
            if found is None:
                break
            path.append(found)
            node = found
        missing = [[0] for _ in self._classes]  # missing[c][i]: pages of class c absent from the path's first i nodes
        for index, state in enumerate(self._classes):
            if state.paged:
                for node in path:
                    missing[index].append(missing[index][-1] + (node.pages[index] is None))
        for pages in range(len(path), 0, -1):
            if all(self._valid(index, pages, path, missing[index]) for index in range(len(self._classes))):
                return path, pages
        return path, 0

    def _valid(self, index: int, pages: int, path: Sequence[Node], missing: Sequence[int]) -> bool:
        state = self._classes[index]
        if state.is_sealed:  # what is sealed is never published
            return True
        if not state.paged:
            return path[pages - 1].pages[index] is not None
        needed = live_pages(state.spec, pages * self.page_size, self.page_size)
        return all(missing[run.stop] == missing[run.start] for run in needed)

    def needed(self, path: Sequence[Node], index: int, pages: int) -> Iterator[tuple[int, CachedPage]]:
        """Logical and cached pages of a class that a hit of `pages` pages reads; a recurrent state is page 0."""
        state = self._classes[index]
        is_open = state.paged and not state.is_sealed
        runs = live_pages(state.spec, pages * self.page_size, self.page_size) if is_open else ()
        found = [(page, path[page].pages[index]) for run in runs for page in run]
        if pages and not state.paged:
            found = [(0, path[pages - 1].pages[index])]
        for page, cached in found:
            assert cached is not None
            yield page, cached

    def unlock(self, node: Node) -> None:
        """A path no longer ends here; what holds nothing and leads nowhere is forgotten."""
        node.locks -= 1
        self._prune(node)

    def publish(self, node: Node, index: int, page: int) -> CachedPage:
        """The index holds a page of class `index` at a node that has none; the caller adds the reference."""
        assert node.pages[index] is None
        assert node.parent is not None
        state, end = self._classes[index], node.depth * self.page_size
        start = end - self.page_size if state.paged else 0
        cached = CachedPage(node, index, page, state.page_bytes, start, end)
        node.pages[index] = self.cached[index][page] = cached
        node.parent.resident_children[index] += 1
        if self.whole_prefix[index] and (above := node.parent.pages[index]):
            self._unqueue(above)
        cached.created = cached.last_used = self._tick(index)
        self._use(cached, residents=1)
        return cached

    def hit(self, cached: CachedPage) -> None:
        """Another sequence uses a page."""
        cached.uses += 1
        cached.last_used = self._tick(cached.state_class)
        self._use(cached)

    def pin(self, cached: CachedPage) -> None:
        """A page that the index held alone has another holder."""
        self.num_loose[cached.state_class] -= 1
        cached.loose = False
        self._unqueue(cached)

    def loosen(self, cached: CachedPage) -> None:
        """The last other holder of a page let go of it."""
        self.num_loose[cached.state_class] += 1
        cached.loose = True
        cached.last_used = self._tick(cached.state_class)
        self._queue(cached)

    def victim(self, index: int) -> CachedPage:
        """The page of a class that the policy evicts next. Raises MemoryError when every page is pinned."""
        policy, evictable = self.policies[index], self._evictable[index]
        while any(evictable):
            segment = policy.pick(self._resident[index])
            heap = self._heaps[index][segment if evictable[segment] else 1 - segment]
            cached = heap[0][4]
            if cached.queued is None or heap[0][3] != cached.stamp:
                heapq.heappop(heap)
                continue
            policy.clock += 1
            self._resident[index][cached.segment] -= 1
            spared = policy.spare(cached)
            self._resident[index][cached.segment] += 1
            if not spared:
                return cached
            self._unqueue(cached)
            self._queue(cached)
        raise MemoryError(f"{self._classes[index].name}: no page can be evicted")

    def in_the_way(self, index: int) -> list[CachedPage]:
        """Pages that sequences hold behind one that the index alone holds, deepest first, where nothing could be
        evicted before they are withdrawn: a sequence whose first pages are sealed holds those behind them only."""
        if any(self._evictable[index]) or not self.num_loose[index]:
            return []
        loose = [cached for cached in self.cached[index].values() if cached.loose]
        first = min(loose, key=lambda cached: (-cached.node.depth, cached.last_used, cached.page))
        found = [cached for cached in self.cached[index].values() if _is_behind(cached.node, first.node)]
        return sorted(found, key=lambda cached: -cached.node.depth)

    def withdraw(self, cached: CachedPage) -> None:
        """The index lets go of a page; the caller drops the reference."""
        node, index = cached.node, cached.state_class
        assert node.parent is not None
        self._unqueue(cached)
        self.num_loose[index] -= cached.loose
        self._resident[index][cached.segment] -= 1
        node.pages[index] = None
        del self.cached[index][cached.page]
        node.parent.resident_children[index] -= 1
        if (above := node.parent.pages[index]) and above.loose and above.queued is None:
            self._queue(above)
        self._prune(node)

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots."""
        return (node for nodes in self._nodes.values() for node in nodes)

    def _use(self, cached: CachedPage, residents: int = 0) -> None:
        """Tells the policy; it may move the page to another segment. `residents` is 1 for a page that was not cached
        yet."""
        counts = self._resident[cached.state_class]
        counts[cached.segment] -= 1 - residents
        self.policies[cached.state_class].used(cached)
        counts[cached.segment] += 1

    def _tick(self, index: int) -> int:
        self.policies[index].clock += 1
        return self.policies[index].clock

    def _queue(self, cached: CachedPage) -> None:
        index = cached.state_class
        if self.whole_prefix[index] and cached.node.resident_children[index]:
            return
        cached.queued = cached.segment
        self._evictable[index][cached.segment] += 1
        cached.stamp = next(self._stamps)
        heap = self._heaps[index][cached.segment]
        if len(heap) > 64 + 2 * self._evictable[index][cached.segment]:  # most of it is stale
            heap[:] = [entry for entry in heap if entry[4].queued is not None and entry[3] == entry[4].stamp]
            heapq.heapify(heap)
        entry = (self.policies[index].order(cached), -cached.node.depth, cached.page, cached.stamp, cached)
        heapq.heappush(heap, entry)

    def _unqueue(self, cached: CachedPage) -> None:
        if cached.queued is not None:
            self._evictable[cached.state_class][cached.queued] -= 1
            cached.queued = None

    def _prune(self, node: Node) -> None:
        while node.parent and not (node.locks or node.children or any(node.pages)):
            same = self._nodes[node.key]
            same.remove(node)
            if not same:
                del self._nodes[node.key]
            node.parent.children -= 1
            node = node.parent
        if node.parent is None and not (node.locks or node.children):
            self.roots = {name: root for name, root in self.roots.items() if root is not node}


def _is_behind(node: Node, other: Node) -> bool:
    """Whether a node lies behind another, on the same path."""
    while node.depth > other.depth and node.parent is not None:
        node = node.parent
        if node is other:
            return True
    return False
