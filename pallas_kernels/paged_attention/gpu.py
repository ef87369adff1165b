"""Paged attention for Hopper GPUs in Pallas Mosaic: one TMA a page into a ring, products on the tensor cores, KV split evenly.

A tile is up to 64 rows: the queries, at one or several positions of one sequence, of all heads that share a KV head. XLA lists
for every tile the pages in which some row sees something and cuts the lists into pieces of nearly equal length (`split`);
a thread block takes a piece of one KV head. One of its two warpgroups only asks for pages, as far ahead as the ring is
deep; the other attends. Every piece leaves normalised float32 outputs and their log-sum-exp, which XLA merges.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float, Int32

from pallas_kernels.masking import NOWHERE
from pallas_kernels.paged_attention.pages import WORD, any_lists, bounds, live_pages, merge, packed, split, tiled

ROWS = 64
"""Rows of a tile: what a warpgroup multiplies at once."""
BLOCK_LEN = 64
"""Tokens of a block: of several pages, or of a part of one."""
PIECES = 264
"""Pieces to aim at: two for each of an H200's 132 multiprocessors, over all KV heads."""
SHARED_BYTES = 224 * 1024
"""Shared memory of a thread block, but for barriers: what queries, weights and outputs leave of it is the ring's."""
MAX_STAGES = 8
"""Most stages of the ring."""
COLUMNS = 128
"""Most dims of one product: of values, they take 64 registers a thread."""
LOG2_E = math.log2(math.e)


