"""Tokens into pages on Hopper and Blackwell GPUs in Pallas Mosaic, quantised on the way.

A thread block takes a tile of up to 64 tokens of one sequence and KV head, cut where pages begin; single tokens are
`gpu_single`'s. It comes by TMA. In the pages' own type it leaves again as it is; else it is turned into numbers and
scales in registers. Where the tile holds a whole page, or 64 slots of a longer one, these leave by one TMA; other
tokens row by row, each from an address that a TMA can read. Scales of tokens are left in tiles, which XLA puts in their
places: four bytes are too few for a copy."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import Quantised, Stored, arrays_of, numbers
from pallas_kernels.kv_write import gpu_single
from pallas_kernels.kv_write.gpu_tile import STEP, Tile, stored
from pallas_kernels.kv_write.reference import KERNEL_FORMATS, channel_scales, places
from pallas_kernels.pages import Pages
from pallas_kernels.rounding import inverses
from pallas_kernels.selection import Asked
from pallas_kernels.tensor_cores import ROWS, Chip, shared, store_plainly
from pallas_kernels.typing import Float, Int32

ALIGNMENT = 128
"""Bytes to which a TMA's address in shared memory is aligned."""
GROUP = 8
"""Rows that lie together in shared memory which registers are loaded from. A copy there must begin at a multiple: else
it leaves zeros in place of the rows that are in the next group, and nothing says so."""


def refusal(asked: Asked) -> str | None:
    """Why this kernel cannot write into such pages; None: it can."""
    format, page_size, head_dims, token_type = asked.format, asked.page_size, asked.head_dims, jnp.dtype(asked.dtype)
    if token_type not in (jnp.bfloat16, jnp.float16):
        return f"tokens of {token_type.name}: must be bfloat16 or float16"
    if asked.schemes is not None or (format not in KERNEL_FORMATS and format != token_type.name):
        said = f"must be of the tokens' type {token_type.name}, or {', '.join(KERNEL_FORMATS)} with scales of float32"
        return f"pages of {asked.stored_as}: {said}"
    sizes = (32,) if format in KERNEL_FORMATS else (8, 16, 32)
    if page_size not in sizes and page_size % ROWS:
        legal = ", ".join(map(str, sizes))
        return f"page_size = {page_size}: must be {legal} or a multiple of {ROWS} for pages of {format}"
    step = {"int8": 32, "fp8": 32, "int4": 64}.get(format, 16)
    if any(dim % step or not step <= dim <= 256 for dim in head_dims):
        return f"head dims = {head_dims}: must be multiples of {step} in [{step}, 256] for pages of {format}"
    return None


def kv_write(
    pages: Pages,
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K Dv"] | None,
    write_slots: Int32[Array, "B T"],
    *,
    chip: Chip | None = None,
    interpret: Any = False,
) -> Pages:
    """See `api.kv_write`. It multiplies nothing: it is the same for every `chip`."""
    del chip
    given = [keys] if values is None else [keys, values]
    if write_slots.shape[1] == 1:
        return gpu_single.write(pages, given, write_slots, interpret=interpret)
    num_pages, page_size = pages.num_pages, pages.page_size
    tiles = tiles_of(write_slots, num_pages, page_size, step=1 if pages.per is None else GROUP)
    tokens = [_filled_up(new, pool) for pool, new in zip(pages.pools, given, strict=True)]
    pools = list(pages.pools)
    for at, (pool, new) in enumerate(zip(pages.pools, given, strict=True)):
        if isinstance(pool, Quantised) and pool.per == "channel":
            scales = channel_scales(pool, new, *places(write_slots, num_pages, page_size))
            pools[at] = replace(pool, scales=scales)
    targets = [jax.new_ref(arrays_of(pool)[0]) for pool in pools]
    made = _write_tiles(pages, pools, tokens, targets, tiles, interpret)

    def done(at: int) -> Stored:
        pool, payload = pools[at], jax.freeze(targets[at])
        if not isinstance(pool, Quantised):
            return payload
        kept = pool.scales
        if pool.per == "token":
            listed, offsets = places(tiles[1], num_pages, page_size)
            kept = kept.at[listed, :, offsets].set(made[at].swapaxes(1, 2), mode="drop")
        return replace(pool, payload=payload, scales=kept)

    return replace(pages, keys=done(0), values=None if pages.is_latent else done(1))


