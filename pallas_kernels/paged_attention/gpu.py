"""Paged attention for Hopper and Blackwell GPUs in Pallas Mosaic: one TMA a page into a ring, products on the tensor cores, KV split
evenly.

A tile is up to 64 rows, or 128 for a chunk: the queries, at one or several positions of one sequence, of all heads that share a
KV head. XLA lists for every tile the pages in which some row sees something and cuts the lists into pieces of nearly equal
length (`split`); a thread block takes a piece of one KV head. Of its two warpgroups

* one asks for pages, as far ahead as the ring is deep, and the other attends; or
* for quantised pages, the one that asks also turns what arrives into 16 bits, a block ahead of the other; or
* for a chunk both attend, 64 rows each, over the same pages, and one of them asks.

Every piece leaves normalised float32 outputs and their log-sum-exp, which XLA merges.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import FORMATS, Pages, Quantised, Scaling, arrays_of, each_array, format_of
from pallas_kernels.masking import NOWHERE
from pallas_kernels.paged_attention import gpu_decode
from pallas_kernels.paged_attention.gpu_decode import columns_for
from pallas_kernels.paged_attention.gpu_merge import merge as merge_pieces
from pallas_kernels.paged_attention.gpu_piece import Piece
from pallas_kernels.paged_attention.gpu_tiles import BLOCK_LEN, MAX_STAGES, fit, scratch_for, step_of, stripes
from pallas_kernels.paged_attention.pages import (
    any_lists,
    bounds,
    live_pages,
    merge,
    packed,
    page_mass,
    split,
    tiled,
)
from pallas_kernels.paged_attention.plan import PIECES, Plan, plan_attention
from pallas_kernels.selection import Asked
from pallas_kernels.tensor_cores import ROWS, Chip, accumulators, this_chip
from pallas_kernels.typing import Bool, Float, Int32


def refusal(asked: Asked) -> str | None:
    """Why this kernel cannot serve such pages; None: it can."""
    format, page_size, head_dims = asked.format, asked.page_size, asked.head_dims
    if format not in ("bfloat16", "float16", *FORMATS):
        return (
            f"pages of {format}: the tensor cores take bfloat16 and float16 here, or {', '.join(FORMATS)} with scales"
        )
    sizes = (32,) if format in FORMATS else (8, 16, 32)
    if page_size not in sizes and page_size % BLOCK_LEN:
        legal = ", ".join(map(str, sizes))
        return f"page_size = {page_size}: must be {legal} or a multiple of {BLOCK_LEN} for pages of {format}"
    step = 32 if format in FORMATS else 16
    if any(dim % step or not step <= dim <= 256 for dim in head_dims):
        return f"head dims = {head_dims}: must be multiples of {step} in [{step}, 256] for pages of {format}"
    if asked.group > ROWS:
        return f"group size = {asked.group}: must be at most {ROWS} query heads for a KV head"
    if not fit(*head_dims, format, asked.per, page_size=page_size).num_stages:
        return f"head dims = {head_dims}: shared memory does not hold a block of {format} scaled by {asked.per}"
    return None


def paged_attention(
    queries: Float[Array, "B T H D"],
    key_pages: Float[Array, "P K page D"] | Quantised,
    value_pages: Float[Array, "P K page Dv"] | Quantised,
    page_table: Int32[Array, "B *heads num_pages"],
    page_starts: Int32[Array, "B *heads num_pages"],
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    *,
    plan: Plan | None = None,
    valid_slots: Bool[Array, "B *heads num_pages page"] | None = None,
    window: int | None,
    num_sinks: int,
    soft_cap: float | None,
    scale: float,
    with_page_mass: bool = False,
    num_pieces: int | None = None,
    max_stages: int | None = None,
    chip: Chip | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """See `api.paged_attention`: by `gpu_decode` where it can, else in tiles of 64 rows, as chunks are."""
    chip = chip or this_chip()
    batch, num_queries, num_heads, dim = queries.shape
    _, num_kv_heads, page_size, value_dim = value_pages.shape
    per: Scaling = key_pages.per if isinstance(key_pages, Quantised) else "token"
    num_columns = columns_for(num_queries, num_heads // num_kv_heads)
    dims, format = (dim, value_dim), format_of(key_pages)
    if gpu_decode.refusal(dims, format, per, num_columns, page_size, chip):
        tables = page_table, page_starts, query_positions, kv_lens
        options = {"valid_slots": valid_slots, "window": window, "num_sinks": num_sinks, "soft_cap": soft_cap}
        options |= {"scale": scale, "with_page_mass": with_page_mass, "num_pieces": num_pieces}
        options |= {"max_stages": max_stages, "chip": chip, "interpret": interpret}
        return in_tiles(queries, key_pages, value_pages, *tables, **options)
    if plan is None:
        plan = plan_attention(
            page_table,
            page_starts,
            query_positions,
            kv_lens,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            valid_slots=valid_slots,
            window=window,
            num_sinks=num_sinks,
            num_pieces=num_pieces or PIECES,
        )
    group, by_head = num_heads // num_kv_heads, page_table.ndim == 3
    if by_head:  # a head is an item of its own, and a page a single tile
        queries = queries.reshape(batch, num_queries, num_kv_heads, group, dim).swapaxes(1, 2)
        queries = queries.reshape(-1, num_queries, group, dim)
        tiles = lambda x: x.reshape(-1, 1, *x.shape[2:])  # noqa: E731
        key_pages, value_pages = (each_array(pool, tiles) for pool in (key_pages, value_pages))
    made = gpu_decode.decode(
        queries,
        key_pages,
        value_pages,
        plan,
        soft_cap=soft_cap,
        scale=scale,
        with_page_mass=with_page_mass,
        max_stages=max_stages or MAX_STAGES,
        chip=chip,
        interpret=interpret,
    )
    outputs, sums = merge_pieces(made[0], made[1], plan.shares, num_queries, group, queries.dtype, interpret=interpret)

    def parted(x: Array) -> Array:
        """[items, T, heads, ...] to [B, T, H, ...]."""
        if by_head:
            x = x.reshape(batch, num_kv_heads, num_queries, group, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(batch, num_queries, num_heads, *x.shape[4 if by_head else 3 :])

    def rows(x: Array) -> Array:
        """[items, K, columns, ...] to [B, T, H, ...]."""
        x = x[:, :, : num_queries * group].reshape(len(x), x.shape[1], num_queries, group, *x.shape[3:])
        x = x.swapaxes(1, 2)
        return parted(x.reshape(*x.shape[:2], -1, *x.shape[4:]))

    found = parted(outputs), rows(sums)
    if not with_page_mass:
        return found
    mass = page_mass(made[2], sums, plan.counts[:, None], plan.order[:, None])
    mass = mass.reshape(*mass.shape[:-1], page_table.shape[-1], -1).sum(axis=-1)
    return *found, rows(mass)


@any_lists
def in_tiles(
    queries: Float[Array, "B T H D"],
    key_pages: Float[Array, "P K page D"] | Quantised,
    value_pages: Float[Array, "P K page Dv"] | Quantised,
    page_table: Int32[Array, "B num_pages"],
    page_starts: Int32[Array, "B num_pages"],
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    *,
    valid_slots: Bool[Array, "B num_pages page"] | None = None,
    window: int | None,
    num_sinks: int,
    soft_cap: float | None,
    scale: float,
    with_page_mass: bool = False,
    num_pieces: int | None = None,
    max_stages: int | None = None,
    num_consumers: int = 1,
    chip: Chip | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """See `api.paged_attention`: in tiles of 64 rows for each of `num_consumers` warpgroups that attend in a thread block; 2 are for
    chunks, on Hopper, of pages that are not quantised."""
    batch, num_queries, num_heads, dim = queries.shape
    _, num_kv_heads, page_size, value_dim = value_pages.shape
    chip = chip or this_chip()
    is_quantised, per, format = isinstance(key_pages, Quantised), "token", key_pages.dtype.name
    if isinstance(key_pages, Quantised):
        per, format = key_pages.per, key_pages.format
    group, dtype = num_heads // num_kv_heads, _worked_in(key_pages, queries.dtype)
    tile_rows = ROWS * num_consumers
    tile_len = min(num_queries, tile_rows // group)
    num_tiles = -(-num_queries // tile_len)
    items, num_rows = batch * num_tiles, tile_len * group
    padded_rows = -(-num_rows // 8) * 8 if num_consumers == 1 else tile_rows
    words = None if valid_slots is None else packed(valid_slots)
    table_len, num_parts = page_table.shape[1], 1
    if page_size > BLOCK_LEN:  # a long page is as many entries as it has blocks
        num_parts = page_size // BLOCK_LEN
        parts = jnp.arange(num_parts, dtype=jnp.int32)[None, None]
        page_table = (page_table[..., None] * num_parts + parts).reshape(batch, -1)
        page_starts = (page_starts[..., None] + parts * BLOCK_LEN).reshape(batch, -1)
        page_size = BLOCK_LEN
        words = None if words is None else words.reshape(*page_table.shape, -1)
    block_pages = BLOCK_LEN // page_size
    max_stages = max_stages or MAX_STAGES
    tiles = fit(dim, value_dim, format, per, num_consumers, page_size, max_stages, with_page_mass)

    first, last = bounds(query_positions, kv_lens, window, tile_len)
    lists = live_pages(page_table, page_starts, first, last, num_sinks, page_size, window, words)
    pages, starts, counts, first, last = (x.reshape(items, *x.shape[2:]) for x in (*lists[:3], first, last))
    pieces = split(counts, block_pages, max(1, (num_pieces or PIECES) // num_kv_heads), pages.shape[1])
    rows = tiled(queries, tile_len, 0).reshape(items, tile_len, num_kv_heads, group, dim).swapaxes(1, 2)
    rows = rows.reshape(items, num_kv_heads, num_rows, dim)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padded_rows - num_rows), (0, 0)))
    column_scales = _column_scales(rows) if is_quantised and per == "channel" else None
    rows, row_scales = _fitted(
        rows if column_scales is None else rows.astype(jnp.float32) / column_scales[:, :, None], dtype
    )

    def per_row(x: Array, fill: int) -> Array:
        return jnp.pad(jnp.repeat(x, group, axis=1), ((0, 0), (0, tile_rows - num_rows)), constant_values=fill)

    # The positions that every row sees, padding apart, and the last that any row sees.
    valid = last >= 0
    ends = jnp.where(valid, first, 0).max(axis=1), jnp.where(valid, last, NOWHERE).min(axis=1), last.max(axis=1)
    whole = jnp.stack(ends, axis=1)  # [items, 3]

    arrays = {
        "pieces": pieces,
        "pages": pages,
        "starts": starts,
        "whole": whole,
        "first": first,
        "last": last,
        "row_first": per_row(first, NOWHERE),
        "row_last": per_row(last, -1),
        "rows": rows,
        "key_pages": arrays_of(key_pages),
        "value_pages": arrays_of(value_pages),
    }
    if lists.words is not None:
        arrays["words"] = lists.words.reshape(items, *lists.words.shape[2:])
    if column_scales is not None:
        arrays["column_scales"] = column_scales
    if row_scales is not None:
        arrays["row_scales"] = jnp.pad(row_scales, ((0, 0), (0, 0), (0, tile_rows - padded_rows)), constant_values=1)
    out_type = {
        "outputs": jax.ShapeDtypeStruct((len(pieces), num_kv_heads, padded_rows, value_dim), jnp.float32),
        "log_sum_exp": jax.ShapeDtypeStruct((len(pieces), num_kv_heads, padded_rows), jnp.float32),
    }
    if with_page_mass:
        of_pages = (items, num_kv_heads, pages.shape[1], padded_rows)
        out_type["page_log_sum_exp"] = jax.ShapeDtypeStruct(of_pages, jnp.float32)
    names, given = list(arrays), jax.tree.leaves(list(arrays.values()))
    structure = jax.tree.structure(list(arrays.values()))

    scratch = scratch_for(tiles, dim, value_dim, key_pages, dtype, block_pages, num_consumers, with_page_mass, chip)
    accumulating = accumulators(chip, BLOCK_LEN, *(one.size for one in stripes(value_dim)))

    def kernel(*refs: Any) -> None:
        """Gives every ref its name."""
        inputs, refs = refs[: len(given)], refs[len(given) :]
        outputs, refs = refs[: len(out_type)], refs[len(out_type) :]
        mine, memory = refs[: len(scratch)], refs[len(scratch) :]
        named = dict(zip(names, jax.tree.unflatten(structure, inputs), strict=True))
        named |= dict(zip(out_type, outputs, strict=True)) | dict(zip(scratch, mine, strict=True))
        Piece(
            named,
            memory=memory,
            tiles=tiles,
            page_size=page_size,
            num_sinks=num_sinks if window is not None else None,
            soft_cap=soft_cap,
            scale=scale,
            per=per if is_quantised else None,
            num_consumers=num_consumers,
            steps={"keys": step_of(dim, key_pages), "values": step_of(value_dim, value_pages)},
            padded_rows=min(padded_rows, ROWS),
        ).run()

    answers = plgpu.kernel(
        kernel,
        out_type=list(out_type.values()),
        scratch_types=[*scratch.values(), *accumulating],
        grid=(len(pieces), num_kv_heads),
        grid_names=("piece", "head"),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=False),
    )(*given)
    outputs, log_sum_exp = merge(answers[0], answers[1], pieces, items)

    def untiled(x: Array) -> Array:
        """[items, K, rows, ...] to [B, T, H, ...]."""
        x = x[:, :, :num_rows].reshape(batch, num_tiles, num_kv_heads, tile_len, group, -1).swapaxes(2, 3)
        return x.reshape(batch, num_tiles * tile_len, num_heads, -1)[:, :num_queries]

    found = untiled(outputs).astype(queries.dtype), untiled(log_sum_exp[..., None])[..., 0]
    if not with_page_mass:
        return found
    order = lists.order.reshape(items, 1, -1)
    mass = page_mass(answers[2], log_sum_exp, counts[:, None], order)
    mass = mass.reshape(*mass.shape[:-1], table_len, num_parts).sum(axis=-1)
    return *found, untiled(mass)


def _worked_in(pages: Pages, queries: Any) -> Any:
    """The type of 16 bits that products of keys are computed in. Hopper turns 8-bit floats into float16 at once, into bfloat16 not;
    and two halves of float16 hold of keys that were scaled by channel what logits beyond 80 need, which two of bfloat16 do not."""
    if not isinstance(pages, Quantised):
        return pages.dtype
    is_half = queries == jnp.float16 or pages.format == "fp8" or pages.per == "channel"
    return jnp.dtype(jnp.float16 if is_half else jnp.bfloat16)


def _column_scales(rows: Float[Array, "N K R D"]) -> Float[Array, "N K D"]:
    """Powers of two, of at most 1, that bring a tile's columns to one size, where a row's small ones would be lost in float16. Keys,
    which have two halves, are multiplied with them instead."""
    largest = jnp.abs(rows.astype(jnp.float32)).max(axis=2)
    exponents = jnp.where(jnp.isfinite(largest) & (largest > 0), jnp.frexp(largest)[1], -(2**20))
    smaller = exponents - exponents.max(axis=2, keepdims=True)
    return jnp.exp2(jnp.where(exponents > -(2**20), jnp.maximum(smaller, -100), 0).astype(jnp.float32))


def _fitted(rows: Float[Array, "N K R D"], dtype: Any) -> tuple[Array, Array | None]:
    """Queries in the type of their products, and what each row's scores are to be multiplied with, where float16 could not hold them:
    powers of two. Of a row, what is below 2 ** -16 of its largest loses digits."""
    if dtype != jnp.float16 or rows.dtype == jnp.float16:
        return rows.astype(dtype), None
    largest = jnp.abs(rows.astype(jnp.float32)).max(axis=3)
    exponents = jnp.where(jnp.isfinite(largest) & (largest > 0), jnp.frexp(largest)[1] - 1, 0)
    scales = jnp.exp2(exponents.astype(jnp.float32))
    return (rows.astype(jnp.float32) / scales[..., None]).astype(dtype), scales
