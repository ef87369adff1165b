"""What every kernel asks of XLA before and after: which pages are live, how to share them out, how to put parts
together."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.pages import Lists, Pages
from pallas_kernels.typing import Bool, Float, Int32, Shaped
from pallas_kernels.visible import NOWHERE, Visible

ENOUGH = 8
"""So many times more items than pieces were asked for keep a chip busy without being cut, and need no merging."""

LONGER = 16
"""A piece may be longer than its share by one part in so many: else lists that are hardly longer are cut in two, and
twice as many thread blocks begin and end. 32 lists of 64 pages in 33 pieces take an H200 146 us cut, 144 whole."""
WORD = 32
"""Slots of a page whose validity one int32 holds."""


def any_lists(run: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """`run`, which takes a list of pages for each sequence [B, N], for lists of each KV head as well [B, K, N]: every
    head is then a sequence of its own, over pools whose pages are single tiles. Nothing is copied."""

    @functools.wraps(run)
    def for_any(
        queries: Array, pages: Pages, lists: Lists, query_positions: Array, kv_lens: Array, *rest: Any, **options: Any
    ) -> tuple[Array, ...]:
        if not lists.is_by_head:
            return run(queries, pages, lists, query_positions, kv_lens, *rest, **options)
        batch, num_queries, num_heads, dim = queries.shape
        num_kv_heads = pages.num_kv_heads
        group = num_heads // num_kv_heads
        rows = queries.reshape(batch, num_queries, num_kv_heads, group, dim).swapaxes(1, 2)
        answers = run(
            rows.reshape(batch * num_kv_heads, num_queries, group, dim),
            pages.by_head(),
            lists.by_sequence(num_kv_heads),
            *(jnp.repeat(x, num_kv_heads, axis=0) for x in (query_positions, kv_lens)),
            *rest,
            **options,
        )

        def parted(x: Array) -> Array:
            x = x.reshape(batch, num_kv_heads, num_queries, group, *x.shape[3:]).swapaxes(1, 2)
            return x.reshape(batch, num_queries, num_heads, *x.shape[4:])

        return tuple(map(parted, answers))

    return for_any


def packed(valid_slots: Bool[Array, "B N page"]) -> Int32[Array, "B N words"]:
    """The slots of a page as bits, the first in the lowest."""
    page_size = valid_slots.shape[2]
    padded = jnp.pad(valid_slots, ((0, 0), (0, 0), (0, -page_size % WORD)))
    bits = padded.reshape(*padded.shape[:2], -1, WORD).astype(jnp.uint32)
    bits = bits << jnp.arange(WORD, dtype=jnp.uint32)[None, None, None]
    return jax.lax.bitcast_convert_type(bits.sum(axis=3, dtype=jnp.uint32), jnp.int32)


def tiled(x: Shaped[Array, "B T ..."], tile_len: int, fill: int) -> Shaped[Array, "B tiles tile_len ..."]:
    """Queries, or what is known of each, in tiles of `tile_len`; the last is filled up."""
    batch, num_queries = x.shape[:2]
    num_tiles = -(-num_queries // tile_len)
    padding = [(0, 0), (0, num_tiles * tile_len - num_queries), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, padding, constant_values=fill).reshape(batch, num_tiles, tile_len, *x.shape[2:])


def bounds(
    query_positions: Int32[Array, "B T"], kv_lens: Int32[Array, "B"], visible: Visible, tile_len: int
) -> tuple[Int32[Array, "B tiles tile_len"], Int32[Array, "B tiles tile_len"]]:
    """First and last position that each query of a tile sees, sinks apart; what fills up the last tile sees nothing,
    nor does a query whose position is negative."""
    first = jnp.where(query_positions < 0, NOWHERE, visible.earliest(query_positions))
    last = jnp.minimum(query_positions, kv_lens[:, None] - 1)
    return tiled(first, tile_len, NOWHERE), tiled(last, tile_len, -1)


class Live(NamedTuple):
    """Pages in which some query of a tile sees something, then the others: with their first positions, how many are
    seen, and their valid slots."""

    pages: Int32[Array, "B tiles num_pages"]
    starts: Int32[Array, "B tiles num_pages"]
    counts: Int32[Array, "B tiles"]
    words: Int32[Array, "B tiles num_pages words"] | None
    order: Int32[Array, "B tiles num_pages"]
    """The table entry that each stands in."""


def live_pages(
    lists: Lists,
    first: Int32[Array, "B tiles T"],
    last: Int32[Array, "B tiles T"],
    page_size: int,
    visible: Visible,
) -> Live:
    """What the queries of each tile see, and what nobody sees behind it.

    A query sees positions [first, last], and sinks below its last; of a page, the slots that the lists say are valid.
    """
    starts = lists.starts[:, None, :]
    live = starts <= last.max(axis=2)[:, :, None]
    if visible.span is not None:
        live = live & ((starts + page_size > first.min(axis=2)[:, :, None]) | (starts < visible.num_sinks))
    words = None if lists.valid is None else packed(lists.valid)
    if words is not None:
        live = live & (words != 0).any(axis=2)[:, None, :]
    order = jnp.argsort(~live, axis=2, stable=True)
    pages, starts = (jnp.take_along_axis(x[:, None, :], order, axis=2) for x in (lists.table, lists.starts))
    if words is not None:
        words = jnp.take_along_axis(words[:, None], order[..., None], axis=2)
    return Live(pages, starts, live.sum(axis=2, dtype=jnp.int32), words, order)


def whole_of(first: Int32[Array, "items T"], last: Int32[Array, "items T"]) -> list[Int32[Array, "items"]]:
    """The positions [whole[0], whole[1]] that every query of an item sees, those that see nothing apart; and the last
    that any sees."""
    seeing = last >= 0
    return [jnp.where(seeing, first, 0).max(axis=1), jnp.where(seeing, last, NOWHERE).min(axis=1), last.max(axis=1)]


def page_mass(
    page_log_sum_exp: Float[Array, "... num_pages R"],
    log_sum_exp: Float[Array, "... R"],
    counts: Int32[Array, "..."],
    order: Int32[Array, "... num_pages"],
) -> Float[Array, "... R num_pages"]:
    """The share of each row's attention that every table entry takes, from the log-sum-exp of the entries of its list;
    what stands behind the list's live entries is not read."""
    live = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1) < counts[..., None]
    finite = jnp.where(log_sum_exp == -jnp.inf, 0, log_sum_exp)
    shares = jnp.where(live[..., None], jnp.exp(page_log_sum_exp - finite[..., None, :]), 0)
    places = jnp.broadcast_to(jnp.argsort(order, axis=-1)[..., None], shares.shape)
    return jnp.take_along_axis(shares, places, axis=-2).swapaxes(-1, -2)


