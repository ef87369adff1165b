"""Searches tile sizes on the device at hand, and remembers them for `pallas_kernels.tiles`.

python -m pallas_kernels.bench.tuning [--size tiny] [--json tiles.json]       # on the machine that is to be fast
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.bench.clock import Clock, is_accelerated
from pallas_kernels.bench.inputs import bucket_of, make_inputs
from pallas_kernels.bench.paged import Problem, ours, work_of
from pallas_kernels.bench.problems import PROBLEMS
from pallas_kernels.tiles import SPACES, cache_path, choices

GAIN = 1.05
"""How much faster than the constants a choice must be to be remembered: less is noise."""


def candidates(implementation: str) -> list[dict[str, int]]:
    """All choices of its space; the constants, as no choice at all, first."""
    space = SPACES[implementation]
    return [{}, *(dict(zip(space, values, strict=True)) for values in itertools.product(*space.values()))]


def search(
    implementation: str, seconds_of: Callable[[dict[str, int]], float]
) -> tuple[dict[str, int], dict[str, float]]:
    """The choice that takes least, or none where it gains too little on the constants; and what each took. One that
    cannot be compiled or run is left out."""
    taken: dict[str, float] = {}
    best, least, constants = {}, float("inf"), float("inf")
    for choice in candidates(implementation):
        try:
            seconds = seconds_of(choice)
        except Exception as error:  # more shared memory than there is, and the like
            if not choice:
                raise
            print(f"  {choice}: {str(error).splitlines()[0][:80]}")
            continue
        taken[json.dumps(choice)] = seconds
        if not choice:
            constants = seconds
        if seconds < least:
            best, least = choice, seconds
    return (best if least * GAIN <= constants else {}), taken


def remember(
    path: Path, implementation: str, of_bucket: str, choice: dict[str, int], version: str | None = None
) -> None:
    """Writes a choice into a file, whole or not at all; none is forgotten."""
    found = json.loads(json.dumps(choices(path)))
    of_device = found.setdefault(jax.devices()[0].device_kind, {}).setdefault(version or jax.__version__, {})
    of_device.setdefault(implementation, {}).pop(of_bucket, None)
    if choice:
        of_device[implementation][of_bucket] = choice
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    part.replace(path)


def main() -> int:
    """Searches the problems of the bench with the implementation that `None` takes."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench.tuning", description=description)
    parser.add_argument("--size", choices=tuple(PROBLEMS), help="default: full on an accelerator, tiny on a CPU")
    parser.add_argument("--json", type=Path, default=cache_path(), help=f"where to remember (default {cache_path()})")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each choice (default 5)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"rounds = {options.rounds}: must be at least 1")
    size = options.size or ("full" if is_accelerated() else "tiny")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {options.json}", flush=True)
    searched: set[str] = set()
    for problem in PROBLEMS[size]:
        if not isinstance(problem, Problem):
            continue
        inputs = make_inputs(problem)
        chosen, of_bucket = problem.implementations(inputs)[0], bucket_of(inputs)
        if chosen not in SPACES or of_bucket in searched:
            continue
        searched.add(of_bucket)

        def seconds_of(
            choice: dict[str, int], problem: Problem = problem, inputs: Any = inputs, chosen: str = chosen
        ) -> float:
            clock = Clock(work_of(ours(problem, inputs, chosen, choice), inputs))
            for _ in range(options.rounds):
                clock.sample()
            return clock.median_us * 1e-6

        choice, taken = search(chosen, seconds_of)
        remember(options.json, chosen, of_bucket, choice)
        constants = taken["{}"]
        gain, found = constants / taken[json.dumps(choice)], choice or "the constants"
        print(f"{chosen}, {of_bucket}: {found}, {constants * 1e6:.1f} us with those, {gain:.2f}x", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
