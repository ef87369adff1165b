"""Chunks on GPUs: the kernel of `paged_attention.gpu_tiled` with tiles of 128 rows where it can have them.

A chunk is bound by products, and by pages that every tile reads anew from the cache of the second level: with twice the rows a
tile they are read half as often. See `paged_attention.gpu_chunk`.
"""

from typing import Any

from jax import Array

from pallas_kernels.formats import Quantised, format_of
from pallas_kernels.paged_attention.gpu import refusal
from pallas_kernels.paged_attention.gpu_tiled import in_tiles
from pallas_kernels.paged_attention.gpu_tiles import COLUMNS, MAX_STAGES, fit
from pallas_kernels.paged_prefill.reference import by_positions
from pallas_kernels.tensor_cores import ROWS, this_chip

__all__ = ["paged_prefill", "refusal"]


NARROW = 64
"""Most dims of values that two warpgroups attend to with page mass or valid slots: beyond, the registers of jax 0.12 do not suffice."""


def _in_tiles(queries: Array, key_pages: Any, value_pages: Any, *arrays: Any, **options: Any) -> tuple[Array, ...]:
    chip = options.get("chip") or this_chip()
    rows = queries.shape[1] * queries.shape[2] // key_pages.shape[1]
    *_, page_size, dim = key_pages.shape
    # Wider values than are multiplied at once would not fit into registers: they are held while the next scores are there.
    asks_more = options.get("with_page_mass", False) or options.get("valid_slots") is not None
    is_wide = chip == "hopper" and rows > ROWS and value_pages.shape[3] <= (NARROW if asks_more else COLUMNS)
    is_wide = is_wide and not isinstance(key_pages, Quantised)
    if is_wide:
        tiles = fit(
            dim,
            value_pages.shape[3],
            format_of(key_pages),
            num_consumers=2,
            page_size=page_size,
            max_stages=options.get("max_stages") or MAX_STAGES,
            with_page_mass=options.get("with_page_mass", False),
        )
        is_wide = tiles.num_stages >= 2
    return in_tiles(queries, key_pages, value_pages, *arrays, num_consumers=2 if is_wide else 1, **options)


paged_prefill = by_positions(_in_tiles)
