"""Attention of a chunk of queries over the pages of each sequence (arXiv 2309.06180); decode is a chunk of one."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels import selection
from pallas_kernels.debug import check_tables
from pallas_kernels.formats import Pages, Quantised, format_of
from pallas_kernels.paged_attention import blocked, reference
from pallas_kernels.paged_attention.checks import check, check_plan
from pallas_kernels.paged_attention.plan import Plan
from pallas_kernels.selection import Asked
from pallas_kernels.tuning import bucket, check_tiles, lookup
from pallas_kernels.typing import Bool, Float, Int32

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mosaic_gpu": selection.kernel("paged_attention", "gpu"),
    "mosaic_tpu": selection.kernel("paged_attention", "tpu"),
    "blocked": blocked.paged_attention,
    "reference": reference.paged_attention,
}
"""The first that can run is taken unless another is named. "reference" is the oracle, and the one that can be differentiated."""
PLANNED = ("mosaic_gpu",)
"""Those that take a plan."""
refusals = partial(selection.refusals, "paged_attention")


def implementations() -> dict[str, Callable[..., Any]]:
    """What can run on this device, the most preferred first, for the pages that kernels like best."""
    return selection.available(IMPLEMENTATIONS, refusals())


def takes_plan(asked: Asked) -> bool:
    """Whether a kernel that serves such pages on this process' first device has a use for plans: for others, one is in vain."""
    refused = refusals(asked)
    return any(name not in refused for name in PLANNED)


def paged_attention(
    queries: Float[Array, "B T H D"],
    key_pages: Float[Array, "P K page D"] | Quantised,
    value_pages: Float[Array, "P K page Dv"] | Quantised,
    page_table: Int32[Array, "B *heads num_pages"],
    page_starts: Int32[Array, "B *heads num_pages"],
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    *,
    plan: Plan | None = None,
    valid_slots: Bool[Array, "B *heads num_pages page"] | None = None,
    window: int | None = None,
    num_sinks: int = 0,
    soft_cap: float | None = None,
    scale: float | None = None,
    with_page_mass: bool = False,
    implementation: str | None = None,
    tiles: Mapping[str, int] | None = None,
) -> tuple[Array, ...]:
    """Causal attention of queries over paged keys and values; returns outputs [B, T, H, Dv] and log-sum-exp [B, T, H] (natural
    log, float32).

    Slot o of page-table entry n of sequence b holds token position p = page_starts[b, n] + o. A query at position t sees p
    iff p <= t, p < kv_lens[b], `valid_slots[b, n, o]` where given, and (no window, or p > t - window, or p < num_sinks): `window`
    counts the visible tokens including the current one. Unused entries are page 0 with start `NOWHERE`. Slots that no query of
    a sequence sees are never read arithmetically: they may hold NaN. A query that sees nothing gets 0 and log-sum-exp -inf.

    The tables need not be sorted nor contiguous: windowed layers list only the pages still held. With tables, starts and
    valid slots of [B, K, num_pages ...] every KV head has lists of its own, as after eviction or selection by head. Accumulates
    in float32, of queries in the type that a kernel multiplies in (of 16 bits on GPUs); `soft_cap` c maps a scaled score s to c * tanh(s / c) before masking; `scale` defaults to D ** -0.5.

    `Quantised` pages are attended to as what they stand for; scales of slots that nobody sees may hold NaN as well. With
    `with_page_mass` a third result [B, T, H, num_pages] (float32) says what share of each row's attention every table entry took:
    the shares of a row add up to 1, or to 0 where it sees nothing (arXiv 2306.14048).

    `plan` is what `plan_attention` made of these tables, positions, lengths, valid slots and masks: layers that share them share it,
    and launch nothing to find out which pages are live. Its figures are believed, and its pieces are its own, whatever `tiles` say;
    without one, each call makes its own.

    `tiles` are an implementation's tile sizes by name (`tuning.SPACES`); None takes what is remembered for shapes like these.

    Page ids must lie in [0, P). Others are harmless and give wrong answers: the nearest page is read in their place. Raises
    ValueError for shapes and formats that do not fit together, for out-of-range options and for an unavailable `implementation`; and while
    debugging is on (`pallas_kernels.debug`), for such ids.
    """
    check(
        queries, key_pages, value_pages, page_table, page_starts, valid_slots, window, num_sinks, soft_cap,
        {"query_positions": (query_positions, queries.shape[:2]), "kv_lens": (kv_lens, queries.shape[:1])},
    )  # fmt: skip
    if plan is not None:
        check_plan(plan, queries.shape, key_pages.shape, page_table.shape, valid_slots, window, num_sinks)
    return dispatch(
        "paged_attention",
        IMPLEMENTATIONS,
        implementation,
        (queries, key_pages, value_pages, page_table, page_starts, query_positions, kv_lens),
        tiles,
        plan=plan,
        valid_slots=valid_slots,
        window=window,
        num_sinks=num_sinks,
        soft_cap=soft_cap,
        scale=scale,
        with_page_mass=with_page_mass,
    )


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    arrays: tuple[Any, ...],
    tiles: Mapping[str, int] | None,
    *,
    scale: float | None,
    with_page_mass: bool,
    plan: Plan | None = None,
    **options: Any,
) -> tuple[Array, ...]:
    """Runs an op over pages, whose arguments have been checked, by the implementation that is asked for, with its tile sizes. `arrays`
    are queries, pools, tables, starts, and what the op wants to know of its queries; a plan goes to those that take one."""
    queries, key_pages, value_pages, page_table, page_starts, *of_queries = arrays
    asked = Asked.of(key_pages, value_pages, queries.shape[2] // key_pages.shape[1], queries.dtype)
    name, run = selection.select(op, implementation, implementations, selection.refusals(op, asked))
    check_tables(op, page_table, page_starts, len(key_pages))
    if 0 in (*queries.shape[:2], page_table.shape[-1]):  # no sequences, no queries, or no entries to list
        shape = queries.shape[:3]
        nothing = jnp.zeros((*shape, value_pages.shape[3]), queries.dtype), jnp.full(shape, -jnp.inf)
        return (*nothing, jnp.zeros((*shape, page_table.shape[-1]))) if with_page_mass else nothing
    if tiles is None:
        tiles = lookup(name, bucket_of(op, queries, key_pages, value_pages, page_table))
    check_tiles(name, tiles)
    if plan is not None and name in PLANNED:
        options["plan"] = plan
    return run(
        queries,
        key_pages,
        value_pages,
        jnp.clip(page_table, 0, len(key_pages) - 1),
        page_starts,
        *of_queries,
        scale=queries.shape[3] ** -0.5 if scale is None else float(scale),
        with_page_mass=with_page_mass,
        **options,
        **tiles,
    )


def bucket_of(op: str, queries: Array, key_pages: Pages, value_pages: Pages, page_table: Array) -> str:
    """The shapes that share a choice of tile sizes with these."""
    dims, per = (key_pages.shape[3], value_pages.shape[3]), key_pages.per if isinstance(key_pages, Quantised) else ""
    sizes = len(queries), queries.shape[1], page_table.shape[-1] * key_pages.shape[2]
    group = queries.shape[2] // key_pages.shape[1]
    return bucket(
        op if page_table.ndim == 2 else f"{op} by lists of heads",
        format_of(key_pages),
        per,
        dims,
        group,
        key_pages.shape[2],
        sizes,
    )
