"""Products of a warpgroup on tensor cores: `wgmma` on Hopper, `tcgen05` on Blackwell, 64 rows at a time, in the same
registers.

Blackwell accumulates in tensor memory. Half its lanes, which 64 rows take, are read back in the layout that Hopper's
accumulators have; so a kernel that keeps its sums in registers is the same on both, but for these lines."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64
"""Rows that a warpgroup multiplies at once."""

type Chip = Literal["hopper", "blackwell"]
type Add = Callable[..., None]
"""Adds a [rows, k] @ b [k, n], both in shared memory, to what is being summed; `first`: begins the sum anew."""


def this_chip() -> Chip:
    """That of the process' first device; Hopper where it is no GPU."""
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    return "blackwell" if capability.startswith("10") else "hopper"


def shared(shape: tuple[int, ...], dtype: Any, width: int, product_width: int | None = None) -> Any:
    """Shared memory in which columns lie together in groups that divide `width`. Both factors of a product must be
    alike, and on Blackwell, where 64 rows halve a product's width, groups of the right factor must divide that half."""
    size = jnp.dtype(dtype).itemsize
    divided = width * size if product_width is None else math.gcd(width * size, product_width * size // 2)
    swizzle = next((num_bytes for num_bytes in (128, 64, 32) if divided % num_bytes == 0), None)
    if swizzle is None:
        return plgpu.SMEM(shape, dtype)
    tiling: Any = plgpu.TilingTransform((8, swizzle // size))  # pyright: ignore[reportAbstractUsage]
    swizzling: Any = plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzling))


def store_plainly(into: Any, value: Array) -> None:
    """Into shared memory that is not laid out for it, at the cost of bank conflicts. jax 0.11 has no way to allow them,
    but in a simulator."""
    store = getattr(plgpu, "store", None)
    if store is None:
        into[...] = value
    else:
        store(into, value, optimized=False)


def accumulators(chip: Chip, *widths: int) -> list[Any]:
    """Scratch that `product` wants on a chip: a barrier and a place in tensor memory for each width of a product; or
    nothing."""
    if chip == "hopper":
        return []
    places = [plgpu.TMEM((ROWS, width), jnp.float32) for width in dict.fromkeys(widths)]
    return [plgpu.Barrier(orders_tensor_core=True), *places]


def product(memory: Any, width: int, terms: Callable[[Add], None], num_rows: int = ROWS) -> Array:
    """The sum [num_rows, width] (float32) of what `terms` adds; on Blackwell 64 rows. `memory` is what came of
    `accumulators`."""
    if not memory:

        def summed(sums: Any) -> Array:
            terms(lambda a, b, first: plgpu.wgmma(sums, a, b))
            return sums[...]

        return pl.run_scoped(summed, plgpu.WGMMAAccumulatorRef((num_rows, width), jnp.float32))
    barrier, *places = memory
    sums = next(place for place in places if place.shape[1] == width)
    terms(lambda a, b, first: plgpu.tcgen05_mma(sums, a, b, accumulate=jnp.logical_not(first)))
    plgpu.tcgen05_commit_arrive(barrier)
    plgpu.barrier_wait(barrier)
    found = plgpu.async_load_tmem(sums, layout=plgpu.Layout.WGMMA)
    plgpu.wait_load_tmem()
    return found
