"""Counts what a compiled program launches on a GPU. Needs no GPU, no compiler and no jax: it reads XLA's optimised
HLO."""

import re
from collections import Counter
from typing import Any

NOTHING = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
"""Operations that launch nothing: names for what is there."""
WAITS = {"all-reduce-done", "all-gather-done", "collective-permute-done", "copy-done", "async-done", "async-update"}
"""The other half of a launch that was counted where it began."""
OPENS = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


def count_launches(hlo_text: str) -> Counter[str]:
    """Launches of an optimised HLO module by kind: kernels ("fusion", "custom-call" and the like) and copies ("copy").

    What a loop's body launches counts as often as the loop turns, where XLA knows how often (it then never asks the
    condition); else once, as "while of unknown length". Of a conditional's branches the longest counts. Raises
    ValueError where the text has no ENTRY computation."""
    bodies = _computations(hlo_text)
    if "ENTRY" not in bodies:
        raise ValueError(
            "hlo_text has no ENTRY computation: must be the text of an HLO module, as `compiled.as_text()`"
        )
    return _count(bodies, "ENTRY")


def launches(compiled: Any) -> int:
    """Kernels and copies that a call of a compiled program launches: `jax.jit(f).lower(...).compile()`."""
    return count_launches(compiled.as_text()).total()


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; the first to run is "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith(" ") and (opened := OPENS.match(line)):
            lines = found.setdefault("ENTRY" if opened[1] else opened[2], [])
        else:
            lines.append(line)
    return found


def _count(bodies: dict[str, list[str]], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for line in bodies[name]:
        if not (operation := OPERATION.match(line)) or (kind := operation[1]) in NOTHING | WAITS:
            continue
        if kind == "while":
            trips = TRIPS.search(line)
            inner = _count(bodies, _named(line, "body"))
            if trips is None:
                total["while of unknown length"] += inner.total()
                continue
            total += Counter({inner_kind: number * int(trips[1]) for inner_kind, number in inner.items()})
        elif kind == "call":
            total += _count(bodies, _named(line, "to_apply"))
        elif kind == "conditional":
            named = re.findall(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+))", line)
            branches = re.findall(r"[\w.\-]+", " ".join(many or single for many, single in named))
            total += max((_count(bodies, branch) for branch in branches), key=Counter.total)
        else:
            total[kind] += 1
    return total


def _named(line: str, attribute: str) -> str:
    """The computation that an operation's attribute names. Raises ValueError where there is none."""
    if not (found := re.search(rf"\b{attribute}=%?([\w.\-]+)", line)):
        raise ValueError(f"no {attribute}= in the HLO line {line.strip()[:120]!r}")
    return found[1]
