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

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float, Int32

from pallas_kernels.formats import FORMATS, Pages, Quantised, Scaling, arrays_of
from pallas_kernels.masking import NOWHERE
from pallas_kernels.paged_attention.pages import (
    WORD,
    any_lists,
    bounds,
    live_pages,
    merge,
    packed,
    page_mass,
    split,
    tiled,
)
from pallas_kernels.selection import Asked
from pallas_kernels.tensor_cores import ROWS, Chip, Named, accumulators, product, shared, this_chip

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
    if not fit(*head_dims, format, asked.per, block_pages=max(1, BLOCK_LEN // page_size)).num_stages:
        return f"head dims = {head_dims}: shared memory does not hold a block of {format} scaled by {asked.per}"
    return None


@dataclass(frozen=True)
class Tiles:
    """How a thread block's shared memory is laid out. `num_halves` is 2 where a page's numbers need two of 16 bits, `num_staged`
    how many blocks of them wait for products (0: the ring itself is multiplied); `num_bytes` is for all but barriers."""

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
    block_pages: int = 1,
    max_stages: int = MAX_STAGES,
) -> Tiles:
    """The deepest ring of at most `max_stages` that shared memory holds, and two staged blocks where it can be. No stages: it does not hold any."""
    rows, is_quantised = ROWS * num_consumers, format in FORMATS
    bits = {"int4": 4, "int8": 8, "fp8": 8}.get(format, 16)
    num_halves = 2 if is_quantised and per == "channel" else 1
    stage = BLOCK_LEN * (dim + value_dim) * bits // 8
    scales = 0
    if is_quantised:
        scales = 4 * (2 * BLOCK_LEN if per == "token" else block_pages * (dim + value_dim))

    def with_staged(num_staged: int) -> Tiles:
        fixed = rows * (dim * 2 + 2 * BLOCK_LEN * 2 + _out_step(value_dim) * 4 + 4)
        fixed += num_staged * num_halves * BLOCK_LEN * (dim + value_dim) * 2
        fixed += num_staged * scales if per == "token" else 0  # which are kept until products have been scaled
        num_stages = max(0, min(max_stages, (SHARED_BYTES - fixed) // (stage + scales)))
        return Tiles(num_stages, num_staged, num_halves, fixed + num_stages * (stage + scales))

    if not is_quantised:
        return with_staged(0)
    two = with_staged(2)
    return two if two.num_stages >= 2 else with_staged(1)  # a ring of one hides little


@any_lists
def paged_attention(
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
    """See `api.paged_attention`. `num_consumers` warpgroups attend in a thread block: 2 are for chunks, on Hopper, of pages that are
    not quantised."""
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
    tiles = fit(dim, value_dim, format, per, num_consumers, block_pages, max_stages or MAX_STAGES)

    first, last = bounds(query_positions, kv_lens, window, tile_len)
    lists = live_pages(page_table, page_starts, first, last, num_sinks, page_size, window, words)
    pages, starts, counts, first, last = (x.reshape(items, *x.shape[2:]) for x in (*lists[:3], first, last))
    pieces = split(counts, block_pages, max(1, (num_pieces or PIECES) // num_kv_heads), pages.shape[1])
    rows = tiled(queries, tile_len, 0).reshape(items, tile_len, num_kv_heads, group, dim).swapaxes(1, 2)
    rows = rows.reshape(items, num_kv_heads, num_rows, dim)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padded_rows - num_rows), (0, 0)))
    rows, row_scales = _fitted(rows, dtype)

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

    scratch = _scratch(tiles, dim, value_dim, key_pages, dtype, block_pages, num_consumers, with_page_mass, chip)
    accumulating = accumulators(chip, BLOCK_LEN, *(one.size for one in _stripes(value_dim)))

    def kernel(*refs: Any) -> None:
        """Gives every ref its name."""
        inputs, refs = refs[: len(given)], refs[len(given) :]
        outputs, refs = refs[: len(out_type)], refs[len(out_type) :]
        mine, memory = refs[: len(scratch)], refs[len(scratch) :]
        named = dict(zip(names, jax.tree.unflatten(structure, inputs), strict=True))
        named |= dict(zip(out_type, outputs, strict=True)) | dict(zip(scratch, mine, strict=True))
        _Piece(
            named,
            memory=memory,
            tiles=tiles,
            page_size=page_size,
            num_sinks=num_sinks if window is not None else None,
            soft_cap=soft_cap,
            scale=scale,
            per=per if is_quantised else None,
            num_consumers=num_consumers,
            steps={"keys": _step(dim, key_pages), "values": _step(value_dim, value_pages)},
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
    """The type of 16 bits that products of keys are computed in. Hopper turns 8-bit floats into float16 at once, into bfloat16
    not."""
    if not isinstance(pages, Quantised):
        return pages.dtype
    is_half = queries == jnp.float16 or (pages.format == "fp8" and pages.per == "token")
    return jnp.dtype(jnp.float16 if is_half else jnp.bfloat16)


def _fitted(rows: Float[Array, "N K R D"], dtype: Any) -> tuple[Array, Array | None]:
    """Queries in the type of their products, and what each row's scores are to be multiplied with, where float16 could not hold them:
    powers of two, so that nothing is lost."""
    if dtype != jnp.float16 or rows.dtype == jnp.float16:
        return rows.astype(dtype), None
    largest = jnp.abs(rows.astype(jnp.float32)).max(axis=3)
    exponents = jnp.where(jnp.isfinite(largest) & (largest > 0), jnp.frexp(largest)[1], 0)
    scales = jnp.exp2(exponents.astype(jnp.float32))
    return (rows.astype(jnp.float32) / scales[..., None]).astype(dtype), scales


def _scratch(
    tiles: Tiles,
    dim: int,
    value_dim: int,
    key_pages: Pages,
    dtype: Any,
    block_pages: int,
    num_consumers: int,
    with_page_mass: bool,
    chip: Chip,
) -> dict[str, Any]:
    """What a thread block keeps in shared memory, by name."""
    rows, stripe, depth, block_len = ROWS * num_consumers, _stripes(value_dim)[0].size, tiles.num_stages, BLOCK_LEN
    # Weights times scales may be of any size, which float16 could not hold; what is quantised is exact in both.
    of_weights = jnp.dtype(jnp.bfloat16) if isinstance(key_pages, Quantised) else dtype
    of_keys, of_values = _step(dim, key_pages), _step(value_dim, key_pages)
    scratch = {
        "queries": shared((rows, dim), dtype, of_keys),
        "weights": shared((2, rows, block_len), of_weights, of_values),
        "sums_out": shared((rows, _out_step(value_dim)), jnp.float32, _out_step(value_dim)),
        "lse_out": plgpu.SMEM((rows,), jnp.float32),
        "queries_arrived": plgpu.Barrier(),
    }
    num_arrivals = 1
    if isinstance(key_pages, Quantised):
        payload, staged = key_pages.dtype, tiles.num_staged * tiles.num_halves
        halved = 2 if key_pages.format == "int4" else 1
        num_arrivals = 2
        for name, width in (("keys", dim), ("values", value_dim)):
            ring = (depth, block_len, width // halved)
            scratch[f"{name}_ring"] = shared(ring, payload, _step(width, key_pages))
            by_token = (depth + tiles.num_staged, block_len)
            of_scales = by_token if key_pages.per == "token" else (depth, block_pages, width)
            scratch[f"{name}_scales"] = plgpu.SMEM(of_scales, jnp.float32)
            scratch[f"{name}_staged"] = plgpu.Barrier(num_barriers=tiles.num_staged)
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
        scratch["silenced"] = plgpu.Barrier(num_barriers=tiles.num_stages)
    if with_page_mass:
        scratch["pages_out"] = plgpu.SMEM((num_consumers * block_pages, ROWS), jnp.float32)
    return scratch


class _Piece(Named):
    """One piece, in the kernel: entries [begin, begin + count) of an item's list of pages, for one KV head."""

    def __init__(self, refs: dict[str, Any], **options: Any) -> None:
        super().__init__({"words": None, "row_scales": None, **refs, **options})
        piece, self.head = lax.axis_index("piece"), lax.axis_index("head")
        self.piece = piece
        self.item, self.begin, self.count = self.pieces[piece, 0], self.pieces[piece, 1], self.pieces[piece, 2]
        self.block_pages = BLOCK_LEN // self.page_size
        self.num_blocks = pl.cdiv(self.count, self.block_pages)
        self.num_stages, self.num_halves = self.tiles.num_stages, self.tiles.num_halves
        self.down = plgpu.Layout.WGMMA.reduce(1)

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        if self.num_consumers == 2:
            pl.when(self.count > 0)(lambda: self.attend(warpgroup))
            return
        pl.when((warpgroup == 1) & (self.count > 0))(self.produce)
        pl.when((warpgroup == 0) & (self.count > 0))(lambda: self.attend(0))

    # Pages: asked for, and turned into 16 bits.

    def fetch_queries(self) -> None:
        rows = self.rows.at[self.item, self.head]
        plgpu.copy_gmem_to_smem(rows, self.queries.at[pl.ds(0, rows.shape[0])], self.queries_arrived)

    def fetch(self, number: Any) -> None:
        """Asks for a block's pages."""
        stage = lax.rem(number, self.num_stages)
        for entry in range(self.block_pages):

            @pl.when(number * self.block_pages + entry < self.count)
            def _(entry=entry):
                page = self.pages[self.item, self.begin + number * self.block_pages + entry]
                place = stage * self.block_pages + entry
                size = self.page_size
                num_parts = self.key_pages[0].shape[2] // size
                part = pl.ds(lax.rem(page, num_parts) * size, size)
                page = lax.div(page, num_parts)
                target = pl.ds(entry * size, size)
                for name in ("keys", "values"):
                    payload, *scales = self.named["key_pages" if name == "keys" else "value_pages"]
                    arrived, ring = self.named[f"{name}_arrived"].at[place], self.named.get(f"{name}_ring")
                    ring = self.named[name] if ring is None else ring
                    plgpu.copy_gmem_to_smem(payload.at[page, self.head, part], ring.at[stage, target], arrived)
                    for one in scales:
                        kept, depth = self.named[f"{name}_scales"], self.num_stages + self.tiles.num_staged
                        if self.per == "token":
                            mine, into = one.at[page, self.head, part], kept.at[lax.rem(number, depth), target]
                        else:
                            mine, into = one.at[page, self.head], kept.at[stage, entry]
                        plgpu.copy_gmem_to_smem(mine, into, arrived)

    def each_page(self, number: Any, do: Any) -> None:
        for entry in range(self.block_pages):
            pl.when(number * self.block_pages + entry < self.count)(partial(do, entry))

    def wait_for(self, arrived: Any, number: Any) -> None:
        """Until a block's pages are there."""
        stage = lax.rem(number, self.num_stages)
        self.each_page(number, lambda entry: plgpu.barrier_wait(arrived.at[stage * self.block_pages + entry]))

    def drain(self, num_slots: int) -> None:
        """A barrier must not end with a phase that its waiter has not seen."""
        done = lambda slot, _: plgpu.barrier_wait(self.free.at[slot])  # noqa: E731
        lax.fori_loop(0, jnp.minimum(self.num_blocks, num_slots), done, None)

    def produce(self) -> None:
        """Asks for pages: as soon as a stage of the ring is free."""
        self.fetch_queries()
        if self.per is None:

            def block(number, _):
                pl.when(number >= self.num_stages)(
                    lambda: plgpu.barrier_wait(self.free.at[lax.rem(number, self.num_stages)])
                )
                self.fetch(number)

            lax.fori_loop(0, self.num_blocks, block, None)
            self.drain(self.num_stages)
            return

        def convert_block(number, _):
            stage, slot = lax.rem(number, self.num_stages), lax.rem(number, self.tiles.num_staged)
            pl.when(number >= self.tiles.num_staged)(lambda: plgpu.barrier_wait(self.free.at[slot]))
            for name in ("keys", "values"):
                self.wait_for(self.named[f"{name}_arrived"], number)
                self.convert(name, stage, slot)
                plgpu.commit_smem()  # all have read the ring and written what products take
                plgpu.barrier_arrive(self.named[f"{name}_staged"].at[slot])
            pl.when(number + self.num_stages < self.num_blocks)(lambda: self.fetch(number + self.num_stages))

        fill = lambda number, _: self.fetch(number)  # noqa: E731
        lax.fori_loop(0, jnp.minimum(self.num_blocks, self.num_stages), fill, None)
        lax.fori_loop(0, self.num_blocks, convert_block, None)
        self.drain(self.tiles.num_staged)

    def convert(self, name: str, stage: Any, slot: Any) -> None:
        """A block of the ring, in the 16 bits of products. Scales of tokens are left to scores and weights, where they are fewer;
        those of channels are multiplied in, and what rounding loses is kept in a second half."""
        ring, into = self.named[f"{name}_ring"], self.named[name]
        is_packed = ring.dtype == jnp.uint8
        width = ring.shape[2]
        step = self.steps[name]
        for at in range(0, width, step):
            raw = plgpu.load(ring.at[stage, :, pl.ds(at, step)], layout=plgpu.Layout.WGMMA)
            numbers = [(at, raw)]
            if is_packed:
                whole = raw.astype(jnp.int32)
                numbers = [
                    (at, lax.shift_right_arithmetic(lax.shift_left(whole, 28), 28)),
                    (at + width, lax.shift_right_arithmetic(lax.shift_left(whole, 24), 28)),
                ]
            for begin, one in numbers:
                columns = pl.ds(begin, step)
                if self.num_halves == 1:
                    is_direct = one.dtype == jnp.int8 or (one.dtype != jnp.int32 and into.dtype == jnp.float16)
                    one = one if is_direct else one.astype(jnp.float32)
                    into[slot, :, columns] = one.astype(into.dtype)
                    continue
                exact = one.astype(jnp.float32) * self.channel_scales(name, stage, columns)
                high = exact.astype(into.dtype)
                into[slot * 2, :, columns] = high
                into[slot * 2 + 1, :, columns] = (exact - high.astype(jnp.float32)).astype(into.dtype)

    def channel_scales(self, name: str, stage: Any, columns: Any) -> Array:
        """[block, columns]: those of each token's page."""
        scales, shape = self.named[f"{name}_scales"], (BLOCK_LEN, columns.size)
        tokens = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        factors = None
        for entry in range(self.block_pages):
            of_page = plgpu.load(scales.at[stage, entry, columns], layout=plgpu.Layout.WGMMA.reduce(0))
            of_page = lax.broadcast_in_dim(of_page, shape, [1])
            factors = of_page if factors is None else jnp.where(tokens >= entry * self.page_size, of_page, factors)
        assert factors is not None
        return factors

    # Attention: block by block.

    def attend(self, consumer: Any) -> None:
        """Of 64 rows over the piece's pages."""
        mine = pl.ds(consumer * ROWS, ROWS)
        value_stripes = _stripes(self.values.shape[2])
        if self.num_consumers == 2:

            @pl.when(consumer == 0)
            def _():
                self.fetch_queries()
                ahead = jnp.minimum(self.num_blocks, self.num_stages - 1)
                lax.fori_loop(0, ahead, lambda number, _: self.fetch(number), None)

        lows, highs = (plgpu.load(one.at[self.item, mine], layout=self.down) for one in (self.row_first, self.row_last))
        if self.row_scales is not None:  # kept where log-sum-exps will be: registers are scarce
            factors = plgpu.load(self.row_scales.at[self.item, self.head, mine], layout=self.down)
            self.lse_out[mine] = factors * self.scale
            plgpu.commit_smem()
        plgpu.barrier_wait(self.queries_arrived)

        def block(number, state):
            sums, highest, total = state
            if self.num_consumers == 2:
                self.fetch_ahead(number, consumer)
            place = lax.rem(number, self.num_stages if self.per is None else self.tiles.num_staged)
            starts, bits = self.listed(number)
            self.wait_to_multiply("keys", number, place)
            scores = self.scored(mine, place)
            if self.per == "token":
                scores = scores * lax.broadcast_in_dim(self.token_scales("keys", number), scores.shape, [1])
            if self.soft_cap is not None:
                scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
            seen = self.seen(starts, bits, lows, highs)
            scores = jnp.where(seen, scores * LOG2_E, -jnp.inf)
            new = jnp.maximum(highest, scores.max(axis=1))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            keep = jnp.exp2(highest - shift)
            exact = jnp.exp2(scores - lax.broadcast_in_dim(shift, scores.shape, [0]))
            total = total * keep + exact.sum(axis=1)
            if "pages_out" in self.named:
                self.leave_page_sums(number, consumer, exact, shift)
            if self.per is not None:
                self.wait_to_multiply("values", number, place)
            if self.per == "token":
                weighed = exact * lax.broadcast_in_dim(self.token_scales("values", number), scores.shape, [1])
                exact = jnp.where(exact > 0, weighed, 0.0)  # the scale of what nobody sees may be anything
            # In two halves of 16 bits the weights lose nothing: the time is in the copies, not here.
            high = exact.astype(self.weights.dtype)
            self.weights[0, mine] = high
            self.weights[1, mine] = (exact - high.astype(jnp.float32)).astype(self.weights.dtype)
            if self.per is None:
                self.wait_to_multiply("values", number, place)
            if not (self.per == "token" and self.values_ring.dtype != jnp.float8_e4m3fn):
                pl.when((consumer == 0) & jnp.logical_not(self.is_whole(starts, bits)))(
                    lambda: self.silence(place, starts, bits)
                )
            plgpu.commit_smem()
            if self.num_consumers == 2:
                # One for each stage: the first of the two may be as far ahead of the other as the ring is deep.
                pl.when(consumer == 0)(lambda: plgpu.barrier_arrive(self.silenced.at[place]))
                pl.when(consumer == 1)(lambda: plgpu.barrier_wait(self.silenced.at[place]))

            scaled = []
            for columns, one in zip(value_stripes, sums, strict=True):

                def terms(add, columns=columns):
                    def of_halves(number, _):
                        half, part = number // self.num_halves, number % self.num_halves
                        values = self.values.at[place * self.num_halves + part, :, columns]
                        add(self.weights.at[half, mine], values, first=number == 0)

                    if self.num_halves == 2:  # unrolled they spill, as do two in a loop
                        lax.fori_loop(0, 4, of_halves, None)
                    else:
                        of_halves(0, None)
                        of_halves(1, None)

                part = product(self.memory, columns.size, terms)
                scaled.append(one * lax.broadcast_in_dim(keep, one.shape, [0]) + part)
            plgpu.barrier_arrive(self.free.at[place])
            return tuple(scaled), new, total

        def filled(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        state = (
            tuple(filled((ROWS, one.size), 0, plgpu.Layout.WGMMA) for one in value_stripes),
            filled((ROWS,), -jnp.inf, self.down),
            filled((ROWS,), 0, self.down),
        )
        sums, highest, total = lax.fori_loop(0, self.num_blocks, block, state)
        if self.num_consumers == 2:
            pl.when(consumer == 0)(lambda: self.drain(self.num_stages))
        divisor = jnp.where(total == 0, 1.0, total)
        out = pl.ds(consumer * ROWS, self.padded_rows)
        self.lse_out[mine] = jnp.where(total == 0, -jnp.inf, (highest + jnp.log2(divisor)) / LOG2_E)
        step = self.sums_out.shape[1]
        for columns, one in zip(value_stripes, sums, strict=True):
            shares = one / lax.broadcast_in_dim(divisor, one.shape, [0])
            for at in range(0, columns.size, step):
                plgpu.wait_smem_to_gmem(0)
                self.sums_out[mine] = shares[:, at : at + step]
                plgpu.commit_smem()
                into = self.outputs.at[self.piece, self.head, out, pl.ds(columns.start + at, step)]
                plgpu.copy_smem_to_gmem(self.sums_out.at[out], into)
        plgpu.copy_smem_to_gmem(self.lse_out.at[out], self.log_sum_exp.at[self.piece, self.head, out])
        plgpu.wait_smem_to_gmem(0)

    def fetch_ahead(self, number: Any, consumer: Any) -> None:
        """What the first of two that attend asks for, into the stage that the block before has left."""
        ahead = number + self.num_stages - 1

        @pl.when((consumer == 0) & (ahead < self.num_blocks))
        def _():
            pl.when(number > 0)(lambda: plgpu.barrier_wait(self.free.at[lax.rem(ahead, self.num_stages)]))
            self.fetch(ahead)

    def wait_to_multiply(self, name: str, number: Any, place: Any) -> None:
        if self.per is None:
            self.wait_for(self.named[f"{name}_arrived"], number)
        else:
            plgpu.barrier_wait(self.named[f"{name}_staged"].at[place])

    def token_scales(self, name: str, number: Any) -> Array:
        """[block]."""
        scales = self.named[f"{name}_scales"]
        place = lax.rem(number, self.num_stages + self.tiles.num_staged)
        return plgpu.load(scales.at[place], layout=plgpu.Layout.WGMMA.reduce(0))

    def listed(self, number: Any) -> tuple[list[Any], list[tuple[int, Any]]]:
        """First positions of a block's pages; and of its slots' validity, where those of each word begin, and the word."""
        entries = [number * self.block_pages + entry for entry in range(self.block_pages)]
        last = self.begin + self.count - 1

        def of_entry(one, read, unused):
            return jnp.where(one < self.count, read(jnp.minimum(self.begin + one, last)), unused)

        starts = [of_entry(one, lambda at: self.starts[self.item, at], NOWHERE) for one in entries]
        bits, words = [], self.words
        if words is not None:
            span = min(self.page_size, WORD)
            for place in range(0, BLOCK_LEN, span):
                one, word = entries[place // self.page_size], place % self.page_size // span
                bits.append((place, of_entry(one, lambda at, word=word: words[self.item, at, word], 0)))
        return starts, bits

    def scored(self, mine: Any, place: Any) -> Array:
        """Scaled products of rows with a block's keys."""

        def terms(add):
            width, num_halves = _stripes(self.queries.shape[1])[0].size, self.num_halves

            def stripe(number, _):  # a loop: unrolled over 256 dims it spills
                columns, part = pl.ds(lax.div(number, num_halves) * width, width), lax.rem(number, num_halves)
                keys = self.keys.at[place * num_halves + part, :, columns].transpose((1, 0))
                add(self.queries.at[mine, columns], keys, first=number == 0)

            lax.fori_loop(0, self.queries.shape[1] // width * num_halves, stripe, None)

        scores = product(self.memory, BLOCK_LEN, terms)
        if self.row_scales is None:
            return scores * self.scale
        factors = plgpu.load(self.lse_out.at[mine], layout=self.down)
        return scores * lax.broadcast_in_dim(factors, scores.shape, [0])

    def positions_of(self, slots: Array, starts: list[Any]) -> Array:
        positions = slots + starts[0]
        for entry, start in enumerate(starts[1:], 1):
            begin = entry * self.page_size
            positions = jnp.where(slots >= begin, slots + (start - begin), positions)
        return positions

    def only_valid(self, seen: Array, slots: Array, bits: list[tuple[int, Any]]) -> Array:
        if not bits:
            return seen
        of_slot = jnp.zeros_like(slots)
        for place, word in bits:
            of_slot = jnp.where(slots >= place, word, of_slot)
        span = min(self.page_size, WORD)
        return seen & (lax.shift_right_logical(of_slot, lax.rem(slots, span)) & 1 > 0)

    def seen(self, starts: list[Any], bits: list[tuple[int, Any]], lows: Array, highs: Array) -> Array:
        """[rows, block]."""
        shape = (ROWS, BLOCK_LEN)
        slots = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        positions = self.positions_of(slots, starts)
        seen = self.only_valid(positions <= lax.broadcast_in_dim(highs, shape, [0]), slots, bits)
        if self.num_sinks is None:
            return seen
        inside = positions >= lax.broadcast_in_dim(lows, shape, [0])
        return seen & (inside | (positions < self.num_sinks))

    def is_whole(self, starts: list[Any], bits: list[tuple[int, Any]]) -> Any:
        """Whether every row sees all of a block."""
        low, high = self.whole[self.item, 0], self.whole[self.item, 1]
        is_whole = True
        for start in starts:
            is_whole = is_whole & (start >= low) & (start + self.page_size - 1 <= high)
        span = min(self.page_size, WORD)
        for _, word in bits:
            is_whole = is_whole & (word == ((1 << span) - 1 if span < WORD else -1))
        return is_whole

    def silence(self, place: Any, starts: list[Any], bits: list[tuple[int, Any]]) -> None:
        """A weight of zero does not silence a NaN: what no row sees is replaced."""
        slots = plgpu.broadcasted_iota(jnp.int32, (BLOCK_LEN,), 0, layout=self.down)
        places = self.positions_of(slots, starts)

        def of_token(token, readable):
            seen = places <= self.last[self.item, token]
            seen = seen & ((places >= self.first[self.item, token]) | (places < self.num_sinks))
            return jnp.where(seen, 1, readable)

        if self.num_sinks is None:
            readable = jnp.where(places <= self.whole[self.item, 2], 1, 0)
        else:
            nothing = plgpu.layout_cast(jnp.zeros((BLOCK_LEN,), jnp.int32), self.down)
            readable = lax.fori_loop(0, self.last.shape[1], of_token, nothing)
        readable = jnp.where(self.only_valid(readable > 0, slots, bits), 1, 0)
        # With the columns that products take at once, or fewer, as it spills less: of one half 32 bytes else, of two the other way.
        step = self.steps["values"] if self.num_halves == 1 else _stripes(self.values.shape[2])[0].size
        for at in range(0, self.values.shape[2], step):
            for part in range(self.num_halves):
                values = self.values.at[place * self.num_halves + part, :, pl.ds(at, step)]
                kept = plgpu.load(values, layout=plgpu.Layout.WGMMA)
                keeps = lax.broadcast_in_dim(readable, kept.shape, [0]) > 0
                values[...] = jnp.where(keeps, kept, jnp.zeros((), kept.dtype))

    def leave_page_sums(self, number: Any, consumer: Any, exact: Array, shift: Array) -> None:
        """The log-sum-exp of each of a block's pages."""
        slots = plgpu.broadcasted_iota(jnp.int32, exact.shape, 1, layout=plgpu.Layout.WGMMA)
        plgpu.wait_smem_to_gmem(0)
        for entry in range(self.block_pages):
            begin, mine = entry * self.page_size, exact
            if self.block_pages > 1:
                mine = jnp.where((slots >= begin) & (slots < begin + self.page_size), exact, 0.0)
            total = mine.sum(axis=1)
            logs = jnp.where(total == 0, -jnp.inf, (jnp.log2(jnp.where(total == 0, 1.0, total)) + shift) / LOG2_E)
            self.pages_out[consumer * self.block_pages + entry] = logs
        plgpu.commit_smem()

        def leave(entry):
            place = self.begin + number * self.block_pages + entry
            rows = pl.ds(consumer * ROWS, self.padded_rows)
            source = self.pages_out.at[consumer * self.block_pages + entry, pl.ds(0, self.padded_rows)]
            plgpu.copy_smem_to_gmem(source, self.page_log_sum_exp.at[self.item, self.head, place, rows])

        self.each_page(number, leave)


def _step(width: int, pages: Pages) -> int:
    """Columns that are laid out together, and turned into 16 bits at once: more would not fit into registers."""
    if not isinstance(pages, Quantised):
        return math.gcd(width, 64)
    return math.gcd(width // 2 if pages.format == "int4" else width, 32 if width > 128 else 64)


def _out_step(value_dim: int) -> int:
    """Columns of outputs that leave at once."""
    return math.gcd(_stripes(value_dim)[0].size, 32)


def _stripes(num_dims: int) -> list[Any]:
    """The dims of keys or values in equal parts of at most COLUMNS."""
    width = num_dims if num_dims <= COLUMNS else math.gcd(num_dims, COLUMNS)
    return [pl.ds(at, width) for at in range(0, num_dims, width)]
