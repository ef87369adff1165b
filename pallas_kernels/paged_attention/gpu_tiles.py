"""How the GPU kernel of paged attention lays out a thread block's shared memory."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import FORMATS, Scaling
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
    dim: int,
    value_dim: int,
    format: str,
    per: Scaling = "token",
    num_consumers: int = 1,
    page_size: int = BLOCK_LEN,
    max_stages: int = MAX_STAGES,
    with_page_mass: bool = True,
) -> Tiles:
    """The deepest ring of at most `max_stages` that shared memory holds, and two staged blocks where it can be. No
    stages: it does not hold any."""
    rows, is_quantised = ROWS * num_consumers, format in FORMATS
    block_pages = max(1, BLOCK_LEN // page_size)
    bits = {"int4": 4, "int8": 8, "fp8": 8}.get(format, 16)
    num_halves = 2 if is_quantised and per == "channel" else 1
    fixed = [rows * dim * 2, 2 * num_consumers * rows * BLOCK_LEN * 2, rows * out_step(value_dim) * 4, rows * 4]
    if with_page_mass:
        fixed.append(num_consumers * block_pages * ROWS * 4)

    def num_bytes(num_stages: int, num_staged: int) -> int:
        """Of all that `scratch_for` asks for, each in whole KiB."""
        sizes = fixed + [num_stages * BLOCK_LEN * width * bits // 8 for width in (dim, value_dim)]
        if is_quantised:
            sizes += [num_staged * num_halves * BLOCK_LEN * width * 2 for width in (dim, value_dim)]
        if is_quantised and per == "token":
            sizes += 2 * [(num_stages + num_staged) * BLOCK_LEN * 4]
        elif is_quantised:
            sizes += [num_stages * block_pages * width * 4 for width in (dim, value_dim)]
            sizes += [num_staged * BLOCK_LEN * 4, dim * 4]
        return sum(-(-size // 1024) * 1024 for size in sizes)

    def with_staged(num_staged: int) -> Tiles:
        most = min(max_stages, MAX_BARRIERS // block_pages)  # a page has a barrier of its own
        fitting = (n for n in range(most, 0, -1) if num_bytes(n, num_staged) <= SHARED_BYTES)
        num_stages = next(fitting, 0)
        return Tiles(num_stages, num_staged, num_halves, num_bytes(num_stages, num_staged))

    if not is_quantised:
        return with_staged(0)
    two = with_staged(2)
    return two if two.num_stages >= 2 else with_staged(1)  # a ring of one hides little


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
    rows, stripe, depth, block_len = ROWS * num_consumers, stripes(value_dim)[0].size, tiles.num_stages, BLOCK_LEN
    # Weights times scales may be of any size, which float16 could not hold; what is quantised is exact in both.
    of_weights = jnp.dtype(jnp.bfloat16) if pages.per is not None else dtype
    of_keys, of_values = step_of(dim, pages), step_of(value_dim, pages)
    scratch = {
        "queries": shared((rows, dim), dtype, of_keys),
        # Of two that attend, the weights of one block are multiplied while those of the next are written.
        "weights": shared((2 * num_consumers, rows, block_len), of_weights, of_values),
        "sums_out": shared((rows, out_step(value_dim)), out_dtype, out_step(value_dim)),
        "lse_out": plgpu.SMEM((rows,), jnp.float32),
        "queries_arrived": plgpu.Barrier(),
    }
    num_arrivals = 1
    if pages.per is not None:
        payload, staged = pages.keys.dtype, tiles.num_staged * tiles.num_halves
        halved = 2 if pages.format == "int4" else 1
        num_arrivals = 2
        for name, width in (("keys", dim), ("values", value_dim)):
            ring = (depth, block_len, width // halved)
            scratch[f"{name}_ring"] = shared(ring, payload, step_of(width, pages))
            by_token = (depth + tiles.num_staged, block_len)
            of_scales = by_token if pages.per == "token" else (depth, block_pages, width)
            scratch[f"{name}_scales"] = plgpu.SMEM(of_scales, jnp.float32)
            scratch[f"{name}_staged"] = plgpu.Barrier(num_barriers=tiles.num_staged)
        if pages.per == "channel":
            scratch["key_factors"] = plgpu.SMEM((tiles.num_staged, block_len), jnp.float32)
            scratch |= {"columns": plgpu.SMEM((dim,), jnp.float32), "columns_arrived": plgpu.Barrier()}
        depth, num_free = staged, tiles.num_staged
    else:
        num_free = depth
    scratch |= {
        "keys": shared((depth, block_len, dim), dtype, of_keys, block_len if chip == "blackwell" else None),
        "values": shared((depth, block_len, value_dim), of_weights, of_values, stripe if chip == "blackwell" else None),
        "keys_arrived": plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=tiles.num_stages * block_pages),
        "values_arrived": plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=tiles.num_stages * block_pages),
        "free": plgpu.Barrier(num_arrivals=num_consumers, num_barriers=num_free),
    }
    if num_consumers > 1:
        scratch["turns"] = plgpu.Barrier(num_barriers=num_consumers)
    if with_page_mass:
        scratch["pages_out"] = plgpu.SMEM((num_consumers * block_pages, ROWS), jnp.float32)
    return scratch


def step_of(width: int, pages: Pages) -> int:
    """Columns that are laid out together, and turned into 16 bits at once: more would not fit into registers."""
    if pages.per is None:
        return math.gcd(width, 64)
    return math.gcd(width // 2 if pages.format == "int4" else width, 32 if width > 128 else 64)


def out_step(value_dim: int) -> int:
    """Columns of outputs that leave at once."""
    return math.gcd(stripes(value_dim)[0].size, 32)


def stripes(num_dims: int) -> list[Any]:
    """The dims of keys or values in equal parts of at most COLUMNS."""
    width = num_dims if num_dims <= COLUMNS else math.gcd(num_dims, COLUMNS)
    return [pl.ds(at, width) for at in range(0, num_dims, width)]
