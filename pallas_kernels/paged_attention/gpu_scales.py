"""Scales and zeros of quantised pages in a GPU's shared memory: how those of a block of 64 tokens lie there, come
there, and are read.

    by token                     [64]
    by groups of channels        [groups, 64]; of several short pages [entries * groups * page], each as it came
    by channel                   [entries, D]"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import SHARED, Quantised, Scheme, Stored, arrays_of
from pallas_kernels.paged_attention.plan import BLOCK_LEN

LEAST_GROUP = 32
"""Channels of a group: half the rows of a product, or a multiple."""
COPY_BYTES = 128
"""What copies in shared memory begin at multiples of."""


def refusal(schemes: tuple[Scheme, Scheme], head_dims: tuple[int, int], page_size: int) -> str | None:
    """Why pages in such schemes, of which format and `per` do not say all, cannot be read; None: they can."""
    keys, values = schemes
    if keys.per != "channel" or values.per != "token":
        return f"keys by {keys.per}, values by {values.per}: must be by channel and by token, or both plain and alike"
    if values.group is not None and values.group % LEAST_GROUP:
        return f"group = {values.group}: must be a multiple of {LEAST_GROUP} channels"
    page_len = min(page_size, BLOCK_LEN)
    num_groups = 1 if values.group is None else head_dims[1] // values.group
    if num_groups * page_len * jnp.dtype(values.scale_dtype).itemsize % COPY_BYTES:
        return f"page_size = {page_size}: scales of a token in {values.scale_dtype} are no {COPY_BYTES} bytes"
    return None


def place_shape(scheme: Scheme, width: int, block_pages: int) -> tuple[int, ...]:
    """Of the scales of a block, whose keys or values are `width` wide."""
    if scheme.per == "channel":
        return (block_pages, width)
    if scheme.group is None:
        return (BLOCK_LEN,)
    num_groups = width // scheme.group
    return (num_groups, BLOCK_LEN) if block_pages == 1 else (num_groups * BLOCK_LEN,)


def place_bytes(scheme: Scheme, width: int, block_pages: int) -> int:
    """Of the scales of a block; as many are those of its zeros, if it has some."""
    return math.prod(place_shape(scheme, width, block_pages)) * jnp.dtype(scheme.scale_dtype).itemsize


def for_copies(pool: Stored) -> list[Array]:
    """The arrays behind a pool, as pages of them are copied: scales of several groups of a short page in one row."""
    arrays = arrays_of(pool)
    if isinstance(pool, Quantised) and pool.group is not None and pool.shape[2] < BLOCK_LEN:
        return [arrays[0], *(array.reshape(*array.shape[:2], -1) for array in arrays[1:])]
    return arrays


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
    elif len(kept.shape) == 2:
        mine, into = pool.at[page, head, pl.ds(0, kept.shape[0]), slots], kept
    else:
        size = pool.shape[2]
        mine, into = pool.at[page, head], kept.at[pl.ds(entry * size, size)]
    plgpu.copy_gmem_to_smem(mine, into, barrier)


def of_tokens(scheme: Scheme, kept: Any, group: int, page_size: int, layout: Any) -> Array:
    """[64]: of each token, for a group of its channels, in float32. `kept` is a place."""
    if scheme.group is None:
        return plgpu.load(kept, layout=layout).astype(jnp.float32)
    if len(kept.shape) == 2:
        return plgpu.load(kept.at[group], layout=layout).astype(jnp.float32)
    num_groups = kept.shape[0] // BLOCK_LEN
    found = None
    for entry in range(BLOCK_LEN // page_size):
        # From where the entry's tokens would begin, were there none before them: what lies there is not taken.
        begin = ((num_groups - 1) * entry + group) * page_size
        mine = plgpu.load(kept.at[pl.ds(begin, BLOCK_LEN)], layout=layout).astype(jnp.float32)
        slots = plgpu.broadcasted_iota(jnp.int32, (BLOCK_LEN,), 0, layout=layout)
        found = mine if found is None else jnp.where(slots >= entry * page_size, mine, found)
    assert found is not None
    return found
