"""Tokens into pages on TPUs in Pallas Mosaic, quantised on the way.

What a TPU can write alone is a register's rows of a page: 8, 16 or 32 tokens, as the type is wide. XLA lays the tokens
out in such granules, as the slots say; the kernel turns them into the pages' numbers and puts those that are there
between what stays. They come and go through the pipeline of the grid, in place: of the pages, only granules in which
something stays are fetched. Scales of tokens, one number each, are left to XLA."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats import (
    Quantised,
    Stored,
    arrays_of,
    numbers,
    scales_for,
    scales_of,
)
from pallas_kernels.kv_write.reference import KERNEL_FORMATS, channel_scales, places
from pallas_kernels.paged_attention import tpu as paged
from pallas_kernels.pages import Pages
from pallas_kernels.rounding import in_bytes, inverses
from pallas_kernels.selection import Asked
from pallas_kernels.typing import Float, Int32


class Granules(NamedTuple):
    """Those that are written, then the last of them again; `tokens` are numbers of [B, T], `mine` whether each is to be
    written."""

    places: Int32[Array, "2 N"]
    """Of each its page, and its part of it."""
    needed: Int32[Array, "2 N"]
    """The place whose old numbers are to be at hand: its own, or where nothing stays that of another, fetched before or
    next."""
    tokens: Int32[Array, "N g"]
    mine: Int32[Array, "N g"]
    num_written: Int32[Array, ""]


def kv_write(
    pages: Pages,
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K Dv"] | None,
    write_slots: Int32[Array, "B T"],
    *,
    interpret: pltpu.InterpretParams | bool = False,
) -> Pages:
    """See `api.kv_write`."""
    num_pages, num_kv_heads, page_size = pages.num_pages, pages.num_kv_heads, pages.page_size
    size = min(32 // pages.keys.dtype.itemsize, page_size)
    found = granules(write_slots, num_pages, page_size, size)
    num_granules = len(found.tokens)
    pools, per, given = pages.pools, pages.per, [keys] if values is None else [keys, values]
    page_and_offset = places(write_slots, num_pages, page_size)

    def granule(width: int, which: int) -> pl.BlockSpec:
        """Of a pool: of the three prefetched arrays, the second says which is written, the third which is fetched."""
        return pl.BlockSpec(
            (1, num_kv_heads, 1, size, width), lambda i, *said: (said[which][0, i], 0, said[which][1, i], 0, 0)
        )

    def listed(*shape: int) -> pl.BlockSpec:
        """Of what is listed granule by granule: behind the last of them nothing is fetched."""
        rest = [0] * (len(shape) - 1)
        return pl.BlockSpec(shape, lambda i, count, *_: (jnp.maximum(jnp.minimum(i, count[0] - 1), 0), *rest))

    kept, arrays, specs, targets = [], [], [], []
    for pool, tokens in zip(pools, given, strict=True):
        tiles = tokens.reshape(-1, *tokens.shape[2:])[found.tokens].swapaxes(1, 2)  # [N, K, g, D]
        arrays.append(tiles)
        specs.append(listed(1, *tiles.shape[1:]))
        targets.append(arrays_of(pool)[0].reshape(num_pages, num_kv_heads, page_size // size, size, -1))
        kept.append(_scales(pool, tokens, *page_and_offset) if isinstance(pool, Quantised) else None)
        if per == "channel":
            arrays.append(kept[-1][:, :, None])
            dims = (1, num_kv_heads, 1, tiles.shape[3])
            specs.append(pl.BlockSpec(dims, lambda i, _, places, __: (places[0, i], 0, 0, 0)))
    arrays.append(found.mine[:, :, None])
    specs.append(listed(1, size, 1))
    written = pl.pallas_call(
        partial(_kernel, num_sides=len(pools), per=per, format=pages.format if per else None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_granules,),
            in_specs=[*specs, *(granule(target.shape[4], 2) for target in targets)],
            out_specs=[granule(target.shape[4], 1) for target in targets],
        ),
        out_shape=[jax.ShapeDtypeStruct(target.shape, target.dtype) for target in targets],
        input_output_aliases={3 + len(arrays) + at: at for at in range(len(targets))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="kv_write",
    )(found.num_written[None], found.places, found.needed, *arrays, *targets)
    made = list(map(_held, pools, written, kept))
    return replace(pages, keys=made[0], values=None if pages.is_latent else made[1])


def _held(pool: Stored, payload: Array, scales: Array | None) -> Stored:
    """A pool of what the kernel wrote, with its scales if it has some."""
    if isinstance(pool, Quantised):
        return replace(pool, payload=payload.reshape(pool.payload.shape), scales=scales)
    return payload.reshape(pool.shape)


def _scales(
    pool: Quantised, tokens: Float[Array, "B T K D"], listed: Int32[Array, "B T"], offsets: Int32[Array, "B T"]
) -> Array:
    """A pool's scales with those of the tokens that are written."""
    if pool.per == "token":
        return pool.scales.at[listed, :, offsets].set(scales_for(tokens, pool.format, "token"), mode="drop")
    return channel_scales(pool, tokens, listed, offsets)


