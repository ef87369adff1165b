"""Tile sizes that a search found best (`bench.tuning`), looked up wherever a kernel is traced.

First in the file that PALLAS_KERNELS_TILES names (~/.cache/pallas_kernels/tiles.json, if it names none), for this jax;
then in `tiles.json` beside this module, which is committed, for any. Where neither has the bucket, an implementation's
own constants hold."""

import functools
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

SPACES: dict[str, dict[str, Sequence[int]]] = {
    "mosaic_gpu": {"num_pieces": (132, 264, 528), "max_stages": (3, 4, 8)},
    "mosaic_tpu": {"block_len": (256, 512, 1024), "max_rows": (256, 512, 1024)},
    "blocked": {"block_len": (128, 256, 512)},
}
"""What may be chosen for an implementation of paged attention, as keyword arguments; the constants of its module among
them."""
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
    asked = f"{op}, {scaled}, dims {dims[0]} and {dims[1]}, group {group}, pages of {page_size}"
    return f"{asked}: {batch} x {num_queries} on {num_tokens}"


@functools.cache
def _read(path: Path, _changed: int) -> Mapping[str, Any]:
    """A file of choices. Raises ValueError for one that is none."""
    try:
        found = json.loads(path.read_text())
        for of_device in found.values():
            for of_implementation in of_device.values():
                for name, by_bucket in of_implementation.items():
                    for choice in by_bucket.values():
                        if name not in SPACES or not set(choice) <= set(SPACES[name]):
                            raise ValueError(f"{name}: {choice} must choose of {SPACES.get(name)}")
                        if not all(isinstance(value, int) and value > 0 for value in choice.values()):
                            raise ValueError(f"{name}: {choice} must be of positive whole numbers")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: not a file of tile sizes ({error}); delete it, or set PALLAS_KERNELS_TILES"
        ) from None
    return found


def choices(path: Path) -> Mapping[str, Any]:
    """A file of choices, by device, jax version, implementation and bucket; empty where there is none. Raises
    ValueError for one that is no such file."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError:
        return {}


def lookup(implementation: str, of_bucket: str) -> dict[str, int]:
    """The tile sizes for a bucket on this process' first device: keyword arguments; none where nothing is remembered.
    Warns of a cache that cannot be read."""
    device = jax.devices()[0].device_kind
    try:
        found_here = choices(cache_path())
    except ValueError as error:  # what was found can be found again: nobody is to stop for it
        warnings.warn(str(error), stacklevel=2)
        found_here = {}
    mine = found_here.get(device, {}).get(jax.__version__, {})
    committed = choices(COMMITTED).get(device, {}).get("any", {})
    for known in (mine, committed):
        if found := known.get(implementation, {}).get(of_bucket):
            return dict(found)
    return {}


def check_tiles(implementation: str, tiles: Mapping[str, int]) -> None:
    """Raises ValueError for tile sizes that an implementation does not have, or that are none."""
    legal = SPACES.get(implementation, {})
    for name, value in tiles.items():
        if name not in legal or not isinstance(value, int) or value < 1:
            said = f"must be positive whole numbers for {', '.join(legal)}" if legal else "it has none"
            raise ValueError(f"tiles = {dict(tiles)} of {implementation}: {said}")
