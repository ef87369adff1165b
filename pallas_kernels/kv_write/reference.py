"""Writing into pages in plain XLA: one scatter for each array, in place where the pages are donated. The oracle, and
the CPU path."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.formats import Quantised, Stored, encoded, quantised, scales_for
from pallas_kernels.pages import Pages
from pallas_kernels.typing import Float, Int32

KERNEL_FORMATS = ("int8", "fp8", "int4")
"""What the kernels for chips quantise to, with scales of float32; anything else is written by this file."""


def kv_write(
    pages: Pages,
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K Dv"] | None,
    write_slots: Int32[Array, "B T"],
) -> Pages:
    """See `api.kv_write`."""
    listed, offsets = places(write_slots, pages.num_pages, pages.page_size)

    def written(pool: Stored, tokens: Array) -> Stored:
        if not isinstance(pool, Quantised):
            return stored(pool, tokens, listed, offsets)
        # A token is a page of one: its own scales, or its page's for every channel.
        tokens = tokens[..., None, :]
        if pool.per == "channel":
            kept = channel_scales(pool, tokens[..., 0, :], listed, offsets)
            payload = encoded(tokens, kept.at[listed].get(mode="fill", fill_value=0), None, pool.scheme)
            return replace(pool, payload=stored(pool.payload, payload[..., 0, :], listed, offsets), scales=kept)
        made = quantised(tokens, pool.scheme)
        payload = stored(pool.payload, made.payload[..., 0, :], listed, offsets)

        def put(array: Array, new: Array) -> Array:
            if pool.group is None:
                return array.at[listed, :, offsets].set(new[..., 0], mode="drop")
            return array.at[listed, :, :, offsets].set(new[..., 0], mode="drop")

        zeros = None if pool.zeros is None else put(pool.zeros, made.zeros)
        return replace(pool, payload=payload, scales=put(pool.scales, made.scales), zeros=zeros)

    return replace(
        pages,
        keys=written(pages.keys, keys),
        values=None if values is None else written(pages.values, values),
    )


def places(
    write_slots: Int32[Array, "B T"], num_pages: int, page_size: int
) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
    """Page and offset of every token; what is to be dropped gets a page past the pool."""
    inside = (write_slots >= 0) & (write_slots < num_pages * page_size)
    return jnp.where(inside, write_slots // page_size, num_pages), write_slots % page_size


def stored(pool: Array, tokens: Array, pages: Array, offsets: Array) -> Array:
    """A pool with tokens of its type in their places."""
    # 8-bit numbers are stored as bits: XLA on CPU widens a scatter of anything else of that size, pool and all.
    bits = jax.lax.bitcast_convert_type
    if tokens.dtype.itemsize == 1 and pool.dtype in (tokens.dtype, jnp.uint8):
        done = bits(pool, jnp.uint8).at[pages, :, offsets].set(bits(tokens, jnp.uint8), mode="drop")
        return bits(done, pool.dtype)
    return pool.at[pages, :, offsets].set(tokens.astype(pool.dtype), mode="drop")


def channel_scales(pool: Quantised, tokens: Array, pages: Array, offsets: Array) -> Array:
    """The scales of a pool's channels: anew for pages whose first slot is being written, by this call's tokens; else as
    they are."""
    past = pool.shape[0]
    opened = jnp.where(offsets == 0, pages, past)
    is_new = jnp.zeros(past, bool).at[opened].set(True, mode="drop")
    theirs = jnp.where(is_new.at[pages].get(mode="fill", fill_value=False), pages, past)
    kept = pool.scales.at[opened].set(0, mode="drop")
    return kept.at[theirs].max(scales_for(tokens[..., None, :], pool.format, "channel"), mode="drop")
