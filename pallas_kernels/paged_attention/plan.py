"""What a step knows before its layers run: which pages are live, in which pieces they are shared out, and what is seen
of them.

Nothing of it depends on queries, keys or values. So it is computed once a step and shared by all layers that have the
same page tables; every layer of a call without a plan computes its own."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention.sharing import bounds, live_pages, split, whole_of
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.typing import Int32
from pallas_kernels.visible import CAUSAL, Visible

BLOCK_LEN = 64
"""Tokens of a block: of several pages, or of a part of one."""
PIECES = 264
"""Pieces to aim at: two for each of an H200's 132 multiprocessors, over all KV heads."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pages", "starts", "counts", "words", "order", "first", "last", "whole", "pieces", "launch", "shares"],
    meta_fields=["page_size", "num_kv_heads", "visible"],
)
@dataclass(frozen=True)
class Plan:
    """An item is a sequence, or with lists of each head a KV head of one: all its queries are one tile. Positions and
    pages are int32; a page longer than a block is as many entries as it has blocks."""

    pages: Any
    """[items, N] live pages first: page * blocks of a page + block, with lists of heads of a pool of single tiles."""
    starts: Any
    """[items, N] the position of each entry's first slot."""
    counts: Any
    """[items] live entries."""
    words: Any
    """[items, N, words] the valid slots of an entry as bits (`sharing.packed`), or None."""
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
    visible: Visible

    def check(self, queries: tuple[int, ...], pages: Pages, lists: Lists, visible: Visible) -> None:
        """Raises ValueError for a plan that was made for something else than a call of these queries [B, T, H, D],
        pages, lists and mask."""
        num_parts = max(1, pages.page_size // BLOCK_LEN)
        wanted = {
            "items": queries[0] * (pages.num_kv_heads if lists.is_by_head else 1),
            "queries": queries[1],
            "entries": lists.num_entries * num_parts,
            "page_size": pages.page_size // num_parts,
            "num_kv_heads": 1 if lists.is_by_head else pages.num_kv_heads,
            "has valid slots": lists.valid is not None,
            "visible": visible,
        }
        found = {
            "items": self.last.shape[0],
            "queries": self.last.shape[1],
            "entries": self.pages.shape[1],
            "page_size": self.page_size,
            "num_kv_heads": self.num_kv_heads,
            "has valid slots": self.words is not None,
            "visible": self.visible,
        }
        for name, value in found.items():
            if value != wanted[name]:
                raise ValueError(f"plan: {name} = {value}: must be {wanted[name]}, as the call's arguments say")


def plan_attention(
    lists: Lists,
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    *,
    num_kv_heads: int,
    page_size: int,
    visible: Visible = CAUSAL,
    num_pieces: int | None = None,
) -> Plan:
    """The plan for calls of `paged_attention` with these lists, positions, lengths and mask, over pools with
    `num_kv_heads` heads and pages of `page_size` slots (K and page of the pools' [P, K, page, D]). `num_pieces` to aim
    at, over all heads; None: PIECES. Page ids must lie in the pools, whose size is not known here: unlike
    `paged_attention`, it does not bring others inside, and a copy reads zeros for them. Raises ValueError for pages
    that are neither parts of a block nor whole blocks."""
    if page_size < 1 or (BLOCK_LEN % page_size and page_size % BLOCK_LEN):
        raise ValueError(f"page_size = {page_size}: must divide {BLOCK_LEN} or be a multiple of it")
    if lists.is_by_head:  # a head is a sequence of its own, over a pool whose pages are single tiles
        lists = lists.by_sequence(num_kv_heads)
        query_positions, kv_lens = (jnp.repeat(x, num_kv_heads, axis=0) for x in (query_positions, kv_lens))
        num_kv_heads = 1
    items, num_queries = query_positions.shape
    if page_size > BLOCK_LEN:
        lists, page_size = lists.in_blocks(page_size, BLOCK_LEN), BLOCK_LEN
    first, last = bounds(query_positions, kv_lens, visible, num_queries)
    live = live_pages(lists, first, last, page_size, visible)
    pages, starts, counts, order = (x[:, 0] for x in (live.pages, live.starts, live.counts, live.order))
    words = None if live.words is None else live.words[:, 0]
    first, last = first[:, 0], last[:, 0]
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
        whole=jnp.stack(whole_of(first, last), axis=1),
        pieces=pieces,
        launch=jnp.argsort(-pieces[:, 2], stable=True).astype(jnp.int32),
        shares=jnp.stack([begins, ends], axis=1),
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        visible=visible,
    )