def refusal(asked: Asked) -> str | None:
    """Why this kernel should not write into such pages; None: it can."""
    token_type = jnp.dtype(asked.dtype)
    if token_type not in (jnp.bfloat16, jnp.float32):
        return f"tokens of {token_type.name}: must be bfloat16 or float32"
    if asked.schemes is not None or asked.format not in ("bfloat16", "float32", *KERNEL_FORMATS):
        said = f"must be bfloat16 or float32, or {', '.join(KERNEL_FORMATS)} with scales of float32"
        return f"pages of {asked.stored_as}: {said}"
    return paged.refusal(asked)


def granules(write_slots: Int32[Array, "B T"], num_pages: int, page_size: int, size: int) -> Granules:
    """The granules of `size` slots into which tokens go."""
    batch, num_tokens = write_slots.shape
    inside = places(write_slots, num_pages, page_size)[0] < num_pages
    numbers = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    # Where the first token of a row would stand in its granule: the same for all, which go to consecutive positions.
    shift = jnp.where(inside, (write_slots - numbers) % size, 0).max(axis=1)[:, None, None]
    per_row = (num_tokens + size - 2) // size + 1
    wanted = jnp.arange(per_row * size, dtype=jnp.int32).reshape(1, per_row, size) - shift
    tokens = jnp.clip(wanted, 0, num_tokens - 1)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    mine = (wanted == tokens) & inside[rows, tokens]
    slots = jnp.where(mine, write_slots[rows, tokens], -1).max(axis=2).reshape(-1)
    tokens, mine = ((x + rows * 0).reshape(-1, size) for x in (tokens + rows * num_tokens, mine.astype(jnp.int32)))
    order = jnp.argsort(slots < 0, stable=True)
    count = (slots >= 0).sum(dtype=jnp.int32)
    # What is left over names the last one again, so that nothing comes nor goes for it.
    order = order[jnp.minimum(jnp.arange(len(order), dtype=jnp.int32), jnp.maximum(count - 1, 0))]
    slots, tokens, mine = jnp.maximum(slots, 0)[order], tokens[order], mine[order]
    is_partial = (mine == 0).any(axis=1)
    items = jnp.arange(len(order), dtype=jnp.int32)
    needed = jnp.maximum(lax.cummax(jnp.where(is_partial, items, -1)), jnp.argmax(is_partial).astype(jnp.int32))
    both = jnp.stack([slots // page_size, slots % page_size // size])
    return Granules(both, both[:, needed], tokens, mine, count)


def _kernel(
    count: Any, places: Any, needed: Any, *refs: Any, num_sides: int, per: str | None, format: str | None
) -> None:
    """One granule of all heads."""
    del places, needed
    item = pl.program_id(0)
    step = 2 if per == "channel" else 1
    num_inputs = num_sides * step
    inputs, mine, targets = refs[:num_inputs], refs[num_inputs], refs[num_inputs + 1 :]
    olds, outs = targets[:num_sides], targets[num_sides:]

    @pl.when((item < count[0]) | (item == 0))
    def _():
        is_mine = (mine[0] > 0) & (item < count[0])  # [g, 1]
        for at, (old, out) in enumerate(zip(olds, outs, strict=True)):
            scales = inputs[at * step + 1] if per == "channel" else None
            new = _encoded(inputs[at * step][0], None if scales is None else scales[0], format, out.dtype)
            new, kept = (_bits(array.astype(out.dtype)) for array in (new, old[0, :, 0]))
            chosen = jnp.where(is_mine[None], new, kept).astype(_bits_of(out.dtype))
            out[0, :, 0] = lax.bitcast_convert_type(chosen, out.dtype)


def _bits(numbers: Array) -> Array:
    """As whole numbers of 32 bits: what stays is to stay as it is, NaN and all."""
    return lax.bitcast_convert_type(numbers, _bits_of(numbers.dtype)).astype(jnp.int32)


def _bits_of(dtype: Any) -> Any:
    return jnp.dtype(f"int{8 * dtype.itemsize}")


def _encoded(tokens: Array, scales: Array | None, format: str | None, dtype: Any) -> Array:
    """[K, g, W]: tokens as a pool holds them; whole numbers in int32."""
    if format is None:
        return tokens.astype(dtype)
    exact = tokens.astype(jnp.float32)
    if scales is None:
        scales = scales_of(jnp.abs(exact).max(axis=2, keepdims=True), format)
    made = numbers(exact * inverses(scales), format)
    if format != "int4":
        return made
    half = made.shape[2] // 2
    return in_bytes(made[..., :half], made[..., half:])