def _write_tiles(
    pages: Pages, pools: list[Stored], tokens: list[Array], targets: list[Any], tiles: tuple[Array, ...], interpret: Any
) -> list[Array]:
    """Runs the kernel over `tiles_of` tokens, for keys and values; returns the scales of tokens [tiles, K, 64], if
    they have some."""
    begins, slots, wholes = tiles
    per, page_size, num_kv_heads, sides = pages.per, pages.page_size, pages.num_kv_heads, len(pools)
    scratch = [_scratch(pool, new) for pool, new in zip(pools, tokens, strict=True)]
    left = jax.ShapeDtypeStruct((len(begins), num_kv_heads, ROWS), jnp.float32)
    scales = [arrays_of(pool)[1] for pool in pools] if per == "channel" else []
    static: dict[str, Any] = {"per": per, "format": pages.format, "page_size": page_size, "unit": min(page_size, ROWS)}

    def kernel(begins: Any, slots: Any, wholes: Any, *given: Any) -> None:
        """Gives every ref its name."""
        refs = list(given)
        sources, into = ([refs.pop(0) for _ in range(sides)] for _ in range(2))
        tile, head = lax.div(lax.axis_index("item"), num_kv_heads), lax.rem(lax.axis_index("item"), num_kv_heads)
        channels = [refs.pop(0) for _ in scales]
        outs = [refs.pop(0) for _ in range(sides if per == "token" else 0)]
        parts = []
        for at, (source, target) in enumerate(zip(sources, into, strict=True)):
            mine: dict[str, Any] = {name: refs.pop(0) for name in scratch[at]} | static | {"tile": tile, "head": head}
            mine |= {"source": source, "target": target, "begins": begins, "slots": slots, "wholes": wholes}
            mine |= {"channel_scales": channels[at]} if channels else {}
            mine |= {"scales_left": outs[at]} if outs else {}
            parts.append(_Tile(**mine))

        @pl.when(begins[tile] >= 0)
        def _():
            for part in parts:
                part.fetch()
            for part in parts:
                part.leave()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        kernel,
        out_type=[left] * sides if per == "token" else [],
        scratch_types=[room for mine in scratch for room in mine.values()],
        grid=(len(begins) * num_kv_heads,),  # one axis: only the last may have more than 65,535
        grid_names=("item",),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=False, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(begins, slots, wholes, *tokens, *targets, *scales)


