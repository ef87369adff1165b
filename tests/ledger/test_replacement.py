"""Every policy against its textbook, on prompts of one page each; Belady against an exhaustive search on shared
prefixes."""

import functools
import itertools
import random
from collections import OrderedDict, deque

import pytest

from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.replacement import POLICIES, CostAware, belady
from kvlab.ledger.states import TokenState
from kvlab.ledger.tokens import page_keys

SPEC = TokenState(1, 1, 1)


def make(policy, num_pages, page_size=1):
    return Ledger([StateClass("kv", SPEC, page_size, num_pages + 1, 64)], 64, 64, policy=policy)


def serve(ledger, prompt) -> int:
    """One request, alone, from lookup to release; returns its hit."""
    hit = ledger.lookup(prompt)
    found = hit.length
    assert ledger.reserve("r", len(prompt) - found, hit=hit).ready
    ledger.commit("r", len(prompt) - found)
    ledger.release("r")
    return found


# Textbook caches over keys, one page each: `get(key)` says whether it was there, and puts it there.


class Queue:
    """FIFO, or LRU when a hit moves the key to the end."""

    def __init__(self, size, moves):
        self.size, self.moves, self.keys = size, moves, OrderedDict()

    def get(self, key):
        if key in self.keys:
            if self.moves:
                self.keys.move_to_end(key)
            return True
        if len(self.keys) == self.size:
            self.keys.popitem(last=False)
        self.keys[key] = None
        return False


class Frequency:
    """LFU, ties to the least recently used."""

    def __init__(self, size):
        self.size, self.uses, self.last, self.time = size, {}, {}, 0

    def get(self, key):
        self.time += 1
        found = key in self.uses
        if not found and len(self.uses) == self.size:
            victim = min(self.uses, key=lambda k: (self.uses[k], self.last[k]))
            del self.uses[victim], self.last[victim]
        self.uses[key] = self.uses.get(key, 0) + 1
        self.last[key] = self.time
        return found


class Segmented:
    """SLRU: a hit protects; more than 80% protected are demoted when room is needed."""

    def __init__(self, size):
        self.size, self.probation, self.protected = size, OrderedDict(), OrderedDict()

    def get(self, key):
        found = key in self.probation or key in self.protected
        if not found and len(self.probation) + len(self.protected) == self.size:
            while len(self.protected) > 0.8 * (self.size + 1) or not self.probation:
                self.probation[self.protected.popitem(last=False)[0]] = None
            self.probation.popitem(last=False)
        self.probation.pop(key, None)
        self.protected.pop(key, None)
        (self.protected if found else self.probation)[key] = None
        return found


class Small:
    """S3-FIFO with a small queue of a tenth and as many ghosts as pages."""

    def __init__(self, size):
        self.size, self.small, self.main, self.ghosts, self.count = size, deque(), deque(), OrderedDict(), {}

    def get(self, key):
        if key in self.count:
            self.count[key] = min(self.count[key] + 1, 3)
            return True
        while len(self.count) == self.size:
            self.evict()
        queue = self.main if key in self.ghosts else self.small
        self.ghosts.pop(key, None)
        queue.append(key)
        self.count[key] = 0
        return False

    def evict(self):
        if self.small and (len(self.small) >= 0.1 * (self.size + 1) or not self.main):
            key = self.small.popleft()
            if self.count[key]:
                self.count[key] = 0
                self.main.append(key)
            else:
                del self.count[key]
                self.ghosts[key] = None
                if len(self.ghosts) > self.size + 1:
                    self.ghosts.popitem(last=False)
        else:
            key = self.main.popleft()
            if self.count[key]:
                self.count[key] -= 1
                self.main.append(key)
            else:
                del self.count[key]


TEXTBOOK = {
    "lru": lambda size: Queue(size, moves=True),
    "fifo": lambda size: Queue(size, moves=False),
    "lfu": Frequency,
    "slru": Segmented,
    "s3fifo": Small,
}


@pytest.mark.parametrize("policy", TEXTBOOK)
def test_every_policy_is_its_textbook(policy):
    """Prompts of one page and one token, which needs a page only while it is served: the cache has one page less."""
    for seed in range(6):
        rng = random.Random(seed)
        size = rng.randrange(3, 14)
        ledger, book = make(POLICIES[policy], size + 1, page_size=2), TEXTBOOK[policy](size)
        found, expected = [], []
        for _ in range(400):
            key = min(int(rng.paretovariate(0.7)), 60)
            found.append(serve(ledger, [key, key, 0]) > 0)
            expected.append(book.get(key))
        assert found == expected, (policy, seed)
        assert 0.05 < sum(found) / len(found) < 0.99


@pytest.mark.parametrize("policy", [*POLICIES, "belady"])
def test_nothing_beats_the_offline_optimum_and_the_optimum_is_reached(policy):
    """Requests over a tree of prefixes, pools of 3 and 4 pages: Belady finds as many tokens as any sequence of choices
    could, every other policy at most as many."""
    for seed in range(12):
        rng = random.Random(seed)
        prompts = [[rng.randrange(2) for _ in range(rng.randrange(2, 4))] for _ in range(9)]
        size = rng.choice([3, 4])
        uses: dict[bytes, list[int]] = {}
        for number, prompt in enumerate(prompts, 1):
            for key in page_keys(prompt, 1):
                uses.setdefault(key, []).append(number)
        ledger = make(belady(uses) if policy == "belady" else POLICIES[policy], size)
        found = sum(serve(ledger, prompt) for prompt in prompts)
        optimum = best(tuple(map(tuple, prompts)), size)
        assert found <= optimum
        if policy == "belady":
            assert found == optimum, (seed, prompts, size)


def best(prompts, size):
    """The most tokens that can be found again, by trying every set of pages to keep after every request."""

    @functools.cache
    def from_here(number, kept):
        if number == len(prompts):
            return 0
        prompt = prompts[number]
        found = 0
        while found < len(prompt) - 1 and prompt[: found + 1] in kept:
            found += 1
        own = {prompt[: end + 1] for end in range(len(prompt))}
        pool = set(kept) | own
        options = {frozenset(own)}
        for count in range(min(size, len(pool)) + 1):
            for chosen in itertools.combinations(sorted(pool), count):
                is_tree = all(prefix[:end] in chosen for prefix in chosen for end in range(1, len(prefix)))
                if is_tree and len(set(chosen) | own) <= size:  # it was kept beside the request while that ran
                    options.add(frozenset(chosen))
        return found + max(from_here(number + 1, option) for option in options)

    return from_here(0, frozenset())


def test_the_cost_aware_policy_keeps_what_is_dear():
    """Two prompts of one use each: the page deep in a sequence outlives the early one, and a state outlives a page."""
    page_size = 4
    ledger = Ledger([StateClass("kv", SPEC, page_size, 20, 64)], 64, 64, policy=CostAware)
    policy = ledger.index.policies[0]
    serve(ledger, list(range(40)))
    pages = sorted(ledger.index.cached[0].values(), key=lambda page: page.start)
    credits = [page.credit for page in pages]
    assert credits == sorted(credits)
    assert credits[0] < credits[-1]
    expected = (policy.linear * 4 + policy.quadratic * (4**2 - 0) / 2) / ledger.classes[0].page_bytes
    assert credits[0] == pytest.approx(expected)
    before = policy.age
    ledger.evict("kv", 1)
    assert policy.age > before


def test_belady_does_not_know_what_never_comes_again():
    ledger = make(belady({}), 3)
    serve(ledger, [1, 2, 3])
    assert ledger.evict("kv", 3) == 3
