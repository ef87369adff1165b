"""One token of each sequence into pages on GPUs: what decoding writes.

    grid = {keys, values} x sequences
      one TMA in: the token's KV heads [K, D]
      registers: largest -> scale -> numbers, where pages are quantised
      one TMA out: its slot in the page's K heads; scales by token one by one, 4 bytes are too few for a copy

A thread block has one token, so that none waits for another's, and nothing is left to XLA: a write is one launch.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import Quantised, Stored, arrays_of, numbers, scales_of
from pallas_kernels.kv_write.gpu_tile import STEP, Tile, stored
from pallas_kernels.pages import Pages
from pallas_kernels.rounding import inverses
from pallas_kernels.tensor_cores import ROWS, shared, store_plainly
from pallas_kernels.typing import Float, Int32

WARPS = 4
"""Of a thread block."""
BYTES = 128
"""Copies from global memory are of a multiple: a byte for each thread of a thread block."""


def write(
    pages: Pages, given: list[Float[Array, "B 1 K _"]], write_slots: Int32[Array, "B 1"], *, interpret: Any = False
) -> Pages:
    """See `api.kv_write`; `given` are keys, and values where pages have some."""
    num_slots, num_kv_heads, page_size = pages.num_pages * pages.page_size, pages.num_kv_heads, pages.page_size
    pools, per, format = pages.pools, pages.per, pages.format
    heads = max(number for number in range(1, ROWS + 1) if num_kv_heads % number == 0)
    num_groups = num_kv_heads // heads
    tokens = [_filled_up(new.reshape(-1, new.shape[3]), heads) for new in given]
    scratch = [_scratch(pool, new, heads) for pool, new in zip(pools, tokens, strict=True)]
    if len(given) == 2 and given[0].shape == given[1].shape:  # a block has but one of them
        scratch[1] = {}
    targets = [jax.new_ref(array) for pool in pools for array in arrays_of(pool)]

    def kernel(slots: Any, *rest: Any) -> None:
        """Gives every ref its name."""
        item, at = lax.axis_index("item"), lax.axis_index("array")
        slot = slots[lax.div(item, num_groups)]
        is_inside = (slot >= 0) & (slot < num_slots)
        named = {"heads": heads, "per": per, "format": format, "item": item, "is_tiled": heads % 8 == 0}
        named |= {"page": lax.div(slot, page_size), "offset": lax.rem(slot, page_size)}
        named["first_head"] = lax.rem(item, num_groups) * heads
        refs = list(rest)
        sources = [refs.pop(0) for _ in pools]
        mine = [{name: refs.pop(0) for name in ("target", *(["scale_target"] if per else []))} for _ in pools]
        rooms = [{name: refs.pop(0) for name in room} for room in scratch]
        for number, source in enumerate(sources):
            token = _Token(**named, **mine[number], **(rooms[number] or rooms[0]), source=source)
            pl.when(is_inside & (at == number))(token.write)

    plgpu.kernel(
        kernel,
        out_type=[],
        scratch_types=[room for mine in scratch for room in mine.values()],
        grid=(len(pools), write_slots.size * num_groups),  # the last may be as long as any
        grid_names=("array", "item"),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=False, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(write_slots.reshape(-1), *tokens, *targets)
    written = [jax.freeze(target) for target in targets]
    done: list[Stored] = list(written)
    if per is not None:
        held = iter(written)
        done = [replace(pool, payload=next(held), scales=next(held)) for pool in pools if isinstance(pool, Quantised)]
    return replace(pages, keys=done[0], values=None if pages.is_latent else done[1])


def _filled_up(tokens: Float[Array, "N D"], heads: int) -> Float[Array, "more D"]:
    """With the rows that the last of them is fetched with."""
    missing = _rows_fetched(tokens, heads) - heads
    return jnp.pad(tokens, ((0, missing), (0, 0))) if missing else tokens


def _rows_fetched(tokens: Any, heads: int) -> int:
    """Of an array [N, D] or a ref: as many as are wanted, or the next that make whole `BYTES`."""
    step = BYTES // math.gcd(BYTES, tokens.shape[1] * tokens.dtype.itemsize)
    return -(-heads // step) * step


def _scratch(pool: Stored, tokens: Float[Array, "N D"], heads: int) -> dict[str, Any]:
    """Of keys or of values."""
    dim = tokens.shape[1]
    if not isinstance(pool, Quantised):
        return {"arrived": plgpu.Barrier(), "tokens": plgpu.SMEM((_rows_fetched(tokens, heads), dim), tokens.dtype)}

    def rows(width: int, dtype: Any) -> Any:
        """The heads' rows, and others of which nothing is wanted, for a warpgroup has 64. A tile is of 8 rows."""
        return shared((ROWS, width), dtype, STEP) if heads % 8 == 0 else plgpu.SMEM((ROWS, width), dtype)

    by_token = pool.per == "token"
    return {
        "arrived": plgpu.Barrier(num_arrivals=1 if by_token else 2),
        "tokens": rows(dim, tokens.dtype),
        "payload": rows(pool.payload.shape[3], pool.dtype),
        "scales": plgpu.SMEM((ROWS,), jnp.float32) if by_token else rows(dim, jnp.float32),
    }


