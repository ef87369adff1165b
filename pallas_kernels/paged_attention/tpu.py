"""Paged attention for TPUs in Pallas Mosaic: pages come by DMA, one block ahead, also across sequences.

An item is (sequence, KV head, tile of queries): its rows are the queries of all heads that share the KV head. XLA lists, for
every item, the pages in which some row sees something; the kernel walks the items in order. While it attends over one
block of pages, the next one, of this item or the first of the following, is on its way into the other half of the buffer.
So what moves is each live page once, and a page that nobody sees is not touched.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int32

from pallas_kernels.masking import NOWHERE
from pallas_kernels.paged_attention.pages import WORD, any_lists, bounds, live_pages, packed, tiled

BLOCK_LEN = 512
"""Tokens of a block: a copy long enough to hide its latency, a buffer of 2 x 2 x 128 KiB at 128 dims of 16 bits."""
ROWS = 256
"""Most rows of an item."""


def refusal(dtype: Any, page_size: int, head_dims: tuple[int, int]) -> str | None:
    """Why this kernel should not serve such pages; None: it can."""
    rows = {jnp.dtype("bfloat16"): 16, jnp.dtype("float32"): 8}.get(jnp.dtype(dtype))
    if rows is None:
        return f"dtype = {jnp.dtype(dtype).name}: must be bfloat16 or float32"
    if page_size % rows:
        return (
            f"page_size = {page_size}: must be a multiple of {rows}, the rows of a register of {jnp.dtype(dtype).name}"
        )
    if any(dim % 128 for dim in head_dims):
        return f"head dims = {head_dims}: must be multiples of 128; XLA would copy the whole pool to widen its rows"
    return None


@any_lists
def paged_attention(
    queries: Float[Array, "B T H D"],
    key_pages: Float[Array, "P K page D"],
    value_pages: Float[Array, "P K page Dv"],
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
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """See `api.paged_attention`."""
    batch, num_queries, num_heads, dim = queries.shape
    _, num_kv_heads, page_size, value_dim = value_pages.shape
    group = num_heads // num_kv_heads
    tile_len = min(num_queries, max(1, ROWS // group))
    num_tiles = -(-num_queries // tile_len)
    block_pages = max(1, min(BLOCK_LEN // page_size, page_table.shape[1]))

    first, last = bounds(query_positions, kv_lens, window, tile_len)
    words = None if valid_slots is None else packed(valid_slots)
    pages, starts, counts, words = live_pages(page_table, page_starts, first, last, num_sinks, page_size, window, words)
    # Rows: [B, K, tiles, tile_len * G], padded to whole registers; padding sees nothing.
    rows = tiled(queries, tile_len, 0).reshape(batch, num_tiles, tile_len, num_kv_heads, group, dim)
    rows = rows.transpose(0, 3, 1, 2, 4, 5).reshape(batch * num_kv_heads * num_tiles, tile_len * group, dim)
    num_rows = -(-rows.shape[1] // 16) * 16
    missing = num_rows - rows.shape[1]
    rows = jnp.pad(rows, ((0, 0), (0, missing), (0, 0)))

    def per_row(x: Array, fill: int) -> Array:
        x = jnp.pad(jnp.repeat(x, group, axis=2), ((0, 0), (0, 0), (0, missing)), constant_values=fill)
        return jnp.repeat(x[:, None], num_kv_heads, axis=1).reshape(-1, num_rows)

    def per_head(x: Array) -> Array:
        return jnp.repeat(x[:, None], num_kv_heads, axis=1).reshape(-1, *x.shape[2:])

    items, table_len = len(rows), pages.shape[-1]
    counts = per_head(counts)
    ends = jnp.stack([per_row(first, NOWHERE), per_row(last, -1)], axis=1)  # [items, 2, rows]
    columns = [pages, starts, *([] if words is None else jnp.moveaxis(words, 3, 0))]
    tables = jnp.stack([per_head(one) for one in columns], axis=1)  # [items, 2 + words, N]
    table_spec = partial(pl.BlockSpec, (1, len(columns), table_len), memory_space=pltpu.SMEM)
    outputs, log_sum_exp = pl.pallas_call(
        partial(
            _kernel,
            num_items=items,
            num_kv_heads=num_kv_heads,
            num_tiles=num_tiles,
            num_sinks=num_sinks if window is not None else None,
            soft_cap=soft_cap,
            scale=scale,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(items,),
            in_specs=[
                table_spec(lambda i, _: (i, 0, 0)),
                table_spec(lambda i, _: (jnp.minimum(i + 1, items - 1), 0, 0)),
                pl.BlockSpec((1, num_rows, dim), lambda i, _: (i, 0, 0)),
                pl.BlockSpec((1, 2, num_rows), lambda i, _: (i, 0, 0)),
                pl.BlockSpec((1, num_rows, 2), lambda i, _: (i, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[
                pl.BlockSpec((1, num_rows, value_dim), lambda i, _: (i, 0, 0)),
                pl.BlockSpec((1, num_rows, 1), lambda i, _: (i, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, block_pages, page_size, dim), key_pages.dtype),
                pltpu.VMEM((2, block_pages, page_size, value_dim), value_pages.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((items, num_rows, value_dim), queries.dtype),
            jax.ShapeDtypeStruct((items, num_rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="paged_attention",
    )(counts, tables, tables, rows, ends, ends.swapaxes(1, 2), key_pages, value_pages)

    def untiled(x: Array) -> Array:
        x = x[:, : tile_len * group].reshape(batch, num_kv_heads, num_tiles * tile_len, group, -1)[:, :, :num_queries]
        return x.transpose(0, 2, 1, 3, 4).reshape(batch, num_queries, num_heads, -1)

    return untiled(outputs), untiled(log_sum_exp)[..., 0]


def _kernel(
    counts: Any,
    table,
    next_table,
    rows,
    ends_across,
    ends_down,
    key_pages,
    value_pages,
    outputs,
    log_sum_exp,
    keys,
    values,
    arrived,
    half,
    *,
    num_items: int,
    num_kv_heads: int,
    num_tiles: int,
    num_sinks: int | None,
    soft_cap: float | None,
    scale: float,
) -> None:
    """One item. `half` is the half of the buffer that holds, or will hold, its first block; `arrived` counts its copies."""
    item = pl.program_id(0)
    _, block_pages, page_size, _ = keys.shape
    count = counts[item]
    num_blocks = pl.cdiv(count, block_pages)

    def copies(of, table, block, entry, into):
        """The two copies of one page."""
        head, page = of // num_tiles % num_kv_heads, table[0, 0, block * block_pages + entry]
        pairs = ((key_pages, keys), (value_pages, values))
        return [
            pltpu.make_async_copy(pool.at[page, head], buffer.at[into, entry], arrived.at[which, into])
            for which, (pool, buffer) in enumerate(pairs)
        ]

    def each_live(count, block, do):
        """For every entry of a block that lists a page."""

        def one(entry, _):
            do(entry)

        lax.fori_loop(0, jnp.minimum(block_pages, count - block * block_pages), one, None)

    def fetch(of, table, count, block, into):
        each_live(count, block, lambda entry: [one.start() for one in copies(of, table, block, entry, into)])

    before = counts[jnp.maximum(item - 1, 0)]

    @pl.when(item == 0)
    def _():
        half[0] = 0

    @pl.when((count > 0) & ((item == 0) | (before == 0)))
    def _():
        fetch(item, table, count, 0, half[0])

    num_slots = block_pages * page_size

    def attend(block, state):
        highest, total, sums = state
        here = (half[0] + block) % 2
        following = jnp.minimum(item + 1, num_items - 1)

        @pl.when(block + 1 < num_blocks)
        def _():
            fetch(item, table, count, block + 1, 1 - here)

        @pl.when((block + 1 == num_blocks) & (item + 1 < num_items))
        def _():
            fetch(following, next_table, counts[following], 0, 1 - here)

        each_live(count, block, lambda entry: [one.wait() for one in copies(item, table, block, entry, here)])

        entries = [block * block_pages + entry for entry in range(block_pages)]

        def column(number, unused):
            return [
                jnp.where(entry < count, table[0, number, jnp.minimum(entry, count - 1)], unused) for entry in entries
            ]

        starts, words = column(1, NOWHERE), [column(number, 0) for number in range(2, table.shape[1])]

        def visible(axis, first, last):
            """[rows, slots] with the slots along axis 1, or the other way round along axis 0."""
            offsets = lax.broadcasted_iota(jnp.int32, (page_size, 1) if axis == 0 else (1, page_size), axis)
            positions = jnp.concatenate([start + offsets for start in starts], axis=axis)
            seen = positions <= last
            if num_sinks is not None:
                seen = seen & ((positions >= first) | (positions < num_sinks))
            if words:
                bits = jnp.concatenate([_bits(offsets, of_page) for of_page in zip(*words, strict=True)], axis=axis)
                seen = seen & (bits > 0)
            return seen

        seen = visible(1, ends_down[0, :, 0:1], ends_down[0, :, 1:2])
        scores = lax.dot_general(
            rows[0], keys[here].reshape(num_slots, -1), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        scores = scores * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(seen, scores, -jnp.inf)
        new = jnp.maximum(highest, scores.max(axis=1, keepdims=True))
        shift = jnp.where(new == -jnp.inf, 0, new)
        keep, weights = jnp.exp(highest - shift), jnp.exp(scores - shift)
        total = total * keep + weights.sum(axis=1, keepdims=True)
        # A weight of zero does not silence a NaN: what no row sees is replaced.
        readable = visible(0, ends_across[0, 0:1], ends_across[0, 1:2]).astype(jnp.float32).max(axis=1, keepdims=True)
        block_values = jnp.where(readable > 0, values[here].reshape(num_slots, -1), 0)
        part = _product(weights, block_values)
        return new, total, sums * keep + part

    num_rows, value_dim = rows.shape[1], values.shape[3]
    state = (
        jnp.full((num_rows, 1), -jnp.inf),
        jnp.zeros((num_rows, 1)),
        jnp.zeros((num_rows, value_dim)),
    )
    highest, total, sums = lax.fori_loop(0, num_blocks, attend, state)
    half[0] = (half[0] + num_blocks) % 2
    outputs[0] = (sums / jnp.where(total == 0, 1, total)).astype(outputs.dtype)
    log_sum_exp[0] = jnp.log(total) + jnp.where(highest == -jnp.inf, 0, highest)


def _bits(offsets: Int32[Array, "*shape"], words: Any) -> Int32[Array, "*shape"]:
    """The bit of each slot of a page."""
    word = jnp.full(offsets.shape, words[0])
    for number, one in enumerate(words[1:], 1):
        word = jnp.where(offsets >= number * WORD, one, word)
    return lax.shift_right_logical(word, offsets % WORD) & 1


def _product(weights: Float[Array, "R S"], values: Float[Array, "S Dv"]) -> Float[Array, "R Dv"]:
    """weights @ values in float32. Values of 16 bits meet the weights in two halves of 16 bits, so that these lose nothing: the
    time is in the copies, not here."""

    def product(weights: Array) -> Array:
        return lax.dot_general(weights, values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    if values.dtype == jnp.float32:
        return product(weights)
    high = weights.astype(values.dtype)
    return product(high) + product((weights - high.astype(jnp.float32)).astype(values.dtype))
