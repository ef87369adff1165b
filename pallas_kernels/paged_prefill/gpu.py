"""Chunks on GPUs: the kernel of `paged_attention.gpu` with tiles of 128 rows where it can have them.

A chunk is bound by products, and by pages that every tile reads anew from the cache of the second level: with twice the rows a
tile they are read half as often. Two warpgroups attend over the same pages; a third that only copies would leave each of them
168 registers, and they take over 200.
"""

from typing import Any

from jax import Array

from pallas_kernels.formats import Quantised, format_of
from pallas_kernels.paged_attention import gpu
from pallas_kernels.paged_attention.gpu import refusal
from pallas_kernels.paged_attention.gpu_tiles import fit
from pallas_kernels.paged_prefill.reference import by_positions
from pallas_kernels.tensor_cores import ROWS, this_chip

__all__ = ["paged_prefill", "refusal"]


def _in_tiles(queries: Array, key_pages: Any, value_pages: Any, *arrays: Any, **options: Any) -> tuple[Array, ...]:
    chip = options.get("chip") or this_chip()
    rows = queries.shape[1] * queries.shape[2] // key_pages.shape[1]
    is_wide = chip == "hopper" and rows > ROWS and not isinstance(key_pages, Quantised)
    if is_wide:
        *_, page_size, dim = key_pages.shape
        tiles = fit(
            dim,
            value_pages.shape[3],
            format_of(key_pages),
            num_consumers=2,
            page_size=page_size,
            max_stages=options.get("max_stages") or gpu.MAX_STAGES,
            with_page_mass=options.get("with_page_mass", False),
        )
        is_wide = tiles.num_stages >= 2
    return gpu.in_tiles(queries, key_pages, value_pages, *arrays, num_consumers=2 if is_wide else 1, **options)


paged_prefill = by_positions(_in_tiles)