def cost(pages: Pages, num_tokens: int, num_rows: int) -> pl.CostEstimate:
    """What a scheduler is told of a kernel that has `num_rows` queries attend to each of `num_tokens` listed, over all
    heads."""
    num_slots = pages.num_pages * pages.num_kv_heads * pages.page_size
    return pl.CostEstimate(
        flops=2 * num_tokens * num_rows * sum(pages.head_dims),
        transcendentals=num_tokens * num_rows,
        bytes_accessed=pages.num_bytes * num_tokens // num_slots,
    )


def split(counts: Int32[Array, "items"], block_pages: int, num_pieces: int, table_len: int) -> Int32[Array, "pieces 3"]:
    """Cuts every item's list of `counts` pages into pieces of whole blocks, nearly equal over all items: (item, first
    entry, entries). About `num_pieces` of them, however ragged the lengths; what is left over is empty and names the
    last item. Where there are many items anyway, each is one piece."""
    items = len(counts)
    if items >= ENOUGH * num_pieces:
        numbers = jnp.arange(items, dtype=jnp.int32)
        return jnp.stack([numbers, jnp.zeros_like(numbers), counts], axis=1)
    longest = -(-table_len // block_pages)
    blocks = -(-counts // block_pages)
    share = jnp.maximum(1, -(-blocks.sum() // num_pieces))
    parts = -(-blocks // (share + share // LONGER))
    ends = jnp.cumsum(parts)
    numbers = jnp.arange(min(num_pieces, items * longest) + items)
    item = jnp.minimum(jnp.searchsorted(ends, numbers, side="right", method="compare_all"), items - 1).astype(jnp.int32)
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
