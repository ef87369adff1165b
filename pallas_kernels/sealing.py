"""Sealed pages: whole pages that were filled in the model's type, quantised at once, and never written again.

    sealed = seal_pages(tiles, scheme)          # [n, K, page, D] of full pages
    pool = write_pages(pool, sealed, ids)       # in place, where the pool is donated

By channel a page's scales depend on all of its tokens, so that token by token it could only be written with scales that
were guessed (arXiv 2402.02750). Plain XLA: a page moves once in its life, when it is full."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.formats import FORMATS, SHARED, Quantised, Scheme, format_of, quantised
from pallas_kernels.pages import Pages
from pallas_kernels.typing import Bool, Float, Int32


def allocated(shape: tuple[int, int, int, int], scheme: Scheme) -> Quantised:
    """A pool [P, K, page, D] of zeros: P * K * `scheme.tile_bytes(page, D)` bytes. On a CPU numbers of 8 bits lie as
    plain bytes, which XLA there writes to in place. Raises ValueError for what is no scheme of such pages."""
    scheme.check(shape)
    num_pages, heads, page_size, dim = shape
    as_bytes = jax.default_backend() == "cpu" and jnp.dtype(FORMATS[scheme.format]).itemsize == 1
    dtype = jnp.uint8 if as_bytes else FORMATS[scheme.format]
    payload = jnp.zeros((num_pages, heads, page_size, dim // SHARED.get(scheme.format, 1)), dtype)
    # Apart from each other, as each is donated.
    scales, zeros = (
        jnp.zeros((num_pages, heads, *scheme.scales_shape(page_size, dim)), scheme.scale_dtype) for _ in range(2)
    )
    return Quantised(payload, scales, scheme.format, scheme.per, scheme.group, zeros if scheme.has_zeros else None)


def seal_pages(
    tiles: Float[Array, "n K page D"], scheme: Scheme, valid: Bool[Array, "n page"] | None = None
) -> Quantised:
    """Whole pages in a scheme, each with ranges of its own. Slots that are not `valid` may hold anything, NaN too: they
    have no part in the ranges, and are stored as codes of zero. Raises ValueError for shapes that do not fit together
    and for what is no scheme of such pages."""
    if tiles.ndim != 4:
        raise ValueError(f"tiles = {tiles.shape}: must be [n, K, page, D]")
    if valid is not None and valid.shape != (tiles.shape[0], tiles.shape[2]):
        said = f"must be {(tiles.shape[0], tiles.shape[2])}, a flag for each slot of each page"
        raise ValueError(f"valid = {valid.shape}: {said}")
    scheme.check((1, *tiles.shape[1:]))
    flags = None if valid is None else jnp.broadcast_to(valid[:, None], tiles.shape[:3])
    return _quantised(tiles, scheme, flags)


def _quantised(tiles: Array, scheme: Scheme, valid: Array | None) -> Quantised:
    """Of no pages too, of which a program that seals none has some."""
    if len(tiles):
        return quantised(tiles, scheme, valid=valid)
    shapes = jax.eval_shape(lambda tile: quantised(tile, scheme), jnp.zeros((1, *tiles.shape[1:]), tiles.dtype))
    return jax.tree.map(lambda array: jnp.zeros((0, *array.shape[1:]), array.dtype), shapes)


def write_pages(pool: Quantised, pages: Quantised, ids: Int32[Array, "n"]) -> Quantised:
    """A pool [P, K, page, D] with whole pages [n, K, page, D] of its scheme at their ids, bit for bit; an id outside
    [0, P) drops its page. Where ids are the same, any of their pages may stay. In place where the pool is donated.
    Raises ValueError for another scheme, other shapes, and ids that are not int32."""
    if pool.scheme != pages.scheme:
        raise ValueError(f"pages of {pages.scheme}: must be of the pool's scheme, {pool.scheme}")
    if pages.shape[1:] != pool.shape[1:]:
        raise ValueError(f"pages = {pages.shape}: must be [n, {', '.join(map(str, pool.shape[1:]))}], as the pool's")
    if ids.dtype != jnp.int32 or ids.shape != (len(pages),):
        raise ValueError(f"ids = {ids.dtype.name}{list(ids.shape)}: must be int32 [{len(pages)}], one for each page")
    places = jnp.where(ids < 0, len(pool), ids)  # negative ones would count from the end

    def put(into: Array, new: Array) -> Array:
        if into.dtype.itemsize > 1:
            return into.at[places].set(new, mode="drop")
        cast = jax.lax.bitcast_convert_type  # XLA on CPU widens a scatter of other numbers of 8 bits, pool and all
        return cast(cast(into, jnp.uint8).at[places].set(cast(new, jnp.uint8), mode="drop"), into.dtype)

    zeros = None if pool.zeros is None else put(pool.zeros, pages.zeros)
    return replace(pool, payload=put(pool.payload, pages.payload), scales=put(pool.scales, pages.scales), zeros=zeros)


def seal_into(pool: Pages, open_pages: Pages, sources: Int32[Array, "n"], ids: Int32[Array, "n"]) -> Pages:
    """A sealed pool with the full pages `sources` of an open one at `ids`, quantised: one device program. What is
    padding has an id outside the pool. All of a page's slots count. Raises ValueError as `write_pages` does, and for
    pools that do not belong together."""
    if len(pool.pools) != len(open_pages.pools):
        raise ValueError(f"open pages of {len(open_pages.pools)} arrays: must be {len(pool.pools)}, as the pool has")
    sealed = []
    for into, full in zip(pool.pools, open_pages.pools, strict=True):
        if not isinstance(into, Quantised) or isinstance(full, Quantised):
            raise ValueError(f"pool of {format_of(into)}, open pages of {format_of(full)}: only the pool is quantised")
        tiles = full.at[sources].get(mode="clip")
        sealed.append(write_pages(into, seal_pages(tiles, into.scheme), ids))
    return replace(pool, keys=sealed[0], values=sealed[1] if len(sealed) == 2 else None)
