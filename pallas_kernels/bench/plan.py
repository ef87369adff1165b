"""What is run, in which order, for how long: the cheap and telling first."""

import importlib.util
import math
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pallas_kernels.bench.measure import sweep
from pallas_kernels.bench.paged import Problem
from pallas_kernels.bench.problems import EXPECTED_S, HEADLINE, PROBLEMS
from pallas_kernels.bench.runner import Piece
from pallas_kernels.bench.verify import cases

SHARES = {
    "named cases": 0.3,
    "ceilings": 0.36,
    "headline": 0.52,
    "problems": 0.84,
    "other peers, sweep": 0.9,
    "generated cases": 1.0,
}
"""Stages by name, in their order: each ends before this share of the budget is used up."""
CASE_S, START_S, SLOW_S = 60.0, 5.0, 40.0
"""Limit of a case; what any process needs at least on an accelerator; what a slow peer needs."""


@dataclass(frozen=True)
class Stage:
    """Pieces that run `workers` at once, and end before `share` of the budget is used up."""

    name: str
    pieces: tuple[Piece, ...]
    share: float
    workers: int = 1


def command(kind: str, name: str, options: Namespace) -> tuple[str, ...]:
    """Starts a piece."""
    numbers = f"--size={options.size}", f"--rounds={options.rounds}", f"--cases={options.cases}"
    return (sys.executable, "-m", "pallas_kernels.bench.piece", kind, name, *numbers)


def probe(options: Namespace) -> Piece:
    """What there is; run before the rest is planned."""
    return Piece("probe", "", command("probe", "", options), min(CASE_S, 0.5 * options.budget))


def stages(options: Namespace, platform: str) -> list[Stage]:
    """All of the bench, behind the probe: named cases, ceilings, the headline, other problems; then, where time is
    left, peers that no goal names, the sweep and slow peers; generated cases last. The last of those that are not left
    out may use up the budget."""
    is_full = options.size == "full"
    start_s = START_S if is_full else 0.5
    limit_s = max(45.0, min(300.0, 0.14 * options.budget))

    def timings(kind: str, problems: Iterable[Any], least_s: float = 0.0) -> tuple[Piece, ...]:
        return tuple(
            Piece(
                kind,
                problem.name,
                command(kind, problem.name, options),
                limit_s,
                (least_s or EXPECTED_S.get(problem.name, 2 * start_s)) if is_full else start_s,
            )
            for problem in problems
        )

    checked = [(op, name) for op, name, _ in cases(platform, options.cases)]
    generated, named = (
        tuple(
            Piece("case", f"{op}: {name}", command("case", f"{op}: {name}", options), CASE_S, start_s)
            for op, name in checked
            if name.startswith("generated") == is_generated
        )
        for is_generated in (True, False)
    )
    problems = chosen(options)
    first = [problem for problem in problems if problem.name == HEADLINE[options.size]]
    rest = [problem for problem in problems if problem not in first]
    paged = [problem for problem in problems if isinstance(problem, Problem)]
    spare = timings("beside", [problem for problem in paged if problem not in first], 2 * start_s)
    if not options.only:
        drawn = timings("sweep", sweep(options.size), 2 * start_s)
        spare = drawn + spare if options.plot else spare + drawn
    if importlib.util.find_spec("torch"):
        spare += timings("slow", paged, SLOW_S)
    limits = (Piece("ceilings", "", command("ceilings", "", options), limit_s, start_s),)
    pieces = named, limits, timings("problem", first), timings("problem", rest), spare, generated
    found = [
        Stage(name, mine, share, options.workers if name.endswith("cases") else 1)
        for (name, share), mine in zip(SHARES.items(), pieces, strict=True)
    ]
    kept = [stage for stage in found if stage.pieces and stage.name not in options.leave_out]
    return [*kept[:-1], *(replace(stage, share=1.0) for stage in kept[-1:])]


def chosen(options: Namespace) -> list[Any]:
    """The problems whose name has the text of `only`, in the order of value a second."""
    order = {name: number for number, name in enumerate(EXPECTED_S)}
    problems = [problem for problem in PROBLEMS[options.size] if options.only in problem.name]
    return sorted(problems, key=lambda problem: order.get(problem.name, math.inf))
