"""How the GPU kernel of paged attention lays out a thread block's shared memory."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import SHARED, Scheme, arrays_of
from pallas_kernels.paged_attention import gpu_scales
from pallas_kernels.paged_attention.gpu_scales import place_bytes, place_shape
from pallas_kernels.paged_attention.plan import BLOCK_LEN
from pallas_kernels.pages import Pages
from pallas_kernels.tensor_cores import ROWS, Chip, shared

SHARED_BYTES = (227 - 4) * 1024
"""Shared memory of a thread block, but for what Mosaic takes for sums over a warpgroup, 2 KiB, and for barriers. What
queries, weights and outputs leave of it is the ring's."""
MAX_BARRIERS = 32
"""Most barriers that lie together."""
MAX_STAGES = 8
"""Most stages of the ring."""
COLUMNS = 128
"""Most dims of one product: of values, they take 64 registers a thread."""


@dataclass(frozen=True)
class Tiles:
    """How a thread block's shared memory is laid out. `num_halves` is 2 where a page's numbers need two of 16 bits,
    `num_staged` how many blocks of them wait for products (0: the ring itself is multiplied); `num_bytes` is what all
    but barriers takes."""

    num_stages: int
    num_staged: int
    num_halves: int
    num_bytes: int


def fit(
    dims: tuple[int, int],
    schemes: tuple[Scheme, Scheme] | None,
    num_consumers: int = 1,
    page_size: int = BLOCK_LEN,
    max_stages: int = MAX_STAGES,
    with_page_mass: bool = True,
) -> Tiles:
    """The deepest ring of at most `max_stages` that shared memory holds, and two staged blocks where it can be. No
    stages: it does not hold any."""
    (dim, value_dim), rows = dims, ROWS * num_consumers
    block_pages = max(1, BLOCK_LEN // page_size)
    num_halves = 2 if schemes and schemes[0].per == "channel" else 1
    fixed = [rows * dim * 2, 2 * num_consumers * rows * BLOCK_LEN * 2, rows * out_step(value_dim) * 4, rows * 4]
    if with_page_mass:
        fixed.append(num_consumers * block_pages * ROWS * 4)

    def num_bytes(num_stages: int, num_staged: int) -> int:
        """Of all that `scratch_for` asks for, each in whole KiB."""
        if schemes is None:
            return whole_kib(fixed + [num_stages * BLOCK_LEN * width * 2 for width in dims])
        sizes = fixed + [num_staged * num_halves * BLOCK_LEN * width * 2 for width in dims]
        for width, scheme in zip(dims, schemes, strict=True):
            of_scales = place_bytes(scheme, width, block_pages) * (num_stages + num_staged * (num_halves == 1))
            sizes += [num_stages * scheme.payload_bytes(BLOCK_LEN, width), *[of_scales] * (1 + scheme.has_zeros)]
        if num_halves == 2:
            sizes += [num_staged * BLOCK_LEN * 4, dim * 4]
        return whole_kib(sizes)

    def with_staged(num_staged: int) -> Tiles:
        most = min(max_stages, MAX_BARRIERS // block_pages)  # a page has a barrier of its own
        fitting = (n for n in range(most, 0, -1) if num_bytes(n, num_staged) <= SHARED_BYTES)
        num_stages = next(fitting, 0)
        return Tiles(num_stages, num_staged, num_halves, num_bytes(num_stages, num_staged))

    if schemes is None:
        return with_staged(0)
    two = with_staged(2)
    return two if two.num_stages >= 2 else with_staged(1)  # a ring of one hides little


def whole_kib(sizes: list[int]) -> int:
    """The sum of sizes, each in whole KiB."""
    return sum(-(-size // 1024) * 1024 for size in sizes)


def scratch_for(
    tiles: Tiles,
    pages: Pages,
    dtype: Any,
    block_pages: int,
    num_consumers: int,
    with_page_mass: bool,
    chip: Chip,
    out_dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """What a thread block keeps in shared memory, by name."""
    dim, value_dim = pages.head_dims
    rows, depth, block_len = ROWS * num_consumers, tiles.num_stages, BLOCK_LEN
    stripe = value_stripes(value_dim, chip)[0].size
    # Weights times scales may be of any size, which float16 could not hold; what is quantised is exact in both.
    schemes = pages.schemes
    of_weights = jnp.dtype(jnp.bfloat16) if schemes else dtype
    of_keys, of_values = (step_of(pages, side) for side in range(2))
    scratch = {
        "queries": shared((rows, dim), dtype, of_keys),
        # Of two that attend, the weights of one block are multiplied while those of the next are written.
        "weights": shared((2 * num_consumers, rows, block_len), of_weights, of_values),
        "sums_out": shared((rows, out_step(value_dim)), out_dtype, out_step(value_dim)),
        "lse_out": plgpu.SMEM((rows,), jnp.float32),
        "queries_arrived": plgpu.Barrier(),
    }
    arrivals = [len(arrays_of(pages.pools[-side])) for side in range(2)]
    num_free = depth
    for side, (name, scheme) in enumerate(zip(("keys", "values"), schemes or (), strict=False)):
        width, pool = pages.head_dims[side], pages.pools[-side]
        ring = (depth, block_len, width // SHARED.get(scheme.format, 1))
        scratch[f"{name}_ring"] = shared(ring, pool.dtype, step_of(pages, side))
        places = tiles.num_stages + tiles.num_staged * (tiles.num_halves == 1)
        for part in ("scales", "zeros")[: 1 + scheme.has_zeros]:
            kept = (places, *place_shape(scheme, width, block_pages))
            scratch[f"{name}_{part}"] = plgpu.SMEM(kept, jnp.dtype(scheme.scale_dtype))
        scratch[f"{name}_staged"] = plgpu.Barrier(num_barriers=tiles.num_staged)
    if schemes:
        depth, num_free = tiles.num_staged * tiles.num_halves, tiles.num_staged
    if tiles.num_halves == 2:
        scratch["key_factors"] = plgpu.SMEM((tiles.num_staged, block_len), jnp.float32)
        scratch |= {"columns": plgpu.SMEM((dim,), jnp.float32), "columns_arrived": plgpu.Barrier()}
    scratch |= {
        "keys": shared((depth, block_len, dim), dtype, of_keys, block_len if chip == "blackwell" else None),
        "values": shared((depth, block_len, value_dim), of_weights, of_values, stripe if chip == "blackwell" else None),
        "keys_arrived": plgpu.Barrier(num_arrivals=arrivals[0], num_barriers=tiles.num_stages * block_pages),
        "values_arrived": plgpu.Barrier(num_arrivals=arrivals[1], num_barriers=tiles.num_stages * block_pages),
        "free": plgpu.Barrier(num_arrivals=num_consumers, num_barriers=num_free),
    }
    if num_consumers > 1:
        scratch["turns"] = plgpu.Barrier(num_barriers=num_consumers)
    if with_page_mass:
        scratch["pages_out"] = plgpu.SMEM((num_consumers * block_pages, ROWS), jnp.float32)
    return scratch


def step_of(pages: Pages, side: int) -> int:
    """Columns of keys (0) or values (1) that are laid out together, and turned into 16 bits at once: more would not fit
    into registers."""
    width, schemes = pages.head_dims[side], pages.schemes
    return math.gcd(width, 64) if schemes is None else gpu_scales.step_of(width, schemes[side])


def out_step(value_dim: int) -> int:
    """Columns of outputs that leave at once."""
    return math.gcd(stripes(value_dim)[0].size, 32)


def stripes(num_dims: int) -> list[Any]:
    """The dims of keys or values in equal parts of at most COLUMNS."""
    width = num_dims if num_dims <= COLUMNS else math.gcd(num_dims, COLUMNS)
    return [pl.ds(at, width) for at in range(0, num_dims, width)]


def value_stripes(value_dim: int, chip: Chip) -> list[Any]:
    """The dims of values that are multiplied at once. On Blackwell half a product's columns are whole groups of 16."""
    width = stripes(value_dim)[0].size
    if chip == "blackwell" and width % 32 and value_dim > 32:
        width = 64 if value_dim > 64 else 32
    return stripes_of(value_dim, width)


def stripes_of(value_dim: int, width: int) -> list[Any]:
    """Slices of `width` dims that cover [0, value_dim), `width` at least. The last one ends there: where `width` does
    not divide `value_dim` it begins inside the one before it, so that their common dims are computed twice, alike."""
    return [pl.ds(min(at, value_dim - width), width) for at in range(0, value_dim, width)]
