"""One piece of the bench, a process of its own: it prints what it knows as JSON, a line after every step; the last one
is its answer.

python -m pallas_kernels.bench.piece KIND [NAME] --size full [--rounds 9] [--cases 40]
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from pallas_kernels.bench.clock import ceilings
from pallas_kernels.bench.goals import Result
from pallas_kernels.bench.measure import measure, sweep
from pallas_kernels.bench.paged import PLANNED
from pallas_kernels.bench.peers import SLOW
from pallas_kernels.bench.probe import probe
from pallas_kernels.bench.problems import HEADLINE, PROBLEMS
from pallas_kernels.bench.record import finite
from pallas_kernels.bench.verify import check


def case(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case of correctness, named "op: case"."""
    op, _, name = options.name.partition(": ")
    return check(op, name, options.cases)


def timed(options: argparse.Namespace) -> None:
    """One problem. "problem" is our kernel and whoever its goals name; of the headline all of ours, and every peer but
    the slow ones. "beside" is our first, the rest of ours and the other peers, "slow" our first and the slow peers."""
    problem = next(candidate for candidate in PROBLEMS[options.size] if candidate.name == options.name)
    is_headline = problem.name == HEADLINE[options.size]

    def chosen(names: list[str]) -> list[str]:
        kernel = names[0].removesuffix(PLANNED)
        of_kernel = {name for name in names if name.removesuffix(PLANNED).endswith(kernel)}
        main = set(names) if is_headline else of_kernel | {name for name, _ in problem.goals.faster_than}
        if options.kind == "problem":
            wanted = main - set(SLOW)
        elif options.kind == "slow":
            wanted = {names[0], *SLOW}
        else:
            wanted = {names[0], *set(names).difference(main, SLOW)}
        return [name for name in names if name in wanted]

    print_result(measure(problem, options.rounds, chosen=chosen, without=dict(options.without), tell=print_result))


def point(options: argparse.Namespace) -> None:
    """One point of the sweep: what `None` chooses, alone."""
    problem = next(candidate for candidate in sweep(options.size) if candidate.name == options.name)
    print_result(measure(problem, options.rounds, alone=True, tell=print_result))


def print_result(result: Result) -> None:
    """All but what follows from the ceilings, which another piece measures."""
    found = asdict(result)
    del found["floor_us"]
    print_answer(_without_goals(found))


def _without_goals(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_goals(value) if isinstance(value, dict) else value
        for name, value in found.items()
        if name != "goals"
    }


def print_answer(found: dict[str, Any]) -> None:
    """A line for the runner."""
    print(json.dumps(finite(found)), flush=True)


KINDS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]] | None]] = {
    "probe": lambda options: probe(),
    "case": case,
    "ceilings": lambda options: ceilings(options.size),
    "problem": timed,
    "beside": timed,
    "slow": timed,
    "sweep": point,
}


def main() -> int:
    """Runs the piece."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench.piece")
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--size", choices=tuple(PROBLEMS), default="tiny")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument(
        "--without", nargs=2, action="append", default=[], metavar=("WHO", "WHY"), help="does not run, and why"
    )
    options = parser.parse_args()
    for answer in KINDS[options.kind](options) or ():
        print_answer(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
