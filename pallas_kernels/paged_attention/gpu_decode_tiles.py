"""How the GPU kernel that decodes lays out a thread block's shared memory."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import FORMATS, Scaling
from pallas_kernels.paged_attention.gpu_tiles import MAX_BARRIERS, MAX_STAGES, SHARED_BYTES
from pallas_kernels.paged_attention.plan import BLOCK_LEN
from pallas_kernels.pages import Pages
from pallas_kernels.tensor_cores import shared

HALF_BYTES = (113 - 3) * 1024
"""Shared memory of a thread block that shares its multiprocessor with another, but for what Mosaic takes;
`SHARED_BYTES` of one that does not."""
LEAST_STAGES = 2
"""Of a thread block that shares its multiprocessor: two rings together hide a copy's latency."""
PARTS = 3
"""Numbers of bfloat16 that a float32 is the sum of: queries times the scales of channels."""
OUT_SIZE = 4096
"""Most numbers of a product's outputs, or of its share of the outputs of both halves of the weights: 32 registers a
thread."""


@dataclass(frozen=True)
class Tiles:
    """How a thread block's shared memory is laid out: stages of the ring, staged blocks of 16 bits (0: the ring itself
    is multiplied), and all bytes but those of barriers. No stages: it does not fit."""

    num_stages: int
    num_staged: int
    num_bytes: int


def aligned(num_columns: int) -> int:
    """Float32 numbers from one row to the next where rows are copied alone: copies begin at multiples of 128 bytes."""
    return -(-num_columns // 32) * 32


def stripe_of(value_dim: int, num_columns: int) -> int:
    """Dims of values that are multiplied at once: a multiple of 64."""
    return next(
        width
        for width in range(value_dim, 0, -64)
        if value_dim % width == 0 and (width * num_columns <= OUT_SIZE or width == 64)
    )


def fit(
    dims: tuple[int, int],
    format: str,
    per: Scaling,
    num_columns: int,
    page_size: int,
    max_stages: int = MAX_STAGES,
    *,
    with_page_mass: bool = True,
) -> Tiles:
    """The deepest ring of at most `max_stages` with which two thread blocks fit on a multiprocessor, or else one."""
    block_pages = max(1, BLOCK_LEN // page_size)
    most = min(max_stages, MAX_BARRIERS // block_pages)  # a page has a barrier of its own
    for limit, least in ((HALF_BYTES, min(most, LEAST_STAGES)), (SHARED_BYTES, 1)):
        for num_staged in (2, 1) if format in FORMATS else (0,):
            for num_stages in range(most, least - 1, -1):
                sizes = scratch_bytes(
                    dims, format, per, num_columns, block_pages, num_stages, num_staged, with_page_mass=with_page_mass
                )
                if sizes <= limit:
                    return Tiles(num_stages, num_staged, sizes)
    return Tiles(0, 0, 0)


def scratch_bytes(
    dims: tuple[int, int],
    format: str,
    per: Scaling,
    num_columns: int,
    block_pages: int,
    num_stages: int,
    num_staged: int,
    *,
    with_page_mass: bool,
) -> int:
    """Bytes of all that `scratch_for` asks for, each in whole KiB."""
    bits = {"int4": 4, "int8": 8, "fp8": 8}.get(format, 16)
    sizes = [num_stages * BLOCK_LEN * width * bits // 8 for width in dims]
    sizes += [2 * num_columns * BLOCK_LEN * 2, stripe_of(dims[1], num_columns) * num_columns * 4, num_columns * 4]
    if with_page_mass:
        sizes.append(block_pages * aligned(num_columns) * 4)
    if format in FORMATS:
        sizes += [num_staged * BLOCK_LEN * width * 2 for width in dims]
    if format in FORMATS and per == "channel":
        sizes += [(num_stages + num_staged) * block_pages * width * 4 for width in dims]
        sizes += [dims[0] * num_columns * 2, block_pages * PARTS * num_columns * dims[0] * 2]
    else:
        sizes.append(num_columns * dims[0] * 2)
        if format in FORMATS:
            sizes += 2 * [(num_stages + num_staged) * BLOCK_LEN * 4]
    return sum(-(-size // 1024) * 1024 for size in sizes)


def scratch_for(
    tiles: Tiles,
    pages: Pages,
    dtype: Any,
    of_rows: Any,
    num_columns: int,
    block_pages: int,
    *,
    with_page_mass: bool,
) -> dict[str, Any]:
    """What a thread block keeps in shared memory, by name. Products of keys are of type `dtype`, queries come in
    `of_rows`."""
    dims, depth, staged = pages.head_dims, tiles.num_stages, tiles.num_staged
    is_quantised, stripe = pages.per is not None, stripe_of(dims[1], num_columns)
    # Weights times scales may be of any size, which float16 could not hold; what is quantised is exact in both.
    of_weights = jnp.dtype(jnp.bfloat16) if is_quantised else dtype
    scratch = {
        "weights": shared((2 * num_columns, BLOCK_LEN), of_weights, step_of(dims[1], pages)),
        "sums_out": shared((stripe, num_columns), jnp.float32, num_columns),
        "lse_out": plgpu.SMEM((num_columns,), jnp.float32),
        "queries_arrived": plgpu.Barrier(),
    }
    num_arrivals = 2 if is_quantised else 1
    payload = pages.keys.dtype
    for name, width, of in (("keys", dims[0], dtype), ("values", dims[1], of_weights)):
        step = step_of(width, pages)
        ring = f"{name}_ring" if is_quantised else name
        halved = 2 if pages.format == "int4" else 1
        scratch[ring] = shared((depth, BLOCK_LEN, width // halved), payload, step)
        arrived = plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=depth * block_pages)
        scratch[f"{name}_arrived"] = arrived
        if is_quantised:
            of_scales = (BLOCK_LEN,) if pages.per == "token" else (block_pages, width)
            scratch[f"{name}_scales"] = plgpu.SMEM((depth + staged, *of_scales), jnp.float32)
            scratch[f"{name}_staged"] = plgpu.Barrier(num_barriers=staged)
            scratch[name] = shared((staged, BLOCK_LEN, width), of, step)
    scratch["free"] = plgpu.Barrier(num_barriers=staged or depth)
    if pages.per == "channel":
        scratch["queries"] = plgpu.SMEM((dims[0], num_columns), of_rows)
        scratch["scaled"] = shared((block_pages * PARTS * num_columns, dims[0]), dtype, step_of(dims[0], pages))
    else:
        scratch["queries"] = shared((num_columns, dims[0]), dtype, step_of(dims[0], pages))
    if with_page_mass:
        scratch["pages_out"] = plgpu.SMEM((block_pages, aligned(num_columns)), jnp.float32)
    return scratch


def step_of(width: int, pages: Pages) -> int:
    """Columns that are laid out together, in both factors of a product; of quantised pages, as many as are turned into
    16 bits at once, and no more than a page has slots where each page is multiplied apart."""
    if pages.per is None:
        return math.gcd(width, 64)
    most = min(pages.page_size, 64) if pages.per == "channel" else 64
    return math.gcd(width // 2 if pages.format == "int4" else width, min(most, 32 if width > 128 else 64))
