"""Attention of chunks of new tokens over the pages of their sequences, which hold them already (arXiv 2403.02310)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jax import Array

from pallas_kernels import selection
from pallas_kernels.debug import check_chunks
from pallas_kernels.formats import Quantised
from pallas_kernels.paged_attention.api import dispatch
from pallas_kernels.paged_attention.checks import check
from pallas_kernels.paged_prefill import reference
from pallas_kernels.typing import Bool, Float, Int32

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mosaic_gpu": selection.kernel("paged_prefill", "gpu"),
    "mosaic_tpu": selection.kernel("paged_prefill", "tpu"),
    "blocked": reference.blocked,
    "reference": reference.paged_prefill,
}
"""The first that can run is taken unless another is named."""
refusals = partial(selection.refusals, "paged_prefill")


def implementations() -> dict[str, Callable[..., Any]]:
    """What can run on this device, the most preferred first, for the pages that kernels like best."""
    return selection.available(IMPLEMENTATIONS, refusals())


def paged_prefill(
    queries: Float[Array, "B T H D"],
    key_pages: Float[Array, "P K page D"] | Quantised,
    value_pages: Float[Array, "P K page Dv"] | Quantised,
    page_table: Int32[Array, "B *heads num_pages"],
    page_starts: Int32[Array, "B *heads num_pages"],
    query_starts: Int32[Array, "B"],
    query_lens: Int32[Array, "B"],
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
    """Causal attention of a chunk of each sequence over its pages; returns outputs [B, T, H, Dv] and log-sum-exp [B, T, H].

    The chunk of sequence b is its tokens at positions [query_starts[b], query_starts[b] + query_lens[b]), whose keys and values are
    in the pages already (`kv_write`), as are those before it. Queries from `query_lens[b]` on fill up the batch: they get 0 and
    log-sum-exp -inf. Everything else is as in `paged_attention`, whose page tables these are. Raises ValueError as it does.
    """
    check(
        queries, key_pages, value_pages, page_table, page_starts, valid_slots, window, num_sinks, soft_cap,
        {"query_starts": (query_starts, queries.shape[:1]), "query_lens": (query_lens, queries.shape[:1])},
    )  # fmt: skip
    check_chunks("paged_prefill", query_starts, query_lens, queries.shape[1])
    return dispatch(
        "paged_prefill",
        IMPLEMENTATIONS,
        implementation,
        (queries, key_pages, value_pages, page_table, page_starts, query_starts, query_lens),
        tiles,
        valid_slots=valid_slots,
        window=window,
        num_sinks=num_sinks,
        soft_cap=soft_cap,
        scale=scale,
        with_page_mass=with_page_mass,
    )
