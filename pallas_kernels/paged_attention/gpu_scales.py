"""Scales and zeros of quantised pages in a GPU's shared memory: how those of a block of 64 tokens lie there, come
there, and are read.

    by token                     [64]
    by groups of channels        [groups, 64], of whole pages
    by channel                   [entries, D]"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import SHARED, Scheme
from pallas_kernels.paged_attention.plan import BLOCK_LEN

LEAST_GROUP = 32
"""Channels of a group: half the rows of a product, or a multiple."""
COPY_BYTES = 128
"""What copies in shared memory begin at multiples of."""


def refusal(schemes: tuple[Scheme, Scheme], page_size: int) -> str | None:
    """Why pages in such schemes, of which format and `per` do not say all, cannot be read; None: they can."""
    keys, values = schemes
    if keys.per != "channel" or values.per != "token":
        return f"keys by {keys.per}, values by {values.per}: must be by channel and by token, or both plain and alike"
    if values.group is not None and values.group % LEAST_GROUP:
        return f"group = {values.group}: must be a multiple of {LEAST_GROUP} channels"
    if values.group is not None and page_size % BLOCK_LEN:  # Mosaic finds no layouts for parts of a block in minutes
        return f"page_size = {page_size}: must be a multiple of {BLOCK_LEN}, where groups of channels have scales"
    if min(page_size, BLOCK_LEN) * jnp.dtype(values.scale_dtype).itemsize % COPY_BYTES:
        return f"page_size = {page_size}: scales of its tokens in {values.scale_dtype} are no {COPY_BYTES} bytes"
    return None


def place_shape(scheme: Scheme, width: int, block_pages: int) -> tuple[int, ...]:
    """Of the scales of a block, whose keys or values are `width` wide."""
    if scheme.per == "channel":
        return (block_pages, width)
    return (BLOCK_LEN,) if scheme.group is None else (width // scheme.group, BLOCK_LEN)


def place_bytes(scheme: Scheme, width: int, block_pages: int) -> int:
    """Of the scales of a block; as many are those of its zeros, if it has some."""
    return math.prod(place_shape(scheme, width, block_pages)) * jnp.dtype(scheme.scale_dtype).itemsize


def step_of(width: int, scheme: Scheme, most: int = 64) -> int:
    """Columns of a block that are turned into 16 bits at once: of a part of its bytes, and of one group."""
    part = width // SHARED.get(scheme.format, 1)
    return math.gcd(part, min(most, 32 if width > 128 else 64, scheme.group or BLOCK_LEN))


def copy(scheme: Scheme, pool: Any, kept: Any, page: Any, head: Any, slots: Any, entry: int, barrier: Any) -> None:
    """Asks for the scales, or the zeros, of a page's slots, the block's entry of that number."""
    if scheme.per == "channel":
        mine, into = pool.at[page, head, pl.ds(0, kept.shape[1])], kept.at[entry]
    elif scheme.group is None:
        mine, into = pool.at[page, head, slots], kept.at[pl.ds(entry * slots.size, slots.size)]
    else:
        mine, into = pool.at[page, head, pl.ds(0, kept.shape[0]), slots], kept
    plgpu.copy_gmem_to_smem(mine, into, barrier)


def of_tokens(scheme: Scheme, kept: Any, group: int, layout: Any) -> Array:
    """[64]: of each token, for a group of its channels, in float32. `kept` is a place."""
    return plgpu.load(kept if scheme.group is None else kept.at[group], layout=layout).astype(jnp.float32)
