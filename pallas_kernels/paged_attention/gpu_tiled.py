"""Attention of chunks on GPUs, queries in the rows of products: tiles of 64 rows, or 128.

A tile is the queries, at one or several positions of one sequence, of all heads that share a KV head. XLA lists for
every tile the pages in which some row sees something and cuts the lists into pieces of nearly equal length (`split`); a
thread block takes a piece of one KV head. All pieces of a head come one after the other, since tiles of one sequence
read the same pages: those lie in the L2 cache then. Of a block's warpgroups

* one asks for pages, as far ahead as the ring is deep, and another attends (`gpu_piece`); or
* for quantised pages, the one that asks also turns what arrives into 16 bits, a block ahead of the other; or
* for a chunk two others attend, 64 rows each, over the same pages (`gpu_chunk`).

Every piece leaves normalised outputs and their log-sum-exp, which XLA merges where a list is cut: in float32 then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import arrays_of
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention.gpu_chunk import Chunk
from pallas_kernels.paged_attention.gpu_piece import Piece, Rows
from pallas_kernels.paged_attention.gpu_producer import Producer, Scaled, ScalingProducer
from pallas_kernels.paged_attention.gpu_ring import Part, by_name, given
from pallas_kernels.paged_attention.gpu_tiles import MAX_STAGES, Tiles, fit, scratch_for, step_of, value_stripes
from pallas_kernels.paged_attention.plan import BLOCK_LEN, PIECES
from pallas_kernels.paged_attention.sharing import (
    Live,
    any_lists,
    bounds,
    live_pages,
    merge,
    page_mass,
    split,
    tiled,
    whole_of,
)
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.tensor_cores import ROWS, Chip, accumulators, this_chip
from pallas_kernels.typing import Float, Int32
from pallas_kernels.visible import NOWHERE


@dataclass(frozen=True)
class Layout:
    """How queries [B, T, H, D] lie in the rows of tiles. An item is a tile of one sequence: `tile_len` positions of
    `group` heads each, for every KV head, filled up to `padded_rows`."""

    batch: int
    num_queries: int
    num_kv_heads: int
    group: int
    tile_rows: int
    """Of all warpgroups of a thread block."""

    @property
    def tile_len(self) -> int:
        return min(self.num_queries, self.tile_rows // self.group)

    @property
    def num_tiles(self) -> int:
        """Of a sequence."""
        return -(-self.num_queries // self.tile_len)

    @property
    def items(self) -> int:
        return self.batch * self.num_tiles

    @property
    def num_rows(self) -> int:
        return self.tile_len * self.group

    @property
    def padded_rows(self) -> int:
        return -(-self.num_rows // 8) * 8 if self.tile_rows == ROWS else self.tile_rows

    def rows(self, queries: Float[Array, "B T H D"]) -> Float[Array, "items K padded D"]:
        dim = queries.shape[3]
        rows = tiled(queries, self.tile_len, 0)
        rows = rows.reshape(self.items, self.tile_len, self.num_kv_heads, self.group, dim).swapaxes(1, 2)
        rows = rows.reshape(self.items, self.num_kv_heads, self.num_rows, dim)
        return jnp.pad(rows, ((0, 0), (0, 0), (0, self.padded_rows - self.num_rows), (0, 0)))

    def per_row(self, x: Int32[Array, "items tile_len"], fill: int) -> Int32[Array, "items tile_rows"]:
        """What is known of each position, for every row."""
        padding = ((0, 0), (0, self.tile_rows - self.num_rows))
        return jnp.pad(jnp.repeat(x, self.group, axis=1), padding, constant_values=fill)

    def untiled(self, x: Array) -> Array:
        """[items, K, rows, ...] to [B, T, H, ...]."""
        x = x[:, :, : self.num_rows]
        x = x.reshape(self.batch, self.num_tiles, self.num_kv_heads, self.tile_len, self.group, -1).swapaxes(2, 3)
        x = x.reshape(self.batch, self.num_tiles * self.tile_len, self.num_kv_heads * self.group, -1)
        return x[:, : self.num_queries]


@any_lists
def in_tiles(
    queries: Float[Array, "B T H D"],
    pages: Pages,
    lists: Lists,
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    scoring: Scoring,
    *,
    num_pieces: int | None = None,
    max_stages: int | None = None,
    num_consumers: int = 1,
    chip: Chip | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """See `api.paged_attention`. `num_consumers` warpgroups attend in a thread block, 64 rows each: 2 on Hopper, for
    pages that are not quantised."""
    batch, num_queries, num_heads, _ = queries.shape
    group, num_entries, page_size = num_heads // pages.num_kv_heads, lists.num_entries, pages.page_size
    layout = Layout(batch, num_queries, pages.num_kv_heads, group, ROWS * num_consumers)
    num_parts = 1
    if page_size > BLOCK_LEN:  # a long page is as many entries as it has blocks
        num_parts = page_size // BLOCK_LEN
        lists, page_size = lists.in_blocks(page_size, BLOCK_LEN), BLOCK_LEN
    first, last = bounds(query_positions, kv_lens, scoring.visible, layout.tile_len)
    live = live_pages(lists, first, last, page_size, scoring.visible)
    live = jax.tree.map(lambda x: x.reshape(layout.items, *x.shape[2:]), live)
    first, last = (x.reshape(layout.items, -1) for x in (first, last))
    aim = max(1, (num_pieces or PIECES) // pages.num_kv_heads)
    pieces = split(live.counts, BLOCK_LEN // page_size, aim, live.pages.shape[1])
    arrays = _arrays(queries, pages, live, first, last, pieces, layout)
    answers = _attend(
        arrays,
        pages,
        scoring,
        layout,
        queries.dtype,
        page_size=page_size,
        max_stages=max_stages or MAX_STAGES,
        chip=chip or this_chip(),
        interpret=interpret,
    )
    outputs, log_sum_exp = merge(answers[0], answers[1], pieces, layout.items)
    found = layout.untiled(outputs).astype(queries.dtype), layout.untiled(log_sum_exp[..., None])[..., 0]
    if not scoring.with_page_mass:
        return found
    mass = page_mass(answers[2], log_sum_exp, live.counts[:, None], live.order[:, None])
    mass = mass.reshape(*mass.shape[:-1], num_entries, num_parts).sum(axis=-1)
    return *found, layout.untiled(mass)


def _arrays(
    queries: Array, pages: Pages, live: Live, first: Array, last: Array, pieces: Array, layout: Layout
) -> dict[str, Any]:
    """What the kernel reads, by name: of every item its live pages, its rows, and what each of them sees."""
    rows, dtype = layout.rows(queries), _worked_in(pages, queries.dtype)
    column_scales = _column_scales(rows) if pages.per == "channel" else None
    rows, row_scales = _fitted(
        rows if column_scales is None else rows.astype(jnp.float32) / column_scales[:, :, None], dtype
    )
    # The positions that every row sees, padding apart; the last that any row sees; and whether there is no padding.
    whole = jnp.stack([*whole_of(first, last), (last >= 0).all(axis=1)], axis=1, dtype=jnp.int32)  # [items, 4]
    arrays = {
        "pieces": pieces,
        "pages": live.pages,
        "starts": live.starts,
        "whole": whole,
        "first": first,
        "last": last,
        "row_first": layout.per_row(first, NOWHERE),
        "row_last": layout.per_row(last, -1),
        "rows": rows,
        "key_pages": arrays_of(pages.keys),
        "value_pages": arrays_of(pages.pools[-1]),
    }
    if live.words is not None:
        arrays["words"] = live.words
    if column_scales is not None:
        arrays["column_scales"] = column_scales
    if row_scales is not None:
        missing = layout.tile_rows - layout.padded_rows
        arrays["row_scales"] = jnp.pad(row_scales, ((0, 0), (0, 0), (0, missing)), constant_values=1)
    return arrays


def _attend(
    arrays: dict[str, Any],
    pages: Pages,
    scoring: Scoring,
    layout: Layout,
    query_type: Any,
    *,
    page_size: int,
    max_stages: int,
    chip: Chip,
    interpret: Any,
) -> list[Array]:
    """Attention of every piece: outputs [pieces, K, rows, Dv], log-sum-exp [pieces, K, rows], and with page mass that
    of each entry."""
    num_pieces, num_kv_heads, value_dim = len(arrays["pieces"]), pages.num_kv_heads, pages.head_dims[1]
    num_consumers, with_mass = layout.tile_rows // ROWS, scoring.with_page_mass
    tiles = fit(pages.head_dims, pages.schemes, num_consumers, page_size, max_stages, with_mass)
    # What is merged is cast afterwards.
    out_dtype = query_type if num_pieces == layout.items else jnp.dtype(jnp.float32)
    out_type = {
        "outputs": jax.ShapeDtypeStruct((num_pieces, num_kv_heads, layout.padded_rows, value_dim), out_dtype),
        "log_sum_exp": jax.ShapeDtypeStruct((num_pieces, num_kv_heads, layout.padded_rows), jnp.float32),
    }
    if with_mass:
        of_pages = (layout.items, num_kv_heads, arrays["pages"].shape[1], layout.padded_rows)
        out_type["page_log_sum_exp"] = jax.ShapeDtypeStruct(of_pages, jnp.float32)
    flat = jax.tree.leaves(list(arrays.values()))
    dtype, block_pages = _worked_in(pages, query_type), BLOCK_LEN // page_size
    scratch = scratch_for(tiles, pages, dtype, block_pages, num_consumers, with_mass, chip, out_dtype)
    accumulating = accumulators(chip, BLOCK_LEN, *(columns.size for columns in value_stripes(value_dim, chip)))

    def kernel(*refs: Any) -> None:
        """Gives every ref its name."""
        named = by_name(refs, arrays, out_type, scratch)
        part = Part.of(
            named,
            (step_of(pages, 0), step_of(pages, 1)),
            pages.schemes,
            piece=lax.rem(lax.axis_index("block"), num_pieces),
            head=lax.div(lax.axis_index("block"), num_pieces),
            num_stages=tiles.num_stages,
            num_staged=tiles.num_staged,
            num_scale_places=tiles.num_stages + (0 if tiles.num_halves == 2 else tiles.num_staged),
            page_size=page_size,
            scoring=scoring,
        )
        memory = refs[len(flat) + len(out_type) + len(scratch) :]
        _attending(part, named, memory, tiles, layout, is_simulated=bool(interpret)).run()

    return plgpu.kernel(
        kernel,
        out_type=list(out_type.values()),
        scratch_types=[*scratch.values(), *accumulating],
        grid=(num_pieces * num_kv_heads,),  # one axis: of two, one could not be longer than 65,535
        grid_names=("block",),
        num_threads=1 + num_consumers,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=num_consumers == 2 and scoring.soft_cap is None),
    )(*flat)


def _attending(
    part: Part, named: dict[str, Any], memory: Sequence[Any], tiles: Tiles, layout: Layout, *, is_simulated: bool
) -> Piece:
    """What a thread block does: with one warpgroup that attends, or two."""
    num_consumers = layout.tile_rows // ROWS
    rows = given(
        Rows,
        named,
        memory=memory,
        num_halves=tiles.num_halves,
        num_consumers=num_consumers,
        padded_rows=min(layout.padded_rows, ROWS),
        is_simulated=is_simulated,
    )
    producer = Producer(part) if tiles.num_halves == 1 else ScalingProducer(part, given(Scaled, named))
    return (Chunk if num_consumers == 2 else Piece)(part, rows, producer)


def _worked_in(pages: Pages, queries: Any) -> Any:
    """The type of 16 bits that products of keys are computed in. Hopper turns 8-bit floats into float16 at once, into
    bfloat16 not; and two halves of float16 hold of keys that were scaled by channel what logits beyond 80 need, which
    two of bfloat16 do not."""
    if pages.per is None:
        return pages.keys.dtype
    is_half = queries == jnp.float16 or pages.format == "fp8" or pages.per == "channel"
    return jnp.dtype(jnp.float16 if is_half else jnp.bfloat16)


def _column_scales(rows: Float[Array, "N K R D"]) -> Float[Array, "N K D"]:
    """Powers of two, of at most 1, that bring a tile's columns to one size, where a row's small ones would be lost in
    float16. Keys, which have two halves, are multiplied with them instead."""
    largest = jnp.abs(rows.astype(jnp.float32)).max(axis=2)
    exponents = jnp.where(jnp.isfinite(largest) & (largest > 0), jnp.frexp(largest)[1], -(2**20))
    smaller = exponents - exponents.max(axis=2, keepdims=True)
    return jnp.exp2(jnp.where(exponents > -(2**20), jnp.maximum(smaller, -100), 0).astype(jnp.float32))


def _fitted(rows: Float[Array, "N K R D"], dtype: Any) -> tuple[Array, Array | None]:
    """Queries in the type of their products, and what each row's scores are to be multiplied with, where float16 could
    not hold them: powers of two. Of a row, what is below 2 ** -16 of its largest loses digits."""
    if dtype != jnp.float16 or rows.dtype == jnp.float16:
        return rows.astype(dtype), None
    largest = jnp.abs(rows.astype(jnp.float32)).max(axis=3)
    exponents = jnp.where(jnp.isfinite(largest) & (largest > 0), jnp.frexp(largest)[1] - 1, 0)
    scales = jnp.exp2(exponents.astype(jnp.float32))
    return (rows.astype(jnp.float32) / scales[..., None]).astype(dtype), scales
