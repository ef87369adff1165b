"""Paged attention for TPUs in Pallas Mosaic: pages come by DMA, one block ahead, also across sequences.

An item is (sequence, KV head, tile of queries): its rows are the queries of all heads that share the KV head. XLA
lists, for every item, the pages in which some row sees something; the kernel walks the items in order. While it attends
over one block of pages, the next one, of this item or the first of the following, is on its way into the other half of
the buffer. So what moves is each live page once, and a page that nobody sees is not touched."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats import SHARED, Scheme, arrays_of, unpacked
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention.sharing import WORD, any_lists, bounds, cost, live_pages, page_mass, tiled
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.selection import Asked
from pallas_kernels.typing import Float, Int32
from pallas_kernels.visible import NOWHERE

BLOCK_LEN = 512
"""Tokens of a block: a copy long enough to hide its latency, a buffer of 2 x 2 x 128 KiB at 128 dims of 16 bits."""
ROWS = 512
"""Most rows of an item. With 512 every byte of a page is worth 512 operations: what TPUs can do while one arrives (v5e
240, v6e 560)."""
LANES = 128
"""Of a register."""
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
    batch, num_queries, num_heads, dim = queries.shape
    num_kv_heads, page_size, value_dim = pages.num_kv_heads, pages.page_size, pages.head_dims[1]
    group = num_heads // num_kv_heads
    tile_len = min(num_queries, max(1, (max_rows or ROWS) // group))
    num_tiles = -(-num_queries // tile_len)
    block_pages = max(1, min((block_len or BLOCK_LEN) // page_size, lists.num_entries, LANES))

    first, last = bounds(query_positions, kv_lens, scoring.visible, tile_len)
    listed, starts, counts, words, order = live_pages(lists, first, last, page_size, scoring.visible)
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

    items, table_len = len(rows), listed.shape[-1]
    counts = per_head(counts)
    ends = jnp.stack([per_row(first, NOWHERE), per_row(last, -1)], axis=1)  # [items, 2, rows]
    columns = [listed, starts, *([] if words is None else jnp.moveaxis(words, 3, 0))]
    tables = jnp.stack([per_head(column) for column in columns], axis=1)  # [items, 2 + words, N]
    table_spec = partial(pl.BlockSpec, (1, len(columns), table_len), memory_space=pltpu.SMEM)
    # Scales lie in rows of their own, so that one page's can be copied alone.
    pools = [
        payload if payload.ndim == 4 else payload[:, :, None]
        for pair in zip(*map(arrays_of, pages.pools), strict=True)
        for payload in pair
    ]
    out_shape = [
        jax.ShapeDtypeStruct((items, num_rows, value_dim), queries.dtype),
        jax.ShapeDtypeStruct((items, num_rows, 1), jnp.float32),
    ]
    per_tile = LANES // block_pages * block_pages
    if scoring.with_page_mass:
        out_shape.append(jax.ShapeDtypeStruct((items, -(-table_len // per_tile), num_rows, LANES), jnp.float32))
    answers = pl.pallas_call(
        partial(
            _kernel,
            num_items=items,
            num_kv_heads=num_kv_heads,
            num_tiles=num_tiles,
            num_pools=len(pools),
            num_sides=len(pages.pools),
            schemes=pages.schemes,
            scoring=scoring,
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
        cost_estimate=cost(pages, items * table_len * page_size, num_rows),
        interpret=interpret,
        name="paged_attention",
    )(counts, tables, tables, rows, ends, ends.swapaxes(1, 2), *pools)

    def untiled(x: Array) -> Array:
        x = x[:, : tile_len * group].reshape(batch, num_kv_heads, num_tiles * tile_len, group, -1)[:, :, :num_queries]
        return x.transpose(0, 2, 1, 3, 4).reshape(batch, num_queries, num_heads, -1)

    outputs, log_sum_exp = answers[:2]
    if not scoring.with_page_mass:
        return untiled(outputs), untiled(log_sum_exp)[..., 0]
    logs = answers[2][..., :per_tile].transpose(0, 1, 3, 2).reshape(items, -1, num_rows)[:, :table_len]
    mass = page_mass(logs, log_sum_exp[..., 0], counts, per_head(order))
    return untiled(outputs), untiled(log_sum_exp)[..., 0], untiled(mass)


def _kernel(
    counts: Any,
    table,
    next_table,
    rows,
    ends_across,
    ends_down,
    *refs,
    num_items: int,
    num_kv_heads: int,
    num_tiles: int,
    num_pools: int,
    num_sides: int,
    schemes: tuple[Scheme, Scheme] | None,
    scoring: Scoring,
) -> None:
    """One item. `half` is the half of the buffers that holds, or will hold, its first block; `arrived` counts their
    copies. Of `num_sides` 2, pools are keys and values, then scales of both, then zeros of both; of 1 values are the
    first columns of the keys."""
    pools, refs = refs[:num_pools], refs[num_pools:]
    *answers, arrived, half = refs[: len(refs) - num_pools - 2] + refs[-2:]
    buffers = refs[len(refs) - num_pools - 2 : -2]
    outputs, log_sum_exp, *page_logs = answers
    item = pl.program_id(0)
    _, block_pages, page_size, _ = buffers[0].shape
    count = counts[item]
    num_blocks = pl.cdiv(count, block_pages)

    def copies(of, table, block, entry, into):
        """The copies of one page: keys, values, and their scales."""
        head, page = of // num_tiles % num_kv_heads, table[0, 0, block * block_pages + entry]
        return [
            pltpu.make_async_copy(pool.at[page, head], buffer.at[into, entry], arrived.at[which, into])
            for which, (pool, buffer) in enumerate(zip(pools, buffers, strict=True))
        ]

    def each_live(count, block, do):
        """For every entry of a block that lists a page."""

        def live_entry(entry, _):
            do(entry)

        lax.fori_loop(0, jnp.minimum(block_pages, count - block * block_pages), live_entry, None)

    def fetch(of, table, count, block, into):
        each_live(count, block, lambda entry: [copy.start() for copy in copies(of, table, block, entry, into)])

    before = counts[jnp.maximum(item - 1, 0)]

    @pl.when(item == 0)
    def _():
        half[0] = 0

    @pl.when((count > 0) & ((item == 0) | (before == 0)))
    def _():
        fetch(item, table, count, 0, half[0])

    num_slots, (num_rows, value_dim) = block_pages * page_size, outputs.shape[1:]
    for page_log in page_logs:
        page_log[...] = jnp.full(page_log.shape, -jnp.inf)

    def numbers(which, here):
        """[slots, dims] of keys or values, in a type that products take; scales multiplied in, and zeros added, but for
        scales of whole tokens."""
        found = buffers[which][here]
        if schemes is None:
            return found.reshape(num_slots, -1)
        scheme = schemes[which]
        shared = SHARED.get(scheme.format, 1)
        exact = found.astype(jnp.float32)
        if shared > 1:
            exact = unpacked(found, shared, is_signed=not scheme.has_zeros)
        if has_token_scales(which):  # without them they are exact in the queries' type
            return exact.astype(rows.dtype).reshape(num_slots, -1)
        exact = exact * spread(scheme.group, which + num_sides, here)
        if scheme.has_zeros:
            exact = exact + spread(scheme.group, which + 2 * num_sides, here)
        return exact.reshape(num_slots, -1)

    def has_token_scales(which):
        """Whether keys or values have a scale for each token, which multiplies scores or weights."""
        return schemes is not None and schemes[which].per == "token" and schemes[which].group is None

    def spread(group, of, here):
        """[pages, slots or 1, dims]: scales or zeros, for every number."""
        kept = buffers[of][here].astype(jnp.float32)
        if group is None:
            return kept
        num_groups = kept.shape[1]
        groups = lax.broadcasted_iota(jnp.int32, (num_groups, num_groups * group), 0)
        channels = lax.broadcasted_iota(jnp.int32, groups.shape, 1)
        belongs = jnp.where(lax.div(channels, group) == groups, 1.0, 0.0)
        of_slots = jnp.concatenate([kept[entry] for entry in range(block_pages)], axis=1)
        contracted = (((0,), (0,)), ((), ()))
        precision = lax.Precision.HIGHEST
        found = lax.dot_general(of_slots, belongs, contracted, precision, jnp.float32)
        return found.reshape(block_pages, page_size, -1)

    def token_scales(which, here):
        """[1, slots]."""
        return jnp.concatenate([buffers[which + num_sides][here, entry] for entry in range(block_pages)], axis=1)

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

        each_live(count, block, lambda entry: [copy.wait() for copy in copies(item, table, block, entry, here)])

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
            if scoring.num_sinks is not None:
                seen = seen & ((positions >= first) | (positions < scoring.num_sinks))
            if words:
                bits = jnp.concatenate([_bits(offsets, of_page) for of_page in zip(*words, strict=True)], axis=axis)
                seen = seen & (bits > 0)
            return seen

        seen = visible(1, ends_down[0, :, 0:1], ends_down[0, :, 1:2])
        keys = numbers(0, here)
        scores = _dot(rows[0].astype(keys.dtype), keys, 1) * scoring.scale
        if has_token_scales(0):
            scores = scores * token_scales(0, here)
        scores = jnp.where(seen, scoring.capped(scores), -jnp.inf)
        new = jnp.maximum(highest, scores.max(axis=1, keepdims=True))
        shift = jnp.where(new == -jnp.inf, 0, new)
        keep, weights = jnp.exp(highest - shift), jnp.exp(scores - shift)
        total = total * keep + weights.sum(axis=1, keepdims=True)
        for page_log in page_logs:
            leave_page_logs(page_log, block, weights, shift)
        if has_token_scales(num_sides - 1):  # the scale of what nobody sees may be anything
            weights = jnp.where(weights > 0, weights * token_scales(num_sides - 1, here), 0)
        # A weight of zero does not silence a NaN: what no row sees is replaced.
        readable = visible(0, ends_across[0, 0:1], ends_across[0, 1:2]).astype(jnp.float32).max(axis=1, keepdims=True)
        block_values = jnp.where(readable > 0, numbers(num_sides - 1, here)[:, :value_dim], 0)
        part = _product(weights, block_values)
        return new, total, sums * keep + part

    def leave_page_logs(into, block, weights, shift):
        """The log-sum-exp of a block's pages, in lanes of their own."""
        per_tile = LANES // block_pages
        first = lax.rem(block, per_tile) * block_pages
        lanes = lax.broadcasted_iota(jnp.int32, (num_slots, LANES), 1)
        slots = lax.broadcasted_iota(jnp.int32, (num_slots, LANES), 0)
        begin = (lanes - first) * page_size
        places = jnp.where((slots >= begin) & (slots < begin + page_size), 1.0, 0.0)
        logs = jnp.log(_dot(weights, places, 0)) + shift
        mine = lax.broadcasted_iota(jnp.int32, logs.shape, 1)
        mine = (mine >= first) & (mine < first + block_pages)
        tile = lax.div(block, per_tile)
        into[0, tile] = jnp.where(mine, logs, into[0, tile])

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
    for number, later in enumerate(words[1:], 1):
        word = jnp.where(offsets >= number * WORD, later, word)
    return lax.shift_right_logical(word, offsets % WORD) & 1


def _dot(left: Array, right: Array, axis: int) -> Array:
    """The product over left's second axis and that axis of right, as exact as their type."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    contracted = (((1,), (axis,)), ((), ()))
    return lax.dot_general(left, right, contracted, precision=precision, preferred_element_type=jnp.float32)


def _product(weights: Float[Array, "R S"], values: Float[Array, "S Dv"]) -> Float[Array, "R Dv"]:
    """weights @ values in float32. Values of 16 bits meet the weights in two halves of 16 bits, so that these lose
    nothing: the time is in the copies, not here."""
    if values.dtype == jnp.float32:
        return _dot(weights, values, 0)
    high = weights.astype(values.dtype)
    low = (weights - high.astype(jnp.float32)).astype(values.dtype)
    return _dot(high, values, 0) + _dot(low, values, 0)
