"""What a step knows before its layers run: which pages are live, in which pieces they are shared out, and what is seen of them.

Nothing of it depends on queries, keys or values. So it is computed once a step and shared by all layers that have the same page
tables; every layer of a call without a plan computes its own.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.masking import NOWHERE, check_options
from pallas_kernels.paged_attention.pages import bounds, live_pages, packed, split
from pallas_kernels.typing import Bool, Int32

BLOCK_LEN = 64
"""Tokens of a block: of several pages, or of a part of one."""
PIECES = 264
"""Pieces to aim at: two for each of an H200's 132 multiprocessors, over all KV heads."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pages", "starts", "counts", "words", "order", "first", "last", "whole", "pieces", "launch", "shares"],
    meta_fields=["page_size", "num_kv_heads", "window", "num_sinks"],
)
@dataclass(frozen=True)
class Plan:
    """An item is a sequence, or with lists of each head a KV head of one: all its queries are one tile. Positions and pages are
    int32; a page longer than a block is as many entries as it has blocks."""

    pages: Any
    """[items, N] live pages first: page * blocks of a page + block, with lists of heads of a pool of single tiles."""
    starts: Any
    """[items, N] the position of each entry's first slot."""
    counts: Any
    """[items] live entries."""
    words: Any
    """[items, N, words] the valid slots of an entry as bits (`pages.packed`), or None."""
    order: Any
    """[items, N] the place in the given table that each entry had."""
    first: Any
    """[items, T] the first position that each query sees, sinks apart."""
    last: Any
    """[items, T] the last."""
    whole: Any
    """[items, 3] all queries see positions [whole[0], whole[1]], and none sees one behind whole[2]."""
    pieces: Any
    """[pieces, 3] item, first entry, entries; those of an item follow one another, empty ones at the end."""
    launch: Any
    """[pieces] numbers of pieces, the longest first."""
    shares: Any
    """[items, 2] an item's pieces that are not empty: the first, and the one behind the last."""
    page_size: int
    """Slots of an entry: at most BLOCK_LEN."""
    num_kv_heads: int
    """Of an item's pages: 1 with lists of heads."""
    window: int | None
    num_sinks: int


def plan_attention(
    page_table: Int32[Array, "B *heads num_pages"],
    page_starts: Int32[Array, "B *heads num_pages"],
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    *,
    num_kv_heads: int,
    page_size: int,
    valid_slots: Bool[Array, "B *heads num_pages page"] | None = None,
    window: int | None = None,
    num_sinks: int = 0,
    num_pieces: int | None = None,
) -> Plan:
    """The plan for calls of `paged_attention` with these tables, positions, lengths and masks, over pools with `num_kv_heads` heads and
    pages of `page_size` slots (P, K and page of the pools' [P, K, page, D]). `num_pieces` to aim at, over all heads; None: PIECES.
    Page ids must lie in the pools, whose size is not known here: unlike `paged_attention`, it does not bring others inside, and a copy
    reads zeros for them. Raises ValueError for options out of range, and for pages that are neither parts of a block nor whole blocks.
    """
    check_options(window, num_sinks, None)
    if page_size < 1 or (BLOCK_LEN % page_size and page_size % BLOCK_LEN):
        raise ValueError(f"page_size = {page_size}: must divide {BLOCK_LEN} or be a multiple of it")
    num_entries = page_table.shape[-1]
    if page_table.ndim == 3:  # a head is a sequence of its own, over a pool whose pages are single tiles
        page_table = page_table * num_kv_heads + jnp.arange(num_kv_heads, dtype=jnp.int32)[None, :, None]
        page_table, page_starts = (x.reshape(-1, num_entries) for x in (page_table, page_starts))
        query_positions, kv_lens = (jnp.repeat(x, num_kv_heads, axis=0) for x in (query_positions, kv_lens))
        valid_slots = None if valid_slots is None else valid_slots.reshape(-1, *valid_slots.shape[2:])
        num_kv_heads = 1
    items, num_queries = query_positions.shape
    words = None if valid_slots is None else packed(valid_slots)
    if page_size > BLOCK_LEN:
        num_parts = page_size // BLOCK_LEN
        parts = jnp.arange(num_parts, dtype=jnp.int32)[None, None]
        page_table = (page_table[..., None] * num_parts + parts).reshape(items, -1)
        page_starts = (page_starts[..., None] + parts * BLOCK_LEN).reshape(items, -1)
        page_size = BLOCK_LEN
        words = None if words is None else words.reshape(*page_table.shape, -1)
    first, last = bounds(query_positions, kv_lens, window, num_queries)
    lists = live_pages(page_table, page_starts, first, last, num_sinks, page_size, window, words)
    pages, starts, counts, order = (x[:, 0] for x in (lists.pages, lists.starts, lists.counts, lists.order))
    words = None if lists.words is None else lists.words[:, 0]
    first, last = first[:, 0], last[:, 0]
    seeing = last >= 0
    whole = [jnp.where(seeing, first, 0).max(axis=1), jnp.where(seeing, last, NOWHERE).min(axis=1), last.max(axis=1)]
    pieces = split(counts, BLOCK_LEN // page_size, max(1, (num_pieces or PIECES) // num_kv_heads), pages.shape[1])
    mine = pieces[None, :, 0] == jnp.arange(items, dtype=jnp.int32)[:, None]
    begins = (pieces[None, :, 0] < jnp.arange(items, dtype=jnp.int32)[:, None]).sum(axis=1, dtype=jnp.int32)
    ends = begins + (mine & (pieces[None, :, 2] > 0)).sum(axis=1, dtype=jnp.int32)
    return Plan(
        pages=pages,
        starts=starts,
        counts=counts,
        words=words,
        order=order,
        first=first,
        last=last,
        whole=jnp.stack(whole, axis=1),
        pieces=pieces,
        launch=jnp.argsort(-pieces[:, 2], stable=True).astype(jnp.int32),
        shares=jnp.stack([begins, ends], axis=1),
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        window=window,
        num_sinks=num_sinks,
    )
