"""Attention of a chunk of queries over the pages of each sequence (arXiv 2309.06180); decode is a chunk of one."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32

from pallas_kernels.debug import check_tables
from pallas_kernels.formats import Pages, Quantised, Scaling, check_format, format_of
from pallas_kernels.paged_attention import blocked, reference
from pallas_kernels.selection import select, wrong_device
from pallas_kernels.tuning import bucket, check_tiles, lookup


def _mosaic_gpu(*arrays: Any, **options: Any) -> tuple[Array, ...]:
    from pallas_kernels.paged_attention import gpu  # which takes a second to import, for nothing on most machines

    return gpu.paged_attention(*arrays, **options)


def _mosaic_tpu(*arrays: Any, **options: Any) -> tuple[Array, ...]:
    from pallas_kernels.paged_attention import tpu

    return tpu.paged_attention(*arrays, **options)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mosaic_gpu": _mosaic_gpu,
    "mosaic_tpu": _mosaic_tpu,
    "blocked": blocked.paged_attention,
    "reference": reference.paged_attention,
}
"""The first that can run is taken unless another is named. "reference" is the oracle, and the one that can be differentiated."""


def refusals(
    format: str = "bfloat16",
    page_size: int = 64,
    head_dims: tuple[int, int] = (128, 128),
    group: int = 1,
    per: Scaling = "token",
    query_dtype: Any = "bfloat16",
) -> dict[str, str]:
    """Why an implementation cannot serve such pages on this process' first device, for those that cannot. A `format` is one of
    `formats.FORMATS`, or the name of a type."""
    reasons = {"mosaic_gpu": wrong_device("gpu"), "mosaic_tpu": wrong_device("tpu")}
    if not reasons["mosaic_gpu"]:
        from pallas_kernels.paged_attention import gpu

        reasons["mosaic_gpu"] = gpu.refusal(format, page_size, head_dims, group, per)
    if not reasons["mosaic_tpu"]:
        from pallas_kernels.paged_attention import tpu

        reasons["mosaic_tpu"] = tpu.refusal(format, page_size, head_dims, query_dtype)
    return {name: reason for name, reason in reasons.items() if reason}


def implementations() -> dict[str, Callable[..., Any]]:
    """What can run on this device, the most preferred first, for the pages that kernels like best."""
    refused = refusals()
    return {name: run for name, run in IMPLEMENTATIONS.items() if name not in refused}


def paged_attention(
    queries: Float[Array, "B T H D"],
    key_pages: Float[Array, "P K page D"] | Quantised,
    value_pages: Float[Array, "P K page Dv"] | Quantised,
    page_table: Int32[Array, "B *heads num_pages"],
    page_starts: Int32[Array, "B *heads num_pages"],
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    *,
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

    `tiles` are an implementation's tile sizes by name (`tuning.SPACES`); None takes what is remembered for shapes like these.

    Page ids must lie in [0, P). Others are harmless and give wrong answers: the nearest page is read in their place. Raises
    ValueError for shapes and formats that do not fit together, for out-of-range options and for an unavailable `implementation`; and while
    debugging is on (`pallas_kernels.debug`), for such ids.
    """
    check(
        queries, key_pages, value_pages, page_table, page_starts, valid_slots, window, num_sinks, soft_cap,
        {"query_positions": (query_positions, queries.shape[:2]), "kv_lens": (kv_lens, queries.shape[:1])},
    )  # fmt: skip
    refused = refusals(**asked_of(queries, key_pages, value_pages))
    name, run = select("paged_attention", implementation, IMPLEMENTATIONS, refused)
    check_tables("paged_attention", page_table, page_starts, len(key_pages))
    if nothing := answer_to_nothing(queries, value_pages, page_table, with_page_mass):
        return nothing
    if tiles is None:
        tiles = lookup(name, bucket_of("paged_attention", queries, key_pages, value_pages, page_table))
    check_tiles(name, tiles)
    return run(
        queries,
        key_pages,
        value_pages,
        jnp.clip(page_table, 0, len(key_pages) - 1),
        page_starts,
        query_positions,
        kv_lens,
        valid_slots=valid_slots,
        window=window,
        num_sinks=num_sinks,
        soft_cap=soft_cap,
        scale=queries.shape[3] ** -0.5 if scale is None else scale,
        with_page_mass=with_page_mass,
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


def check_pages(key_pages: Pages, value_pages: Pages) -> None:
    """Raises ValueError for pools that are not of one format, or whose arrays do not fit together."""
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if pages.ndim != 4 or 0 in pages.shape:
            raise ValueError(f"{name} = {pages.shape}: must be [P, K, page, D], with one at least of each")
        if isinstance(pages, Quantised):
            check_format(pages.format, pages.per, pages.shape)
            if pages.scales.dtype != jnp.float32:
                raise ValueError(f"{name}.scales of {pages.scales.dtype.name}: must be float32")
    if key_pages.shape[:3] != value_pages.shape[:3]:
        raise ValueError(f"value_pages = {value_pages.shape}: must share [P, K, page] with keys {key_pages.shape}")
    if isinstance(key_pages, Quantised) != isinstance(value_pages, Quantised) or key_pages.dtype != value_pages.dtype:
        raise ValueError(f"value_pages of {format_of(value_pages)}: must be stored as keys are, {format_of(key_pages)}")
    if isinstance(key_pages, Quantised) and isinstance(value_pages, Quantised) and key_pages.per != value_pages.per:
        raise ValueError(f"value_pages: scaled by {value_pages.per}, must be by {key_pages.per}, as keys are")
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if isinstance(pages, Quantised):
            wanted = (*pages.shape[:2], pages.shape[2 if pages.per == "token" else 3])
            if pages.scales.shape != wanted:
                raise ValueError(f"{name}.scales = {pages.scales.shape}: must be {wanted}, one for each {pages.per}")


def answer_to_nothing(
    queries: Array, value_pages: Pages, page_table: Array, with_page_mass: bool
) -> tuple[Array, ...] | None:
    """The answer where there are no sequences, no queries or no entries to list; None where there are."""
    if 0 not in (*queries.shape[:2], page_table.shape[-1]):
        return None
    shape = queries.shape[:3]
    answer = jnp.zeros((*shape, value_pages.shape[3]), queries.dtype), jnp.full(shape, -jnp.inf)
    return (*answer, jnp.zeros((*shape, page_table.shape[-1]))) if with_page_mass else answer


def asked_of(queries: Array, key_pages: Pages, value_pages: Pages) -> dict[str, Any]:
    """What `refusals` is to be asked."""
    return {
        "format": format_of(key_pages),
        "page_size": key_pages.shape[2],
        "head_dims": (key_pages.shape[3], value_pages.shape[3]),
        "group": queries.shape[2] // key_pages.shape[1],
        "per": key_pages.per if isinstance(key_pages, Quantised) else "token",
        "query_dtype": queries.dtype,
    }


def check(
    queries: Array,
    key_pages: Pages,
    value_pages: Pages,
    page_table: Array,
    page_starts: Array,
    valid_slots: Array | None,
    window: int | None,
    num_sinks: int,
    soft_cap: float | None,
    by_sequence: dict[str, tuple[Array, tuple[int, ...]]],
) -> None:
    """Raises ValueError for shapes that do not fit together and options out of range; `by_sequence` are arrays and the shapes that
    the queries ask of them."""
    if queries.ndim != 4 or not queries.shape[2] or not jnp.issubdtype(queries.dtype, jnp.floating):
        raise ValueError(
            f"queries = {queries.dtype.name}{list(queries.shape)}: must be floating [B, T, H, D], with a head at least"
        )
    check_pages(key_pages, value_pages)
    num_heads, num_kv_heads = queries.shape[2], key_pages.shape[1]
    if not isinstance(key_pages, Quantised) and not jnp.issubdtype(key_pages.dtype, jnp.floating):
        raise ValueError(f"key_pages of {key_pages.dtype.name}: must be floating, or Quantised with scales")
    if page_table.ndim not in (2, 3):
        raise ValueError(
            f"page_table = {page_table.shape}: must be [B, num_pages], or [B, K, num_pages] for lists of each head"
        )
    for name, array in (
        ("page_table", page_table),
        ("page_starts", page_starts),
        *((n, x) for n, (x, _) in by_sequence.items()),
    ):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} of {array.dtype.name}: must be int32")
    for name, value in (("window", window), ("num_sinks", num_sinks)):
        if value is not None and not isinstance(value, int | np.integer):
            raise ValueError(f"{name} = {value!r}: must be a whole number")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads = {num_heads}: must be a multiple of num_kv_heads = {num_kv_heads}")
    if queries.shape[3] != key_pages.shape[3]:
        raise ValueError(f"queries: head dim {queries.shape[3]} must equal the keys' {key_pages.shape[3]}")
    if page_table.shape != page_starts.shape:
        raise ValueError(f"page_starts = {page_starts.shape}: must have the shape of page_table {page_table.shape}")
    for name, (array, shape) in by_sequence.items():
        if array.shape != shape:
            raise ValueError(f"{name} = {array.shape}: must be {shape}, as queries {queries.shape} say")
    if len(page_table) != len(queries):
        raise ValueError(f"page_table = {page_table.shape}: must have a row for each of {len(queries)} sequences")
    if page_table.ndim == 3 and page_table.shape[1] != num_kv_heads:
        raise ValueError(f"page_table = {page_table.shape}: must list pages for each of {num_kv_heads} KV heads")
    slots = (*page_table.shape, key_pages.shape[2])
    if valid_slots is not None and valid_slots.shape != slots:
        raise ValueError(f"valid_slots = {valid_slots.shape}: must be {slots}, a flag for each slot of each entry")
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: must be at least 1 (the current token counts)")
    if num_sinks < 0:
        raise ValueError(f"num_sinks = {num_sinks}: must be at least 0")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap = {soft_cap}: must be positive")
