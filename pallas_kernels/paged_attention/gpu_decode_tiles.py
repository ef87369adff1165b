"""How the GPU kernel that decodes lays out a thread block's shared memory."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import SHARED, Scheme, arrays_of
from pallas_kernels.paged_attention import gpu_scales
from pallas_kernels.paged_attention.gpu_scales import place_bytes, place_shape
from pallas_kernels.paged_attention.gpu_tiles import MAX_BARRIERS, MAX_STAGES, SHARED_BYTES, stripes_of
from pallas_kernels.paged_attention.plan import BLOCK_LEN
from pallas_kernels.pages import Pages
from pallas_kernels.tensor_cores import Chip, accumulators, shared

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


MAX_COLUMNS = 64
"""Most queries of an item for one KV head: of one position or several."""


ROW_BLOCK = 64
"""Dims of values that an instruction multiplies: rows of a product are a multiple."""
LEAST_WIDTH = 32
"""Columns of the narrowest product on Blackwell, whose 64 rows halve its width: half of it is a whole group of 32 bytes
of the right factor."""


def columns_for(num_queries: int, group: int, step: int = 8) -> int:
    """Columns of an item's products: its queries of one KV head, in eights or sixteens."""
    return -(-num_queries * group // step) * step


def product_columns(num_columns: int, chip: Chip) -> int:
    """Columns of a product with keys: those that no query is in are anything, and are not looked at."""
    return num_columns if chip == "hopper" else max(LEAST_WIDTH, -(-num_columns // 16) * 16)


def groups_in_stripes(value_dim: int, num_groups: int) -> set[int]:
    """How many groups of the values' channels a product of 64 dims has, which has the weights of all of them side by
    side."""
    size = value_dim // max(1, num_groups)
    stripes = stripes_of(value_dim, ROW_BLOCK)
    return {(stripe.start + ROW_BLOCK - 1) // size - stripe.start // size + 1 for stripe in stripes}


MOST_REGISTERS = 176
"""Most numbers of a thread that `registers_for` counts; 255 registers hold them and what is computed with them. Found
by compiling: what has more may spill at up to 128 dims, what has so many does not."""


def registers_for(
    num_columns: int,
    dims: tuple[int, int],
    schemes: tuple[Scheme, Scheme] | None,
    page_size: int,
    *,
    with_page_mass: bool,
    chip: Chip = "hopper",
) -> int:
    """Float32 numbers that each of a warpgroup's 128 threads has while it attends with so many columns: what it holds
    from one block to the next, and the largest product."""
    key_rows, value_rows = (-(-dim // ROW_BLOCK) * ROW_BLOCK for dim in dims)
    num_groups = groups_of(dims[1], schemes)
    held = 2 * BLOCK_LEN + value_rows  # scores and the sums of weights; outputs
    stripe = stripe_of(dims[1], num_columns, num_groups, chip)
    product = 2 * stripe * max(groups_in_stripes(dims[1], num_groups))
    if with_page_mass:
        held += BLOCK_LEN  # the weights of one page
    if schemes and schemes[0].per == "channel":
        held += key_rows  # queries, which are scaled for each of a block's pages
        product = max(product, BLOCK_LEN * PARTS * max(1, BLOCK_LEN // page_size))
    if schemes and schemes[1].has_zeros:
        held += num_groups * BLOCK_LEN  # sums of weights times zeros
    return (held + product) * num_columns // 128


def parts_of_columns(
    num_columns: int,
    dims: tuple[int, int],
    schemes: tuple[Scheme, Scheme] | None,
    page_size: int,
    *,
    with_page_mass: bool,
    chip: Chip = "hopper",
    is_latent: bool = False,
) -> tuple[int, int]:
    """How many thread blocks share an item's columns, each with the same pages, and how many of them each takes: the
    fewest for which registers and shared memory suffice; the most, where registers never do. (0, 0): shared memory does
    not hold a block."""
    num_groups = groups_of(dims[1], schemes)
    # On Blackwell the two halves of the weights, of all groups of a stripe, fill the narrowest product.
    step = 8 if chip == "hopper" else max(8, 16 // min(groups_in_stripes(dims[1], num_groups)))
    for most in (most for most in (64, 32, 16, 8) if most >= step):
        num_parts = -(-num_columns // most)
        mine = columns_for(1, -(-num_columns // num_parts), step)
        held = registers_for(most, dims, schemes, page_size, with_page_mass=with_page_mass, chip=chip)
        is_held = (held <= MOST_REGISTERS and num_groups * most <= MAX_COLUMNS) or most == step
        how = {"with_page_mass": with_page_mass, "chip": chip, "is_latent": is_latent}
        if is_held and fit(dims, schemes, mine, page_size, **how).num_stages:
            return num_parts, mine
    return 0, 0


MOST_OF_THREE = (36, 112)
"""The same, of thread blocks of three warpgroups: of those that share their multiprocessor, whose threads may have 80
registers, and of others, which may have 168. Found by compiling as well."""


def producers_for(
    num_columns: int,
    dims: tuple[int, int],
    schemes: tuple[Scheme, Scheme] | None,
    page_size: int,
    *,
    with_page_mass: bool,
    chip: Chip = "hopper",
    is_latent: bool = False,
) -> int:
    """Warpgroups that ask for pages. Quantised ones they also convert, which takes longer than they take to arrive: one
    converts keys and one values, where registers suffice."""
    if schemes is None:
        return 1
    how = {"with_page_mass": with_page_mass, "chip": chip}
    is_alone = fit(dims, schemes, num_columns, page_size, **how, is_latent=is_latent).num_bytes > HALF_BYTES
    return 2 if registers_for(num_columns, dims, schemes, page_size, **how) <= MOST_OF_THREE[is_alone] else 1


def groups_of(value_dim: int, schemes: tuple[Scheme, Scheme] | None) -> int:
    """Groups of the channels of values that have weights of their own; 0: scales are of whole tokens or of channels,
    and there are no zeros."""
    if schemes is None or schemes[1].per == "channel" or (schemes[1].group is None and not schemes[1].has_zeros):
        return 0
    return value_dim // (schemes[1].group or value_dim)


def stripe_of(value_dim: int, num_columns: int, num_groups: int = 0, chip: Chip = "hopper") -> int:
    """Dims of values that are multiplied at once: a multiple of 64."""
    if num_groups or chip == "blackwell":
        return ROW_BLOCK
    return next(
        width
        for width in range(value_dim // ROW_BLOCK * ROW_BLOCK, 0, -ROW_BLOCK)
        if width == ROW_BLOCK or (value_dim % width == 0 and width * num_columns <= OUT_SIZE)
    )


def fit(
    dims: tuple[int, int],
    schemes: tuple[Scheme, Scheme] | None,
    num_columns: int,
    page_size: int,
    max_stages: int = MAX_STAGES,
    *,
    with_page_mass: bool = True,
    chip: Chip = "hopper",
    is_latent: bool = False,
) -> Tiles:
    """The deepest ring of at most `max_stages` with which two thread blocks fit on a multiprocessor, or else one."""
    block_pages = max(1, BLOCK_LEN // page_size)
    most = min(max_stages, MAX_BARRIERS // block_pages)  # a page has a barrier of its own
    for limit, least in ((HALF_BYTES, min(most, LEAST_STAGES)), (SHARED_BYTES, 1)):
        for num_staged in (2, 1) if schemes else (0,):
            for num_stages in range(most, least - 1, -1):
                depth = num_stages, num_staged
                how = {"with_page_mass": with_page_mass, "chip": chip, "is_latent": is_latent}
                sizes = scratch_bytes(dims, schemes, num_columns, block_pages, *depth, **how)
                if sizes <= limit:
                    return Tiles(num_stages, num_staged, sizes)
    return Tiles(0, 0, 0)


def scratch_bytes(
    dims: tuple[int, int],
    schemes: tuple[Scheme, Scheme] | None,
    num_columns: int,
    block_pages: int,
    num_stages: int,
    num_staged: int,
    *,
    with_page_mass: bool,
    chip: Chip,
    is_latent: bool = False,
) -> int:
    """Bytes of all that `scratch_for` asks for, each in whole KiB. Where values are columns of keys of 16 bits they are
    read where those lie."""
    num_groups = groups_of(dims[1], schemes)
    stripe, num_weights = stripe_of(dims[1], num_columns, num_groups, chip), 2 * max(1, num_groups) * num_columns
    sizes = [num_weights * BLOCK_LEN * 2, stripe * num_columns * 4, num_columns * 4]
    if with_page_mass:
        sizes.append(block_pages * aligned(num_columns) * 4)
    if schemes is None:
        sizes += [num_stages * BLOCK_LEN * width * 2 for width in dims[: 2 - is_latent]]
    for width, scheme in zip(dims, schemes or (), strict=False):
        sizes += [num_stages * scheme.payload_bytes(BLOCK_LEN, width), num_staged * BLOCK_LEN * width * 2]
        of_scales = (num_stages + num_staged) * place_bytes(scheme, width, block_pages)
        sizes += (1 + scheme.has_zeros) * [of_scales]
    if schemes and schemes[0].per == "channel":
        sizes += [dims[0] * num_columns * 2, product_columns(block_pages * PARTS * num_columns, chip) * dims[0] * 2]
    else:
        sizes.append(dims[0] * product_columns(num_columns, chip) * 2)
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
    chip: Chip = "hopper",
) -> dict[str, Any]:
    """What a thread block keeps in shared memory, by name. Products of keys are of type `dtype`, queries come in
    `of_rows`."""
    dims, depth, staged = pages.head_dims, tiles.num_stages, tiles.num_staged
    schemes, num_groups = pages.schemes, groups_of(dims[1], pages.schemes)
    stripe = stripe_of(dims[1], num_columns, num_groups, chip)
    widths = [None, None] if chip == "hopper" else products_of(pages, num_columns, block_pages, chip)
    steps = [step_of(pages, side) for side in range(2)]
    # Weights times scales may be of any size, which float16 could not hold; what is quantised is exact in both.
    of_weights = jnp.dtype(jnp.bfloat16) if schemes else dtype
    scratch = {
        "weights": shared((2 * max(1, num_groups) * num_columns, BLOCK_LEN), of_weights, steps[1], widths[1]),
        "sums_out": shared((stripe, num_columns), jnp.float32, num_columns),
        "lse_out": plgpu.SMEM((num_columns,), jnp.float32),
        "queries_arrived": plgpu.Barrier(),
    }
    for side, (name, of) in enumerate((("keys", dtype), ("values", of_weights))):
        width, step, pool = dims[side], steps[side], pages.pools[-side]
        num_arrivals = len(arrays_of(pool))
        arrived = plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=depth * block_pages)
        if schemes is None and side and pages.is_latent:
            continue  # the keys' ring holds them
        scratch[f"{name}_arrived"] = arrived
        if schemes is None:
            scratch[name] = shared((depth, BLOCK_LEN, width), pool.dtype, step)
            continue
        scheme = schemes[side]
        ring = (depth, BLOCK_LEN, width // SHARED.get(scheme.format, 1))
        scratch[f"{name}_ring"] = shared(ring, pool.dtype, step)
        kept = (depth + staged, *place_shape(scheme, width, block_pages))
        for part in ("scales", "zeros")[: 1 + scheme.has_zeros]:
            scratch[f"{name}_{part}"] = plgpu.SMEM(kept, jnp.dtype(scheme.scale_dtype))
        scratch[f"{name}_staged"] = plgpu.Barrier(num_barriers=staged)
        scratch[name] = shared((staged, BLOCK_LEN, width), of, step)
    scratch["free"] = plgpu.Barrier(num_barriers=staged or depth)
    if schemes and schemes[0].per == "channel":
        scratch["queries"] = plgpu.SMEM((dims[0], num_columns), of_rows)
        of_scaled = product_columns(block_pages * PARTS * num_columns, chip)
        scratch["scaled"] = shared((of_scaled, dims[0]), dtype, steps[0], widths[0])
    else:
        scratch["queries"] = shared((product_columns(num_columns, chip), dims[0]), dtype, steps[0], widths[0])
    names = ("product_done", *(f"product_{number}" for number in range(len(widths))))
    scratch |= dict(zip(names, accumulators(chip, *filter(None, widths)), strict=False))
    if with_page_mass:
        scratch["pages_out"] = plgpu.SMEM((block_pages, aligned(num_columns)), jnp.float32)
    return scratch


def products_of(pages: Pages, num_columns: int, block_pages: int, chip: Chip) -> list[Any]:
    """Columns of the products with keys and with stripes of values, the narrowest first."""
    num_groups = groups_of(pages.head_dims[1], pages.schemes)
    of_keys = product_columns(num_columns * (PARTS * block_pages if pages.per == "channel" else 1), chip)
    in_stripes = groups_in_stripes(pages.head_dims[1], num_groups)
    return [of_keys, *(2 * number * num_columns for number in sorted(in_stripes))]


def step_of(pages: Pages, side: int) -> int:
    """Columns of keys (0) or values (1) that are laid out together, in both factors of a product; of quantised pages,
    as many as are turned into 16 bits at once, and no more than a page has slots where each page is multiplied
    apart."""
    width, schemes = pages.head_dims[side], pages.schemes
    if schemes is None:
        return math.gcd(*pages.head_dims, 64) if pages.is_latent else math.gcd(width, 64)
    return gpu_scales.step_of(width, schemes[side], min(pages.page_size, 64) if schemes[side].per == "channel" else 64)