def _filled_up(tokens: Float[Array, "B T K D"], pool: Stored) -> Float[Array, "N K wide"]:
    """With what copies want: a whole tile of rows, in whole groups; and where pages are of the
    tokens' type, rows that begin at addresses which a TMA can read."""
    missing = _missing(tokens.shape[0] * tokens.shape[1])
    narrower = 0 if isinstance(pool, Quantised) else -tokens.shape[3] % (ALIGNMENT // tokens.dtype.itemsize)
    return jnp.pad(tokens.reshape(-1, *tokens.shape[2:]), ((0, missing), (0, 0), (0, narrower)))


def _scratch(pool: Stored, tokens: Float[Array, "N K wide"]) -> dict[str, Any]:
    """Of keys or of values."""
    dim, wide, plain = pool.shape[3], tokens.shape[2], plgpu.SMEM((ROWS, tokens.shape[2]), tokens.dtype)
    if not isinstance(pool, Quantised):
        if dim == wide:
            return {"arrived": plgpu.Barrier(), "tokens": plain}
        tight = plgpu.SMEM((ROWS, dim), tokens.dtype)  # as units leave
        return {"arrived": plgpu.Barrier(num_arrivals=2), "tokens": tight, "token_rows": plain}
    width = pool.payload.shape[3]
    return {
        "arrived": plgpu.Barrier(num_arrivals=1 if pool.per == "token" else 2),
        "tokens": shared((ROWS, dim), tokens.dtype, STEP),
        "payload": shared((ROWS, width), pool.dtype, STEP),
        "rows": plgpu.SMEM((ROWS, -(-width // ALIGNMENT) * ALIGNMENT), pool.dtype),
    } | ({"scales": plgpu.SMEM((ROWS,), jnp.float32)} if pool.per == "token" else {"token_rows": plain})


def tiles_of(
    write_slots: Int32[Array, "B T"], num_pages: int, page_size: int, *, step: int
) -> tuple[Int32[Array, "N"], Int32[Array, "N 64"], Int32[Array, "N units"]]:
    """For every tile: the first of its tokens, a multiple of `step` as rows of [B * T], -1 where it has none; and the
    slot of each, negative where there is none. Of each unit of its rows, a page or a whole tile: whether it fills
    one."""
    batch, num_tokens = write_slots.shape
    unit = min(page_size, ROWS)
    pages, _ = places(write_slots, num_pages, page_size)
    slots = jnp.where(pages < num_pages, write_slots, -page_size)  # whose page is -1
    total = batch * num_tokens
    # A row's tiles end where its pages do, wherever its first token is: the first has only what is missing of a unit.
    shift = jnp.where(slots[:, 0] < 0, 0, slots[:, 0] % unit)[:, None]
    shift = jnp.where(shift > 0, shift + ROWS - unit, 0)
    first = jnp.arange(batch, dtype=jnp.int32)[:, None] * num_tokens
    shift = jnp.where((first - shift) % step == 0, shift, first % step)  # or, where none may begin so, anywhere
    numbers = jnp.arange((num_tokens + ROWS - 2) // ROWS + 1, dtype=jnp.int32)[None]
    ends = jnp.minimum(numbers * ROWS - shift + ROWS, num_tokens)
    begins = jnp.minimum(jnp.maximum(numbers * ROWS - shift, 0), ends)
    loaded = (first + numbers * ROWS - shift).reshape(-1)
    begins, ends = (first + begins).reshape(-1), (first + ends).reshape(-1)
    filled_up = total + _missing(total)
    loaded = jnp.clip(loaded, 0, filled_up - ROWS)  # the last tile must not reach past the end
    tokens = loaded[:, None] + jnp.arange(ROWS, dtype=jnp.int32)[None]
    mine = (tokens >= begins[:, None]) & (tokens < ends[:, None])
    tile_slots = jnp.where(mine, slots.reshape(-1)[jnp.minimum(tokens, total - 1)], -page_size)
    units = tile_slots.reshape(len(begins), -1, unit)
    steps = jnp.arange(unit, dtype=jnp.int32)[None, None]
    wholes = (units[..., :1] % unit == 0) & (units == units[..., :1] + steps) & (units[..., :1] >= 0)
    loaded = jnp.where((tile_slots >= 0).any(axis=1), loaded, -1)
    return loaded, tile_slots, wholes.all(axis=2).astype(jnp.int32)


def _missing(num_rows: int) -> int:
    """Of rows, to make a whole tile of them, and whole groups."""
    return max(ROWS - num_rows, -num_rows % GROUP)


@dataclass(kw_only=True)
class _Tile(Tile):
    """Keys or values of one tile and head, in the kernel."""

    source: Any
    target: Any
    begins: Any
    slots: Any
    wholes: Any
    tile: Any
    head: Any
    arrived: Any
    per: str | None
    page_size: int
    unit: int
    token_rows: Any = None
    """The tokens again, to read, or to leave, one by one."""
    rows: Any = None
    """The payload again, to leave one by one."""
    scales: Any = None
    scales_left: Any = None
    channel_scales: Any = None

    def fetch(self) -> None:
        rows = pl.ds(self.begins[self.tile], ROWS)
        for into in (self.tokens, self.token_rows):
            if into is not None:
                columns = pl.ds(0, into.shape[1])
                plgpu.copy_gmem_to_smem(self.source.at[rows, self.head, columns], into, self.arrived)

    def leave(self) -> None:
        """Into the pages."""
        plgpu.barrier_wait(self.arrived)
        packed, rows = self.tokens, self.tokens if self.token_rows is None else self.token_rows
        if self.per is not None:
            packed, rows = self.payload, self.rows
            if self.per == "token":
                scale = self.scales_by_token()
                self.scales[...] = scale
                self.quantise_by_token(scale, self.store)
            else:
                self.quantise_by_channel()
        plgpu.commit_smem()
        if self.per == "token":
            plgpu.copy_smem_to_gmem(self.scales, self.scales_left.at[self.tile, self.head])

        def unit(number, _):
            is_whole = self.wholes[self.tile, number] > 0
            pl.when(is_whole)(partial(self.leave_unit, number, packed))
            pl.when(jnp.logical_not(is_whole))(partial(self.leave_rows, number, rows))

        lax.fori_loop(0, ROWS // self.unit, unit, None)

    def leave_unit(self, number: Any, packed: Any) -> None:
        slot = self.slots[self.tile, number * self.unit]
        there = pl.ds(lax.rem(slot, self.page_size), self.unit)
        source = packed.at[pl.ds(number * self.unit, self.unit)]
        plgpu.copy_smem_to_gmem(source, self.target.at[lax.div(slot, self.page_size), self.head, there])

    def leave_rows(self, number: Any, rows: Any) -> None:
        def row(place, _):
            slot = self.slots[self.tile, place]

            @pl.when(slot >= 0)
            def _():
                page, offset = lax.div(slot, self.page_size), lax.rem(slot, self.page_size)
                target = self.target.at[page, self.head, pl.ds(offset, 1)]
                source = rows.at[pl.ds(place, 1), pl.ds(0, target.shape[1])]
                plgpu.copy_smem_to_gmem(source, target)

        lax.fori_loop(number * self.unit, (number + 1) * self.unit, row, None)

    def store(self, into: Any, made: Array) -> None:
        """To leave as whole units, and row by row."""
        self.payload[:, into] = made
        store_plainly(self.rows.at[:, into], made)

    def quantise_by_channel(self) -> None:
        """Unit by unit where all are of one page, else token by token."""

        def unit(number, _):
            is_whole = self.wholes[self.tile, number] > 0
            pl.when(is_whole)(partial(self.quantise_unit, number))
            pl.when(jnp.logical_not(is_whole))(partial(self.quantise_rows, number))

        lax.fori_loop(0, ROWS // self.unit, unit, None)

    def inverses_of(self, page: Any, columns: Any) -> Array:
        """[columns]: one over each channel's scale."""
        scales = self.channel_scales.at[page, self.head, columns]
        scale = plgpu.load(scales, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        return inverses(scale)

    def quantise_unit(self, number: Any) -> None:
        page = lax.div(self.slots[self.tile, number * self.unit], self.page_size)

        def quantise(into, columns, _):
            halves = []
            for half in columns:
                exact = self.load(half)
                inverse = lax.broadcast_in_dim(self.inverses_of(page, half), exact.shape, [1])
                halves.append(numbers(exact * inverse, self.format))
            wide = jnp.float32 if self.payload.dtype == jnp.float8_e4m3fn else jnp.int32  # in which to choose
            made = stored(halves, wide)
            if self.unit < ROWS:  # the other rows are other pages'
                rows = plgpu.broadcasted_iota(jnp.int32, made.shape, 0, layout=plgpu.Layout.WGMMA)
                old = plgpu.load(self.payload.at[:, into], layout=plgpu.Layout.WGMMA).astype(wide)
                mine = (rows >= number * self.unit) & (rows < (number + 1) * self.unit)
                made = jnp.where(mine, made, old)
            self.payload[:, into] = made.astype(self.payload.dtype)

        self.each_stripe(quantise)

    def quantise_rows(self, number: Any) -> None:
        down = plgpu.Layout.WGMMA.reduce(0)

        def row(place, _):
            page = lax.div(self.slots[self.tile, place], self.page_size)

            def quantise(into, columns, _):
                halves = []
                for half in columns:
                    exact = plgpu.load(self.token_rows.at[place, half], layout=down).astype(jnp.float32)
                    halves.append(numbers(exact * self.inverses_of(page, half), self.format))
                self.rows[place, into] = stored(halves, self.payload.dtype)

            pl.when(page >= 0)(lambda: self.each_stripe(quantise))

        lax.fori_loop(number * self.unit, (number + 1) * self.unit, row, None)
