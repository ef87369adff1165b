"""Attention of new tokens over the pages of each sequence (arXiv 2309.06180): a decoded token, a few, or ragged chunks
(arXiv 2403.02310)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels import selection
from pallas_kernels.debug import check_chunks, check_tables
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention import blocked, reference
from pallas_kernels.paged_attention.plan import Plan
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.selection import Asked
from pallas_kernels.tiles import bucket, check_tiles, lookup
from pallas_kernels.typing import Float, Int32
from pallas_kernels.visible import CAUSAL, Visible

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mosaic_gpu": selection.kernel("paged_attention", "gpu"),
    "mosaic_tpu": selection.kernel("paged_attention", "tpu"),
    "blocked": blocked.paged_attention,
    "reference": reference.paged_attention,
}
"""The first that can run is taken unless another is named. "reference" is the oracle, and the one that can be
differentiated."""
PLANNED = ("mosaic_gpu",)
"""Those that take a plan."""
refusals = partial(selection.refusals, "paged_attention")


def takes_plan(asked: Asked) -> bool:
    """Whether a kernel that serves such pages on this process' first device has a use for plans: for others, one is in
    vain."""
    refused = refusals(asked)
    return any(name not in refused for name in PLANNED)


def paged_attention(
    queries: Float[Array, "B T H D"],
    pages: Pages,
    lists: Lists,
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    *,
    visible: Visible = CAUSAL,
    plan: Plan | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    with_page_mass: bool = False,
    implementation: str | None = None,
    tiles: Mapping[str, int] | None = None,
) -> tuple[Array, ...]:
    """Attention of queries over paged keys and values; returns outputs [B, T, H, Dv] and log-sum-exp [B, T, H] (natural
    log, float32).

    A query at position t sees the token at p iff `visible` says so, p < kv_lens[b], and the slot is valid (`Lists`). A
    query at a negative position is none. Slots that no query of a sequence sees are never read arithmetically: they may
    hold NaN. A query that sees nothing gets 0 and log-sum-exp -inf. `chunk_positions` gives the positions and lengths
    of ragged chunks.

    Accumulates in float32, of queries in the type that a kernel multiplies in (of 16 bits on GPUs); `soft_cap` c maps a
    scaled score s to c * tanh(s / c) before masking; `scale` defaults to D ** -0.5.

    `Quantised` pages are attended to as what they stand for, keys and values each in a scheme of its own; scales and
    zeros of slots that nobody sees may hold NaN as well.
    With `with_page_mass` there is a third result, [B, T, H, N] (float32): the share of each row's attention that every
    entry of a list took. The shares of a row add up to 1, or to 0 where it sees nothing (arXiv 2306.14048).

    `plan` is what `plan_attention` made of these lists, positions, lengths and mask: layers that share them share it,
    and launch nothing to find out which pages are live. Its figures are believed, and its pieces are its own, whatever
    `tiles` say; without one, each call makes its own.

    `tiles` are an implementation's tile sizes by name (`tiles.SPACES`); None takes what is remembered for shapes like
    these.

    Page ids must lie in [0, P). Others are harmless and give wrong answers: the nearest page is read in their place.
    Raises ValueError for shapes and formats that do not fit together, for options out of range and for an unavailable
    `implementation`; and while debugging is on (`pallas_kernels.debug`), for such ids."""
    scoring = Scoring(queries.shape[-1] ** -0.5 if scale is None else float(scale), soft_cap, visible, with_page_mass)
    _check(queries, pages, lists, query_positions, kv_lens)
    if plan is not None:
        plan.check(queries.shape, pages, lists, visible)
    asked = Asked.of(pages, queries.shape[2] // pages.num_kv_heads, queries.dtype, queries.shape[1])
    name, run = selection.select("paged_attention", implementation, IMPLEMENTATIONS, refusals(asked))
    check_tables("paged_attention", lists.table, lists.starts, pages.num_pages)
    if 0 in (*queries.shape[:2], lists.num_entries):  # no sequences, no queries, or no entries to list
        shape = queries.shape[:3]
        nothing = jnp.zeros((*shape, pages.head_dims[1]), queries.dtype), jnp.full(shape, -jnp.inf)
        return (*nothing, jnp.zeros((*shape, lists.num_entries))) if with_page_mass else nothing
    if tiles is None:
        tiles = lookup(name, bucket_of(queries, pages, lists))
    check_tiles(name, tiles)
    planned = {"plan": plan} if plan is not None and name in PLANNED else {}
    return run(queries, pages, lists.clipped(pages.num_pages), query_positions, kv_lens, scoring, **planned, **tiles)


def chunk_positions(
    query_starts: Int32[Array, "B"], query_lens: Int32[Array, "B"], num_queries: int
) -> tuple[Int32[Array, "B T"], Int32[Array, "B"]]:
    """The `query_positions` and `kv_lens` of ragged chunks: that of sequence b is its tokens at positions
    [query_starts[b], query_starts[b] + query_lens[b]), whose keys and values are in the pages already (`kv_write`), as
    are those before it. Queries from `query_lens[b]` on fill up the batch: they see nothing.

        paged_attention(queries, pages, lists, *chunk_positions(starts, lens, queries.shape[1]))

    Raises ValueError for other types and shapes; while debugging is on, for chunks that cannot be.
    """
    for name, array in (("query_starts", query_starts), ("query_lens", query_lens)):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} of {array.dtype.name}: must be int32")
        if array.ndim != 1 or array.shape != query_starts.shape:
            raise ValueError(f"{name} = {array.shape}: must be [B], the same for both")
    check_chunks(query_starts, query_lens, num_queries)
    numbers = jnp.arange(num_queries, dtype=jnp.int32)[None]
    positions = jnp.where(numbers < query_lens[:, None], query_starts[:, None] + numbers, -1)
    return positions, query_starts + query_lens


def _check(queries: Array, pages: Pages, lists: Lists, query_positions: Array, kv_lens: Array) -> None:
    """Raises ValueError for shapes and types that do not fit together."""
    if queries.ndim != 4 or not queries.shape[2] or not jnp.issubdtype(queries.dtype, jnp.floating):
        said = "must be floating [B, T, H, D], with a head at least"
        raise ValueError(f"queries = {queries.dtype.name}{list(queries.shape)}: {said}")
    pages.check()
    if pages.per is None and not jnp.issubdtype(pages.keys.dtype, jnp.floating):
        raise ValueError(f"pages.keys of {pages.keys.dtype.name}: must be floating, or Quantised with scales")
    lists.check(len(queries), pages)
    if queries.shape[2] % pages.num_kv_heads:
        said = f"must be a multiple of num_kv_heads = {pages.num_kv_heads}"
        raise ValueError(f"num_heads = {queries.shape[2]}: {said}")
    if queries.shape[3] != pages.head_dims[0]:
        raise ValueError(f"queries: head dim {queries.shape[3]} must equal the keys' {pages.head_dims[0]}")
    for name, array, shape in (
        ("query_positions", query_positions, queries.shape[:2]),
        ("kv_lens", kv_lens, queries.shape[:1]),
    ):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} of {array.dtype.name}: must be int32")
        if array.shape != shape:
            raise ValueError(f"{name} = {array.shape}: must be {shape}, as queries {queries.shape} say")


def bucket_of(queries: Array, pages: Pages, lists: Lists) -> str:
    """The shapes that share a choice of tile sizes with these."""
    sizes = len(queries), queries.shape[1], lists.num_entries * pages.page_size
    op = "paged_attention by lists of heads" if lists.is_by_head else "paged_attention"
    group = queries.shape[2] // pages.num_kv_heads
    format, per = pages.format, pages.per or ""
    if not pages.is_plain:
        format, per = Asked.of(pages, group, queries.dtype).stored_as, ""
    return bucket(op, format, per, pages.head_dims, group, pages.page_size, sizes)
