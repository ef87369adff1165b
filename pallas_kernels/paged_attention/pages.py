"""What every kernel asks of XLA before and after: which pages are live, how to share them out, how to put parts together."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32, Shaped

from pallas_kernels.masking import NOWHERE

ENOUGH = 8
"""So many times more items than pieces were asked for keep a chip busy without being cut, and need no merging."""


def tiled(x: Shaped[Array, "B T ..."], tile_len: int, fill: int) -> Shaped[Array, "B tiles tile_len ..."]:
    """Queries, or what is known of each, in tiles of `tile_len`; the last is filled up."""
    batch, num_queries = x.shape[:2]
    num_tiles = -(-num_queries // tile_len)
    padding = [(0, 0), (0, num_tiles * tile_len - num_queries), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, padding, constant_values=fill).reshape(batch, num_tiles, tile_len, *x.shape[2:])


def bounds(
    query_positions: Int32[Array, "B T"], kv_lens: Int32[Array, "B"], window: int | None, tile_len: int
) -> tuple[Int32[Array, "B tiles tile_len"], Int32[Array, "B tiles tile_len"]]:
    """First and last position that each query of a tile sees, sinks apart; what fills up the last tile sees nothing."""
    first = jnp.zeros_like(query_positions) if window is None else query_positions - window + 1
    last = jnp.minimum(query_positions, kv_lens[:, None] - 1)
    return tiled(first, tile_len, NOWHERE), tiled(last, tile_len, -1)


def live_pages(
    page_table: Int32[Array, "B num_pages"],
    page_starts: Int32[Array, "B num_pages"],
    first: Int32[Array, "B tiles T"],
    last: Int32[Array, "B tiles T"],
    num_sinks: int,
    page_size: int,
    window: int | None,
) -> tuple[Int32[Array, "B tiles num_pages"], Int32[Array, "B tiles num_pages"], Int32[Array, "B tiles"]]:
    """Pages and first positions in which some query of a tile sees something, those first, and how many these are.

    A query sees positions [first, last], and sinks below its last.
    """
    starts = page_starts[:, None, :]
    live = starts <= last.max(axis=2)[:, :, None]
    if window is not None:
        live = live & ((starts + page_size > first.min(axis=2)[:, :, None]) | (starts < num_sinks))
    order = jnp.argsort(~live, axis=2, stable=True)
    pages, starts = (jnp.take_along_axis(x[:, None, :], order, axis=2) for x in (page_table, page_starts))
    return pages, starts, live.sum(axis=2, dtype=jnp.int32)


def split(counts: Int32[Array, "items"], block_pages: int, num_pieces: int, table_len: int) -> Int32[Array, "pieces 3"]:
    """Cuts every item's list of `counts` pages into pieces of whole blocks, nearly equal over all items: (item, first entry,
    entries). About `num_pieces` of them, however ragged the lengths; what is left over is empty and names the last item. Where there
    are many items anyway, each is one piece."""
    items = len(counts)
    if items >= ENOUGH * num_pieces:
        numbers = jnp.arange(items, dtype=jnp.int32)
        return jnp.stack([numbers, jnp.zeros_like(numbers), counts], axis=1)
    longest = -(-table_len // block_pages)
    blocks = -(-counts // block_pages)
    share = jnp.maximum(1, -(-blocks.sum() // num_pieces))
    parts = -(-blocks // share)
    ends = jnp.cumsum(parts)
    numbers = jnp.arange(min(num_pieces, items * longest) + items)
    item = jnp.minimum(jnp.searchsorted(ends, numbers, side="right"), items - 1).astype(jnp.int32)
    size = -(-blocks[item] // jnp.maximum(parts[item], 1)) * block_pages
    begin = (numbers - (ends - parts)[item]) * size
    count = jnp.where(numbers < ends[-1], jnp.clip(counts[item] - begin, 0, size), 0)
    return jnp.stack([item, jnp.where(count > 0, begin, 0), count], axis=1).astype(jnp.int32)


def merge(
    outputs: Float[Array, "pieces K R Dv"],
    log_sum_exp: Float[Array, "pieces K R"],
    pieces: Int32[Array, "pieces 3"],
    num_items: int,
) -> tuple[Float[Array, "items K R Dv"], Float[Array, "items K R"]]:
    """Attention over all pieces of each item from normalised outputs of each; what empty pieces hold is not read."""
    item, empty = pieces[:, 0], pieces[:, 2, None, None] == 0
    log_sum_exp = jnp.where(empty, -jnp.inf, log_sum_exp)
    if len(pieces) == num_items:  # one piece each, in order: `split` makes more wherever it cuts
        return jnp.where(empty[..., None], 0, outputs), log_sum_exp
    highest = jax.ops.segment_max(log_sum_exp, item, num_items, indices_are_sorted=True)
    highest = jnp.where(highest == -jnp.inf, 0, highest)
    weights = jnp.exp(log_sum_exp - highest[item])
    parts = jnp.where(empty[..., None], 0, outputs) * weights[..., None]
    total = jax.ops.segment_sum(weights, item, num_items, indices_are_sorted=True)
    sums = jax.ops.segment_sum(parts, item, num_items, indices_are_sorted=True)
    return sums / jnp.where(total == 0, 1, total)[..., None], jnp.log(total) + highest