def refusal(dtype: Any, page_size: int, head_dims: tuple[int, int], group: int) -> str | None:
    """Why this kernel cannot serve such pages; None: it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"dtype = {jnp.dtype(dtype).name}: the tensor cores take bfloat16 and float16 here"
    if page_size not in (8, 16, 32) and page_size % BLOCK_LEN:
        return f"page_size = {page_size}: must be 8, 16, 32 or a multiple of {BLOCK_LEN}"
    if any(dim % 16 or not 16 <= dim <= 256 for dim in head_dims):
        return f"head dims = {head_dims}: must be multiples of 16 in [16, 256]"
    if group > ROWS:
        return f"group size = {group}: must be at most {ROWS} query heads for a KV head"
    return None


def ring(dim: int, value_dim: int, itemsize: int) -> tuple[int, int]:
    """Stages of the ring for these head dims, and bytes of shared memory with them, but for barriers."""
    fixed = ROWS * ((dim + 2 * BLOCK_LEN) * itemsize + (_stripes(value_dim)[0].size + 1) * 4)
    stage = BLOCK_LEN * (dim + value_dim) * itemsize
    num_stages = min(MAX_STAGES, (SHARED_BYTES - fixed) // stage)
    return num_stages, fixed + num_stages * stage


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
    interpret: Any = False,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """See `api.paged_attention`."""
    batch, num_queries, num_heads, dim = queries.shape
    _, num_kv_heads, page_size, value_dim = value_pages.shape
    group, dtype = num_heads // num_kv_heads, key_pages.dtype
    tile_len = min(num_queries, ROWS // group)
    num_tiles = -(-num_queries // tile_len)
    items, num_rows = batch * num_tiles, tile_len * group
    padded_rows = -(-num_rows // 8) * 8
    words = None if valid_slots is None else packed(valid_slots)
    if page_size > BLOCK_LEN:  # a long page is as many entries as it has blocks
        parts = jnp.arange(page_size // BLOCK_LEN, dtype=jnp.int32)[None, None]
        page_table = (page_table[..., None] * parts.size + parts).reshape(batch, -1)
        page_starts = (page_starts[..., None] + parts * BLOCK_LEN).reshape(batch, -1)
        page_size = BLOCK_LEN
        words = None if words is None else words.reshape(*page_table.shape, -1)
    block_pages = BLOCK_LEN // page_size

    first, last = bounds(query_positions, kv_lens, window, tile_len)
    lists = live_pages(page_table, page_starts, first, last, num_sinks, page_size, window, words)
    pages, starts, counts, first, last = (x.reshape(items, *x.shape[2:]) for x in (*lists[:3], first, last))
    pieces = split(counts, block_pages, max(1, PIECES // num_kv_heads), pages.shape[1])
    rows = tiled(queries, tile_len, 0).reshape(items, tile_len, num_kv_heads, group, dim).swapaxes(1, 2)
    rows = rows.reshape(items, num_kv_heads, num_rows, dim)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padded_rows - num_rows), (0, 0))).astype(dtype)

    def per_row(x: Array, fill: int) -> Array:
        return jnp.pad(jnp.repeat(x, group, axis=1), ((0, 0), (0, ROWS - num_rows)), constant_values=fill)

    # What a page must hold for every row to see all of it; padding does not count.
    valid = last >= 0
    whole = jnp.stack(
        [jnp.where(valid, first, 0).max(axis=1), jnp.where(valid, last, NOWHERE).min(axis=1)], axis=1
    )  # [items, 2]

    stripe = _stripes(value_dim)[0].size
    num_stages = ring(dim, value_dim, dtype.itemsize)[0]

    def shared(shape: tuple[int, ...], of: Any, width: int) -> Any:
        """Laid out for products with what is `width` wide: both factors must be alike."""
        size = jnp.dtype(of).itemsize
        swizzle = next(one for one in (128, 64, 32) if width * size % one == 0)
        transforms: Any = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape, of, transforms=transforms)

    arrays = [
        pieces,
        pages,
        starts,
        whole,
        first,
        last,
        per_row(first, NOWHERE),
        per_row(last, -1),
        rows,
        key_pages,
        value_pages,
        *([] if lists.words is None else [lists.words.reshape(items, *lists.words.shape[2:])]),
    ]
    outputs, log_sum_exp = plgpu.kernel(
        partial(
            _kernel,
            has_words=lists.words is not None,
            page_size=page_size,
            block_pages=block_pages,
            num_stages=num_stages,
            num_sinks=num_sinks if window is not None else None,
            soft_cap=soft_cap,
            scale=scale,
        ),
        out_type=[
            jax.ShapeDtypeStruct((len(pieces), num_kv_heads, padded_rows, value_dim), jnp.float32),
            jax.ShapeDtypeStruct((len(pieces), num_kv_heads, padded_rows), jnp.float32),
        ],
        scratch_types=[
            shared((ROWS, dim), dtype, dim),
            shared((num_stages, BLOCK_LEN, dim), dtype, dim),
            shared((num_stages, BLOCK_LEN, value_dim), dtype, math.gcd(value_dim, BLOCK_LEN)),
            shared((2, ROWS, BLOCK_LEN), dtype, math.gcd(value_dim, BLOCK_LEN)),
            shared((ROWS, stripe), jnp.float32, stripe),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=num_stages * block_pages),
            plgpu.Barrier(num_barriers=num_stages * block_pages),
            plgpu.Barrier(num_barriers=num_stages),
        ],
        grid=(len(pieces), num_kv_heads),
        grid_names=("piece", "head"),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=False),
    )(*arrays)
    outputs, log_sum_exp = merge(outputs, log_sum_exp, pieces, items)

    def untiled(x: Array) -> Array:
        """[items, K, rows, ...] to [B, T, H, ...]."""
        x = x[:, :, :num_rows].reshape(batch, num_tiles, num_kv_heads, tile_len, group, -1).swapaxes(2, 3)
        return x.reshape(batch, num_tiles * tile_len, num_heads, -1)[:, :num_queries]

    return untiled(outputs).astype(queries.dtype), untiled(log_sum_exp[..., None])[..., 0]


def _kernel(
    pieces,
    pages,
    starts,
    whole,
    first,
    last,
    row_first,
    row_last,
    rows,
    key_pages,
    value_pages,
    *refs,
    has_words: bool,
    page_size: int,
    block_pages: int,
    num_stages: int,
    num_sinks: int | None,
    soft_cap: float | None,
    scale: float,
) -> None:
    """One piece: entries [begin, begin + count) of an item's list of pages, for one KV head."""
    words, refs = (refs[0], refs[1:]) if has_words else (None, refs)
    outputs, log_sum_exp, queries, keys, values, weights, sums_out, lse_out, *barriers = refs
    queries_arrived, keys_arrived, values_arrived, free = barriers
    piece, head = lax.axis_index("piece"), lax.axis_index("head")
    item, begin, count = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2]
    num_blocks = pl.cdiv(count, block_pages)
    block_len, num_parts, padded_rows = block_pages * page_size, key_pages.shape[2] // page_size, rows.shape[2]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when((warpgroup == 1) & (count > 0))
    def _():
        """Asks for pages: as soon as a stage of the ring is free."""
        plgpu.copy_gmem_to_smem(rows.at[item, head], queries.at[pl.ds(0, padded_rows)], queries_arrived)

        def block(number, _):
            stage = lax.rem(number, num_stages)

            @pl.when(number >= num_stages)
            def _():
                plgpu.barrier_wait(free.at[stage])

            for entry in range(block_pages):

                @pl.when(number * block_pages + entry < count)
                def _(entry=entry):
                    page, place = pages[item, begin + number * block_pages + entry], stage * block_pages + entry
                    part = pl.ds(lax.rem(page, num_parts) * page_size, page_size)
                    for pool, ring, arrived in ((key_pages, keys, keys_arrived), (value_pages, values, values_arrived)):
                        source = pool.at[lax.div(page, num_parts), head, part]
                        target = ring.at[stage, pl.ds(entry * page_size, page_size)]
                        plgpu.copy_gmem_to_smem(source, target, arrived.at[place])

        lax.fori_loop(0, num_blocks, block, None)

        def drain(stage, _):  # a barrier must not end with a phase that its waiter has not seen
            plgpu.barrier_wait(free.at[stage])

        lax.fori_loop(0, jnp.minimum(num_blocks, num_stages), drain, None)

    @pl.when((warpgroup == 0) & (count > 0))
    def _():
        """Attends, block by block."""
        down = plgpu.Layout.WGMMA.reduce(1)
        value_stripes = _stripes(values.shape[2])
        lows, highs = (plgpu.load(one.at[item], layout=down) for one in (row_first, row_last))
        plgpu.barrier_wait(queries_arrived)

        def block(number, state):
            sums, highest, total = state
            stage = lax.rem(number, num_stages)
            entries = [number * block_pages + entry for entry in range(block_pages)]
            begins = [
                jnp.where(one < count, starts[item, begin + jnp.minimum(one, count - 1)], NOWHERE) for one in entries
            ]

            bits = []  # of the block's slots: where those of each word begin, and the word
            span = min(page_size, WORD)
            if words is not None:
                for place in range(0, block_len, span):
                    one, number = entries[place // page_size], place % page_size // span
                    word = words[item, begin + jnp.minimum(one, count - 1), number]
                    bits.append((place, jnp.where(one < count, word, 0)))

            def each_page(do):
                for entry, one in enumerate(entries):
                    pl.when(one < count)(partial(do, entry))

            each_page(lambda entry: plgpu.barrier_wait(keys_arrived.at[stage * block_pages + entry]))

            def product(scores):
                width = _stripes(queries.shape[1])[0].size

                def stripe(number, _):  # a loop: unrolled over 256 dims it spills
                    columns = pl.ds(number * width, width)
                    plgpu.wgmma(scores, queries.at[:, columns], keys.at[stage, :, columns].transpose((1, 0)))

                lax.fori_loop(0, queries.shape[1] // width, stripe, None)
                return scores[...]

            scores = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, block_len), jnp.float32)) * scale
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)

            def positions_of(slots):
                positions = slots + begins[0]
                for entry, start in enumerate(begins[1:], 1):
                    positions = jnp.where(slots >= entry * page_size, slots + (start - entry * page_size), positions)
                return positions

            def only_valid(seen, slots):
                if not bits:
                    return seen
                of_slot = jnp.zeros_like(slots)
                for place, word in bits:
                    of_slot = jnp.where(slots >= place, word, of_slot)
                return seen & (lax.shift_right_logical(of_slot, lax.rem(slots, span)) & 1 > 0)

            slots = plgpu.broadcasted_iota(jnp.int32, (ROWS, block_len), 1, layout=plgpu.Layout.WGMMA)
            positions = positions_of(slots)
            seen = only_valid(positions <= lax.broadcast_in_dim(highs, scores.shape, [0]), slots)
            if num_sinks is not None:
                inside = positions >= lax.broadcast_in_dim(lows, scores.shape, [0])
                seen = seen & (inside | (positions < num_sinks))
            scores = jnp.where(seen, scores * LOG2_E, -jnp.inf)
            new = jnp.maximum(highest, scores.max(axis=1))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            keep = jnp.exp2(highest - shift)
            exact = jnp.exp2(scores - lax.broadcast_in_dim(shift, scores.shape, [0]))
            total = total * keep + exact.sum(axis=1)
            # In two halves of 16 bits the weights lose nothing: the time is in the copies, not here.
            high = exact.astype(weights.dtype)
            weights[0] = high
            weights[1] = (exact - high.astype(jnp.float32)).astype(weights.dtype)
            each_page(lambda entry: plgpu.barrier_wait(values_arrived.at[stage * block_pages + entry]))
            is_whole = True
            for start in begins:
                is_whole = is_whole & (start >= whole[item, 0]) & (start + page_size - 1 <= whole[item, 1])
            for _, word in bits:
                is_whole = is_whole & (word == ((1 << span) - 1 if span < WORD else -1))

            @pl.when(jnp.logical_not(is_whole))
            def _():
                """A weight of zero does not silence a NaN: what no row sees is replaced."""
                slots = plgpu.broadcasted_iota(jnp.int32, (block_len,), 0, layout=down)
                places = positions_of(slots)

                def of_token(token, readable):
                    seen = places <= last[item, token]
                    if num_sinks is not None:
                        seen = seen & ((places >= first[item, token]) | (places < num_sinks))
                    return jnp.where(seen, 1, readable)

                nothing = plgpu.layout_cast(jnp.zeros((block_len,), jnp.int32), down)
                readable = lax.fori_loop(0, last.shape[1], of_token, nothing)
                readable = jnp.where(only_valid(readable > 0, slots), 1, 0)
                for columns in value_stripes:
                    part = values.at[stage, :, columns]
                    kept = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                    keeps = lax.broadcast_in_dim(readable, kept.shape, [0]) > 0
                    part[...] = jnp.where(keeps, kept, jnp.zeros((), kept.dtype))

            plgpu.commit_smem()

            scaled = []
            for columns, one in zip(value_stripes, sums, strict=True):

                def weighted(part, columns=columns):
                    for half in range(2):
                        plgpu.wgmma(part, weights.at[half], values.at[stage, :, columns])
                    return part[...]

                part = pl.run_scoped(weighted, plgpu.WGMMAAccumulatorRef(one.shape, jnp.float32))
                scaled.append(one * lax.broadcast_in_dim(keep, one.shape, [0]) + part)
            plgpu.barrier_arrive(free.at[stage])
            return tuple(scaled), new, total

        def filled(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        state = (
            tuple(filled((ROWS, one.size), 0, plgpu.Layout.WGMMA) for one in value_stripes),
            filled((ROWS,), -jnp.inf, down),
            filled((ROWS,), 0, down),
        )
        sums, highest, total = lax.fori_loop(0, num_blocks, block, state)
        divisor = jnp.where(total == 0, 1.0, total)
        lse_out[...] = jnp.where(total == 0, -jnp.inf, (highest + jnp.log2(divisor)) / LOG2_E)
        for number, (columns, one) in enumerate(zip(value_stripes, sums, strict=True)):
            if number:
                plgpu.wait_smem_to_gmem(0)
            sums_out[...] = one / lax.broadcast_in_dim(divisor, one.shape, [0])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums_out.at[pl.ds(0, padded_rows)], outputs.at[piece, head, :, columns])
        plgpu.copy_smem_to_gmem(lse_out.at[pl.ds(0, padded_rows)], log_sum_exp.at[piece, head])
        plgpu.wait_smem_to_gmem(0)


def _stripes(num_dims: int) -> list[Any]:
    """The dims of keys or values in equal parts of at most COLUMNS."""
    width = num_dims if num_dims <= COLUMNS else math.gcd(num_dims, COLUMNS)
    return [pl.ds(at, width) for at in range(0, num_dims, width)]