@dataclass(kw_only=True)
class _Token(Tile):
    """The keys or values of one token, in the kernel."""

    source: Any
    target: Any
    item: Any
    page: Any
    offset: Any
    heads: int
    first_head: Any
    arrived: Any
    per: str | None
    scales: Any = None
    scale_target: Any = None

    def __post_init__(self) -> None:
        self.mine, self.there = pl.ds(0, self.heads), pl.ds(self.first_head, self.heads)

    def write(self) -> None:
        fetched = _rows_fetched(self.source, self.heads)
        rows = self.source.at[pl.ds(self.item * self.heads, fetched)]
        plgpu.copy_gmem_to_smem(rows, self.tokens.at[pl.ds(0, fetched)], self.arrived)
        if self.per == "channel":
            plgpu.copy_gmem_to_smem(
                self.scale_target.at[self.page, self.there], self.scales.at[self.mine], self.arrived
            )
        plgpu.barrier_wait(self.arrived)
        if self.per == "token":
            scale = self.scales_by_token()
            self.scales[...] = scale
            self.quantise_by_token(scale, lambda into, made: self.store(self.payload, into, made))
            plgpu.warp_map(self.leave_scales)
        elif self.per == "channel":
            self.quantise_by_channel()
        plgpu.commit_smem()
        leaving = self.tokens if self.per is None else self.payload
        plgpu.copy_smem_to_gmem(leaving.at[self.mine], self.target.at[self.page, self.there, self.offset])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def leave_scales(self, warp: Array) -> None:
        """Of the heads, each warp those of its own."""

        def leave(head: Array) -> None:
            self.scale_target[self.page, self.first_head + head, self.offset] = self.scales[head]

        for first in range(0, self.heads, WARPS):
            pl.when(warp + first < self.heads)(partial(leave, warp + first))

    def store(self, ref: Any, columns: Any, value: Array) -> None:
        if self.is_tiled:
            ref[:, columns] = value
        else:
            store_plainly(ref.at[:, columns], value)

    def quantise_by_channel(self) -> None:
        """With the page's scales. The first token of a page sets them to those that it asks for."""
        opens = self.offset == 0

        def quantise(into, columns, _):
            halves = []
            for half in columns:
                exact = self.load(half)
                scale = jnp.where(opens, scales_of(jnp.abs(exact), self.format), self.load_from(self.scales, half))
                self.store(self.scales, half, scale)
                halves.append(numbers(exact * inverses(scale), self.format))
            self.store(self.payload, into, stored(halves, self.payload.dtype))

        self.each_stripe(quantise)
        plgpu.commit_smem()

        @pl.when(opens)
        def _():
            plgpu.copy_smem_to_gmem(self.scales.at[self.mine], self.scale_target.at[self.page, self.there])
