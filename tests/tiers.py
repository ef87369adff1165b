"""Which test runs when. A test that no row names is fast: it belongs to `make test`.

* `fast`: `make test`, 4 minutes on two cores without any cache. No child processes, no sweeps in simulators; of every kernel and
  backend one case.
* `ci`: `.ci/run` after `make test`. Child processes, what the simulators must prove, runs that train.
* `slow`: only `make test-all`, which runs all three.
* `generated`: the generated cases of the kernels' proofs. `make test-generated`, about an hour.

A row stands for every test whose id begins with it; of several rows the longest counts. A test's own marker counts as well.
"""

from collections.abc import Iterable, Mapping
from typing import Any

TIER_OF: dict[str, str] = {"tests/test_walls.py": "ci"}


def mark(items: Iterable[Any], tier_of: Mapping[str, str]) -> list[str]:
    """Marks collected tests with their tiers; returns the rows that stand for none of them."""
    unused, rows = set(tier_of), sorted(tier_of, key=len)
    for item in items:
        matching = [row for row in rows if item.nodeid.startswith(row)]
        unused.difference_update(matching)
        if matching and (tier := tier_of[matching[-1]]) != "fast":
            item.add_marker(tier)
    return sorted(unused)
