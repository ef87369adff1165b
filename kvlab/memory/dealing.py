"""A layer's slots dealt to its heads by their scores (AdaKV, arXiv 2407.11550), in whole tiles: how many a head gets
follows from data, how many there are does not."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32

from kvlab.memory.pools import Pool
from kvlab.memory.views.dealt import first_tiles, tiles_of


def deal(
    scores: Float[Array, "B K N"],
    valid: Bool[Array, "B N"],
    protected: Bool[Array, "B N"],
    keep: Int32[Array, "B"],
    page_size: int,
    num_protected: int,
    safeguard: float,
) -> Int32[Array, "B K"]:
    """Slots that each head keeps where they keep `keep`, whole pages, on average.

    The K * keep slots of the highest scores stay, over all heads together, the newer one where two are equal, then the
    lower head's; but each head's best `safeguard` * keep stay, and as many as fill the tiles of its protected ones.
    Counts are then rounded to whole tiles by largest remainder, so that their sum is K * keep / page_size tiles. A
    head that keeps all of its slots may leave its last tile unfilled."""
    batch, num_heads, num_slots = scores.shape
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    rank = jnp.broadcast_to(jnp.where(valid, jnp.where(protected, 2, 1), 0)[:, None, :], scores.shape)
    scores = jnp.where(rank == 1, scores, 0)
    places = jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.int32), scores.shape)
    _, by_score, newest = jax.lax.sort((-rank, -scores, -places), dimension=2, num_keys=3)
    least = max(1, -(-num_protected // page_size)) * page_size
    certain = jnp.maximum(least, jnp.floor(safeguard * keep.astype(jnp.float32) + 1e-6).astype(jnp.int32))
    is_certain = (places < certain[:, None, None]).astype(jnp.int32)
    num_valid = valid.sum(axis=1).astype(jnp.int32)
    is_there = (places < num_valid[:, None, None]).astype(jnp.int32)
    heads = jnp.broadcast_to(jnp.arange(num_heads, dtype=jnp.int32)[:, None], scores.shape)
    keys = (1 - is_there, 1 - is_certain, by_score, newest, heads)
    order = jax.lax.sort(tuple(key.reshape(batch, -1) for key in keys), dimension=1, num_keys=5)[4]
    is_kept = jnp.arange(order.shape[1], dtype=jnp.int32)[None, :] < num_heads * keep[:, None]
    counts = jnp.stack([((order == head) & is_kept).sum(axis=1) for head in range(num_heads)], axis=1)
    return jnp.minimum(in_tiles(counts.astype(jnp.int32), page_size) * page_size, num_valid[:, None])


def in_tiles(counts: Int32[Array, "B K"], page_size: int) -> Int32[Array, "B K"]:
    """Counts as whole tiles, rounded by largest remainder, those of lower heads first: their sum is that of the counts
    where it is whole."""
    tiles, rest = counts // page_size, counts % page_size
    missing = rest.sum(axis=1, keepdims=True) // page_size
    turn = jnp.argsort(jnp.argsort(-rest, axis=1, stable=True), axis=1, stable=True)
    return tiles + (turn < missing).astype(jnp.int32)


def pack_tiles(
    pool: Pool, pages: Array | np.ndarray, destinations: Array | np.ndarray, kept: Int32[Array, "B K M"], counts: Array
) -> Pool:
    """A pool [P, K, page, ...] in which the kept slots of the pages [B, N], `counts` [B, K] of them, fill the tiles of
    the destinations [B, M] head by head, as `DealtTokens` finds them; zeros behind them. Everything is read first; a
    destination out of range drops the write."""
    pages, destinations = jnp.asarray(pages), jnp.asarray(destinations)

    def packed(array: Array) -> Array:
        num_pages, heads, page_size = array.shape[:3]
        slots = array[pages].swapaxes(1, 2)
        slots = slots.reshape(slots.shape[0], heads, -1, *slots.shape[4:])
        is_real = kept < slots.shape[2]
        shape = (*kept.shape, *(1,) * (slots.ndim - 3))
        taken = jnp.take_along_axis(slots, jnp.where(is_real, kept, 0).reshape(shape), axis=2)
        taken = jnp.where(is_real.reshape(shape), taken, jnp.zeros((), array.dtype))
        taken = taken.reshape(*taken.shape[:2], -1, page_size, *taken.shape[3:])
        tiles = tiles_of(counts, page_size)
        mine = jnp.arange(taken.shape[2], dtype=jnp.int32)[None, None, :]
        numbers = first_tiles(tiles)[:, :, None] + mine
        places = jnp.clip(numbers // heads, 0, destinations.shape[1] - 1).reshape(len(kept), -1)
        found = jnp.take_along_axis(destinations, places, axis=1).reshape(numbers.shape)
        found = jnp.where(mine < tiles[:, :, None], found * heads + numbers % heads, num_pages * heads)
        flat = array.reshape(num_pages * heads, *array.shape[2:])
        return flat.at[found].set(taken, mode="drop").reshape(array.shape)

    return {name: packed(array) for name, array in pool.items()}
