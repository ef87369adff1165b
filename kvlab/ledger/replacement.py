"""Which cached page goes first. A policy is one priority function; two of them also keep segments.

    order(page)    lowest goes first: the whole of most policies
    pick(sizes)    which segment gives the next victim, if it has one; one segment unless said otherwise
    spare(page)    a second chance: True if the victim was moved to another place instead

The index asks only about pages that nobody but itself holds, and, where a state needs its whole prefix, that no longer
cached prefix builds on: an ancestor is never evicted before its descendants. Ties go to the deeper page, then to the
older.
"""

import abc
import bisect
import math
from collections.abc import Callable, Mapping, Sequence

from kvlab.ledger.trie import CachedPage
from kvlab.registry import Registry

type Order = tuple[int | float, ...]


class Policy(abc.ABC):
    """What a policy may override. The index sets `clock` (events) and `num_lookups` (requests) before it asks."""

    def __init__(self, capacity: int):
        """`capacity` is the pages of the pool, which segments are measured against."""
        self.capacity = capacity
        self.clock = self.num_lookups = 0

    @abc.abstractmethod
    def order(self, page: CachedPage) -> Order:
        """The priority, as a tuple of numbers: the lowest goes first. Fixed while nobody uses the page."""

    def used(self, page: CachedPage) -> None:  # noqa: B027  most policies need not know
        """A page was published (`page.uses` is 1), or another sequence found it (the count includes it)."""

    def pick(self, sizes: Sequence[int]) -> int:
        """The segment to evict from, given the cached pages of each; the other one serves where it has none to
        evict."""
        return 0

    def spare(self, page: CachedPage) -> bool:
        """Whether the victim moved elsewhere (its `segment` or its order changed) rather than being evicted."""
        return False

    def evicted(self, page: CachedPage) -> None:  # noqa: B027  most policies need not know
        """A page was evicted."""


class LRU(Policy):
    """Least recently used: by the last time a sequence let go of the page or found it."""

    def order(self, page: CachedPage) -> Order:
        return (page.last_used,)


class FIFO(Policy):
    """First in, first out."""

    def order(self, page: CachedPage) -> Order:
        return (page.created,)


class LFU(Policy):
    """Least frequently used, then least recently."""

    def order(self, page: CachedPage) -> Order:
        return (page.uses, page.last_used)


class SLRU(Policy):
    """Segmented LRU (Karedla, Love and Wherry, 1994): used once is on probation, used again is protected.

    When the protected segment exceeds its share of the evictable pages, its oldest goes back on probation.
    """

    protected_share = 0.8

    def order(self, page: CachedPage) -> Order:
        return (page.last_used,)

    def used(self, page: CachedPage) -> None:
        page.segment = int(page.uses > 1)

    def pick(self, sizes: Sequence[int]) -> int:
        probation, protected = sizes
        return int(not probation or protected > self.protected_share * self.capacity)

    def spare(self, page: CachedPage) -> bool:
        if page.segment == 0:
            return False
        page.segment, page.last_used = 0, self.clock
        return True


class S3FIFO(Policy):
    """Three queues (Yang et al., SOSP 2023): a small one filters what is used once, a main one gives second chances,
    and a ghost queue remembers what left the small one, so that it returns to the main one."""

    small_share = 0.1

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._ghosts: dict[bytes, None] = {}

    def order(self, page: CachedPage) -> Order:
        return (page.created,)  # the time it entered its queue

    def used(self, page: CachedPage) -> None:
        if page.uses == 1:
            page.segment = int(page.key in self._ghosts)
            self._ghosts.pop(page.key, None)
        else:
            page.credit = min(page.credit + 1, 3)

    def pick(self, sizes: Sequence[int]) -> int:
        small, main = sizes
        return int(not small or (main > 0 and small < self.small_share * self.capacity))

    def spare(self, page: CachedPage) -> bool:
        if not page.credit:
            return False
        page.credit = 0 if page.segment == 0 else page.credit - 1
        page.segment, page.created = 1, self.clock
        return True

    def evicted(self, page: CachedPage) -> None:
        if page.segment == 0:
            self._ghosts[page.key] = None
            if len(self._ghosts) > self.capacity:
                del self._ghosts[next(iter(self._ghosts))]


class CostAware(Policy):
    """FLOPs saved per byte, aged as in GreedyDual-Size-Frequency (Cherkasova, 1998); Marconi (arXiv 2411.19379) for
    hybrids.

    Recomputing the token at position p costs `linear + quadratic * p` FLOPs: a page deep in a sequence is dearer than
    an early one, and a recurrent state, which replaces all tokens since the last one, dearer still.
    """

    linear, quadratic = 1.0, 1e-4

    age = 0.0

    def order(self, page: CachedPage) -> Order:
        return (page.credit,)

    def used(self, page: CachedPage) -> None:
        start, end = page.start, page.end
        flops = self.linear * (end - start) + self.quadratic * (end * end - start * start) / 2
        page.credit = self.age + page.uses * flops / page.num_bytes

    def evicted(self, page: CachedPage) -> None:
        self.age = max(self.age, page.credit)


class Belady(Policy):
    """The offline optimum (Belady, 1966): what is needed farthest in the future goes first. Made by `belady`."""

    def __init__(self, capacity: int, uses: Mapping[bytes, Sequence[int]]):
        """`uses`: for each page key, the ascending lookup numbers (from 1) that will ask for it."""
        super().__init__(capacity)
        self._uses = uses

    def order(self, page: CachedPage) -> Order:
        times = self._uses.get(page.key, ())
        later = bisect.bisect_right(times, self.num_lookups)
        return (-times[later],) if later < len(times) else (-math.inf,)


def belady(uses: Mapping[bytes, Sequence[int]]) -> Callable[[int], Policy]:
    """A factory for `Ledger(policy=...)` that knows the future of one trace; keys come from `tokens.page_keys`."""
    return lambda capacity: Belady(capacity, uses)


OURS: dict[str, Callable[[int], Policy]] = {
    "lru": LRU,
    "fifo": FIFO,
    "lfu": LFU,
    "slru": SLRU,
    "s3fifo": S3FIFO,
    "cost_aware": CostAware,
}
POLICIES = Registry[Callable[[int], Policy]]("kvlab.policies", Policy, OURS, field="policy")
"""Policies that need no knowledge of the future, by name."""
