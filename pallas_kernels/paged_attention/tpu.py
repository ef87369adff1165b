"""Paged attention for TPUs in Pallas Mosaic: pages come by DMA, one block ahead, also across sequences.

An item is (sequence, KV head, tile of queries): its rows are the queries of all heads that share the KV head. XLA
lists, for every item, the pages in which some row sees something; the kernel walks the items in order. While it attends
over one block of pages, the next one, of this item or the first of the following, is on its way into the other half of
the buffer. So what moves is each live page once, and a page that nobody sees is not touched."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats import Scheme, arrays_of
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention.sharing import any_lists, bounds, cost, live_pages, page_mass, tiled
from pallas_kernels.paged_attention.tpu_item import LANES, Item, Sizes
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.selection import Asked
from pallas_kernels.typing import Float, Int32
from pallas_kernels.visible import NOWHERE

BLOCK_LEN = 512
"""Tokens of a block: a copy long enough to hide its latency, a buffer of 2 x 2 x 128 KiB at 128 dims of 16 bits."""
ROWS = 512
"""Most rows of an item. With 512 every byte of a page is worth 512 operations: what TPUs can do while one arrives (v5e
240, v6e 560)."""
MAX_DIM = 256
"""Of keys, and of values."""


def refusal(asked: Asked) -> str | None:
    """Why this kernel should not serve such pages; None: it can."""
    query_type = jnp.dtype(asked.dtype)
    if query_type not in (jnp.bfloat16, jnp.float32):
        return f"queries of {query_type.name}: must be bfloat16 or float32"
    if asked.schemes is not None and (reason := _cannot_read(asked.schemes)):
        return f"pages of {asked.stored_as}: {reason}"
    rows = {"bfloat16": 16, "float32": 8, "int8": 32, "fp8": 32, "int4": 32}.get(asked.format)
    if rows is None:
        return f"pages of {asked.format}: must be bfloat16, float32, or int8, fp8, int4 with scales"
    if asked.page_size % rows:
        return f"page_size = {asked.page_size}: must be a multiple of {rows}, the rows of a register of {asked.format}"
    lanes = 2 * LANES if asked.format == "int4" else LANES
    if any(dim % lanes for dim in asked.head_dims):
        legal = f"must be multiples of {lanes} for pages of {asked.format}"
        return f"head dims = {asked.head_dims}: {legal}; XLA would copy the whole pool to widen its rows"
    if any(dim > MAX_DIM for dim in asked.head_dims):
        return f"head dims = {asked.head_dims}: must be at most {MAX_DIM}, for which there is VMEM on every TPU"
    return None


def _cannot_read(schemes: tuple[Scheme, Scheme]) -> str | None:
    """Why pages in such schemes, of which format and `per` do not say all, cannot be read; None: they can."""
    keys, values = schemes
    if "int2" in (keys.format, values.format):
        return "rows of 2 bits are too narrow for a TPU's registers"
    if keys.format != values.format:
        return "keys and values must be of one format"
    if keys.per != "channel" or values.per != "token" or values.group is None:
        return "must be keys by channel and values by token in groups, or both plain and alike"
    return None if keys.has_zeros == values.has_zeros else "keys and values must both have zeros, or neither"


@dataclass(frozen=True)
class Layout:
    """How queries [B, T, H, D] lie in rows. An item is a tile of one sequence for one KV head: `tile_len` positions of
    `group` heads each, filled up to whole registers by rows that see nothing."""

    batch: int
    num_queries: int
    num_kv_heads: int
    group: int
    tile_len: int

    @property
    def num_tiles(self) -> int:
        """Of a sequence."""
        return -(-self.num_queries // self.tile_len)

    @property
    def num_rows(self) -> int:
        """Of an item, with those that fill it up."""
        return -(-self.tile_len * self.group // 16) * 16

    @property
    def missing(self) -> int:
        """Rows that fill an item up."""
        return self.num_rows - self.tile_len * self.group

    def rows(self, queries: Float[Array, "B T H D"]) -> Float[Array, "items R D"]:
        """Queries, item by item."""
        rows = tiled(queries, self.tile_len, 0)
        rows = rows.reshape(self.batch, self.num_tiles, self.tile_len, self.num_kv_heads, self.group, -1)
        rows = rows.transpose(0, 3, 1, 2, 4, 5).reshape(-1, self.tile_len * self.group, queries.shape[3])
        return jnp.pad(rows, ((0, 0), (0, self.missing), (0, 0)))

    def per_row(self, x: Int32[Array, "B tiles tile_len"], fill: int) -> Int32[Array, "items R"]:
        """What positions have, row by row."""
        padding = ((0, 0), (0, 0), (0, self.missing))
        x = jnp.pad(jnp.repeat(x, self.group, axis=2), padding, constant_values=fill)
        return jnp.repeat(x[:, None], self.num_kv_heads, axis=1).reshape(-1, self.num_rows)

    def per_head(self, x: Array) -> Array:
        """What tiles [B, tiles, ...] have, item by item."""
        return jnp.repeat(x[:, None], self.num_kv_heads, axis=1).reshape(-1, *x.shape[2:])

    def untiled(self, x: Float[Array, "items R E"]) -> Float[Array, "B T H E"]:
        """What rows have, query by query."""
        x = x[:, : self.tile_len * self.group]
        x = x.reshape(self.batch, self.num_kv_heads, self.num_tiles * self.tile_len, self.group, -1)
        x = x[:, :, : self.num_queries].transpose(0, 2, 1, 3, 4)
        return x.reshape(self.batch, self.num_queries, self.num_kv_heads * self.group, -1)


@any_lists
def paged_attention(
    queries: Float[Array, "B T H D"],
    pages: Pages,
    lists: Lists,
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    scoring: Scoring,
    *,
    block_len: int | None = None,
    max_rows: int | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[Array, ...]:
    """See `api.paged_attention`."""
    (batch, num_queries, num_heads, _), page_size = queries.shape, pages.page_size
    group = num_heads // pages.num_kv_heads
    tile_len = min(num_queries, max(1, (max_rows or ROWS) // group))
    layout = Layout(batch, num_queries, pages.num_kv_heads, group, tile_len)
    block_pages = max(1, min((block_len or BLOCK_LEN) // page_size, lists.num_entries, LANES))

    first, last = bounds(query_positions, kv_lens, scoring.visible, tile_len)
    listed, starts, counts, words, order = live_pages(lists, first, last, page_size, scoring.visible)
    rows = layout.rows(queries)
    counts = layout.per_head(counts)
    ends = jnp.stack([layout.per_row(first, NOWHERE), layout.per_row(last, -1)], axis=1)  # [items, 2, rows]
    columns = [listed, starts, *([] if words is None else jnp.moveaxis(words, 3, 0))]
    tables = jnp.stack([layout.per_head(column) for column in columns], axis=1)  # [items, 2 + words, N]
    answers = _attend(counts, tables, rows, ends, pages, scoring, layout.num_tiles, block_pages, interpret)
    outputs, log_sum_exp = answers[:2]
    if not scoring.with_page_mass:
        return layout.untiled(outputs), layout.untiled(log_sum_exp)[..., 0]
    per_tile = LANES // block_pages * block_pages
    logs = answers[2][..., :per_tile].transpose(0, 1, 3, 2).reshape(len(rows), -1, layout.num_rows)
    logs = logs[:, : listed.shape[-1]]
    mass = page_mass(logs, log_sum_exp[..., 0], counts, layout.per_head(order))
    return layout.untiled(outputs), layout.untiled(log_sum_exp)[..., 0], layout.untiled(mass)


def _attend(
    counts: Int32[Array, "items"],
    tables: Int32[Array, "items columns N"],
    rows: Float[Array, "items R D"],
    ends: Int32[Array, "items 2 R"],
    pages: Pages,
    scoring: Scoring,
    num_tiles: int,
    block_pages: int,
    interpret: pltpu.InterpretParams | bool,
) -> Sequence[Array]:
    """Outputs [items, R, Dv], log-sum-exp [items, R, 1], and with page mass that of each page, in lanes."""
    (items, num_rows, dim), (_, num_columns, table_len) = rows.shape, tables.shape
    table_spec = partial(pl.BlockSpec, (1, num_columns, table_len), memory_space=pltpu.SMEM)
    # Scales lie in rows of their own, so that one page's can be copied alone.
    pools = [
        payload if payload.ndim == 4 else payload[:, :, None]
        for pair in zip(*map(arrays_of, pages.pools), strict=True)
        for payload in pair
    ]
    out_shape = [
        jax.ShapeDtypeStruct((items, num_rows, pages.head_dims[1]), rows.dtype),
        jax.ShapeDtypeStruct((items, num_rows, 1), jnp.float32),
    ]
    if scoring.with_page_mass:
        num_lane_tiles = -(-table_len // (LANES // block_pages * block_pages))
        out_shape.append(jax.ShapeDtypeStruct((items, num_lane_tiles, num_rows, LANES), jnp.float32))
    sizes = Sizes(items, pages.num_kv_heads, num_tiles, len(pools), len(pages.pools))
    return pl.pallas_call(
        partial(_kernel, sizes=sizes, schemes=pages.schemes, scoring=scoring),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(items,),
            in_specs=[
                table_spec(lambda i, _: (i, 0, 0)),
                table_spec(lambda i, _: (jnp.minimum(i + 1, items - 1), 0, 0)),
                pl.BlockSpec((1, num_rows, dim), lambda i, _: (i, 0, 0)),
                pl.BlockSpec((1, 2, num_rows), lambda i, _: (i, 0, 0)),
                pl.BlockSpec((1, num_rows, 2), lambda i, _: (i, 0, 0)),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(pools),
            ],
            out_specs=[
                pl.BlockSpec((1, *array.shape[1:]), lambda i, _, rank=array.ndim: (i, *[0] * (rank - 1)))
                for array in out_shape
            ],
            scratch_shapes=[
                *[pltpu.VMEM((2, block_pages, *pool.shape[2:]), pool.dtype) for pool in pools],
                pltpu.SemaphoreType.DMA((len(pools), 2)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=cost(pages, items * table_len * pages.page_size, num_rows),
        interpret=interpret,
        name="paged_attention",
    )(counts, tables, tables, rows, ends, ends.swapaxes(1, 2), *pools)


def _kernel(
    counts: Any,
    table: Any,
    next_table: Any,
    rows: Any,
    ends_across: Any,
    ends_down: Any,
    *refs: Any,
    sizes: Sizes,
    schemes: tuple[Scheme, Scheme] | None,
    scoring: Scoring,
) -> None:
    """Gives every ref its name: behind the pools, the answers; then what pages are copied into."""
    pools, refs = refs[: sizes.num_pools], refs[sizes.num_pools :]
    answers, buffers, (arrived, half) = refs[: -sizes.num_pools - 2], refs[-sizes.num_pools - 2 : -2], refs[-2:]
    outputs, log_sum_exp, *page_logs = answers
    ends = ends_across, ends_down
    item = Item(
        counts, table, next_table, rows, *ends, pools, buffers, arrived, half, page_logs, sizes, schemes, scoring
    )
    item.run(outputs, log_sum_exp)
