"""Tile sizes: a small search on the device at hand, remembered as JSON by device, jax version and shape bucket.

    python -m pallas_kernels.tuning [--size tiny] [--json tiles.json]       # on the machine that is to be fast

What a search has found is looked up wherever a kernel is traced: first in the file that PALLAS_KERNELS_TILES names
(~/.cache/pallas_kernels/tiles.json, if it names none), for this jax; then in `tiles.json` beside this module, which is committed,
for any. Where neither has the bucket, an implementation's own constants hold.
"""

import argparse
import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

SPACES: dict[str, dict[str, Sequence[int]]] = {
    "mosaic_gpu": {"num_pieces": (132, 264, 528), "max_stages": (3, 4, 8)},
    "mosaic_tpu": {"block_len": (256, 512, 1024), "max_rows": (256, 512, 1024)},
    "blocked": {"block_len": (128, 256, 512)},
}
"""What may be chosen for an implementation of paged attention, as keyword arguments; the constants of its module among them."""
GAIN = 1.05
"""How much faster than the constants a choice must be to be remembered: less is noise."""
COMMITTED = Path(__file__).with_name("tiles.json")


def cache_path() -> Path:
    """Where what is found here is kept."""
    named = os.environ.get("PALLAS_KERNELS_TILES")
    return Path(named) if named else Path.home() / ".cache" / "pallas_kernels" / "tiles.json"


def bucket(
    op: str, format: str, per: str, dims: tuple[int, int], group: int, page_size: int, sizes: Sequence[int]
) -> str:
    """The shapes that share a choice: `sizes` (sequences, queries, listed tokens) count up to the next power of two."""
    batch, num_queries, num_tokens = (1 << (size - 1).bit_length() for size in sizes)
    scaled = f"{format} by {per}" if per else format
    return f"{op}, {scaled}, dims {dims[0]} and {dims[1]}, group {group}, pages of {page_size}: {batch} x {num_queries} on {num_tokens}"


@functools.cache
def _read(path: Path, _changed: int) -> Mapping[str, Any]:
    """A file of choices. Raises ValueError for one that is none."""
    try:
        found = json.loads(path.read_text())
        for of_device in found.values():
            for of_implementation in of_device.values():
                for name, choices in of_implementation.items():
                    for choice in choices.values():
                        if name not in SPACES or not set(choice) <= set(SPACES[name]):
                            raise ValueError(f"{name}: {choice} must choose of {SPACES.get(name)}")
                        if not all(isinstance(value, int) and value > 0 for value in choice.values()):
                            raise ValueError(f"{name}: {choice} must be of positive whole numbers")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: not a file of tile sizes ({error}); delete it, or set PALLAS_KERNELS_TILES"
        ) from None
    return found


def _choices(path: Path) -> Mapping[str, Any]:
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError:
        return {}


def lookup(implementation: str, of_bucket: str) -> dict[str, int]:
    """The tile sizes for a bucket on this process' first device: keyword arguments; none where nothing is remembered. Warns of a
    cache that cannot be read."""
    device = jax.devices()[0].device_kind
    try:
        found_here = _choices(cache_path())
    except ValueError as error:  # what was found can be found again: nobody is to stop for it
        warnings.warn(str(error), stacklevel=2)
        found_here = {}
    mine = found_here.get(device, {}).get(jax.__version__, {})
    committed = _choices(COMMITTED).get(device, {}).get("any", {})
    for choices in (mine, committed):
        if found := choices.get(implementation, {}).get(of_bucket):
            return dict(found)
    return {}


def check_tiles(implementation: str, tiles: Mapping[str, int]) -> None:
    """Raises ValueError for tile sizes that an implementation does not have, or that are none."""
    legal = SPACES.get(implementation, {})
    for name, value in tiles.items():
        if name not in legal or not isinstance(value, int) or value < 1:
            said = f"must be positive whole numbers for {', '.join(legal)}" if legal else "it has none"
            raise ValueError(f"tiles = {dict(tiles)} of {implementation}: {said}")


def candidates(implementation: str) -> list[dict[str, int]]:
    """All choices of its space; the constants, as no choice at all, first."""
    space = SPACES[implementation]
    return [{}, *(dict(zip(space, values, strict=True)) for values in itertools.product(*space.values()))]


def search(
    implementation: str, seconds_of: Callable[[dict[str, int]], float]
) -> tuple[dict[str, int], dict[str, float]]:
    """The choice that takes least, or none where it gains too little on the constants; and what each took. One that cannot be
    compiled or run is left out."""
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
    found = json.loads(json.dumps(_choices(path)))
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
    from pallas_kernels.bench.clock import Clock, is_accelerated
    from pallas_kernels.bench.paged import Problem, bucket_of, make_inputs, ours, work_of
    from pallas_kernels.bench.problems import PROBLEMS

    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tuning", description=description)
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
        chosen, of_bucket = problem.implementations(inputs)[0], bucket_of(problem, inputs)
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
