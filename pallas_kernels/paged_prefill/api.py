"""Attention of chunks of new tokens over the pages of their sequences, which hold them already (arXiv 2403.02310)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32

from pallas_kernels.debug import check_chunks, check_tables
from pallas_kernels.formats import Quantised, Scaling
from pallas_kernels.paged_attention import api as paged
from pallas_kernels.paged_prefill import reference
from pallas_kernels.selection import select
from pallas_kernels.tuning import check_tiles, lookup


def _mosaic_gpu(*arrays: Any, **options: Any) -> tuple[Array, ...]:
    from pallas_kernels.paged_prefill import gpu

    return gpu.paged_prefill(*arrays, **options)


def _mosaic_tpu(*arrays: Any, **options: Any) -> tuple[Array, ...]:
    from pallas_kernels.paged_prefill import tpu

    return tpu.paged_prefill(*arrays, **options)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mosaic_gpu": _mosaic_gpu,
    "mosaic_tpu": _mosaic_tpu,
    "blocked": reference.blocked,
    "reference": reference.paged_prefill,
}
"""The first that can run is taken unless another is named."""


def refusals(
    format: str = "bfloat16",
    page_size: int = 64,
    head_dims: tuple[int, int] = (128, 128),
    group: int = 1,
    per: Scaling = "token",
    query_dtype: Any = "bfloat16",
) -> dict[str, str]:
    """Why an implementation cannot serve such pages on this process' first device: what `paged_attention` cannot, neither can this."""
    return paged.refusals(format, page_size, head_dims, group, per, query_dtype)


def implementations() -> dict[str, Callable[..., Any]]:
    """What can run on this device, the most preferred first, for the pages that kernels like best."""
    refused = refusals()
    return {name: run for name, run in IMPLEMENTATIONS.items() if name not in refused}


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
    paged.check(
        queries, key_pages, value_pages, page_table, page_starts, valid_slots, window, num_sinks, soft_cap,
        {"query_starts": (query_starts, queries.shape[:1]), "query_lens": (query_lens, queries.shape[:1])},
    )  # fmt: skip
    refused = refusals(**paged.asked_of(queries, key_pages, value_pages))
    name, run = select("paged_prefill", implementation, IMPLEMENTATIONS, refused)
    check_tables("paged_prefill", page_table, page_starts, len(key_pages))
    check_chunks("paged_prefill", query_starts, query_lens, queries.shape[1])
    if nothing := paged.answer_to_nothing(queries, value_pages, page_table, with_page_mass):
        return nothing
    if tiles is None:
        tiles = lookup(name, paged.bucket_of("paged_prefill", queries, key_pages, value_pages, page_table))
    check_tiles(name, tiles)
    return run(
        queries,
        key_pages,
        value_pages,
        jnp.clip(page_table, 0, len(key_pages) - 1),
        page_starts,
        query_starts,
        query_lens,
        valid_slots=valid_slots,
        window=window,
        num_sinks=num_sinks,
        soft_cap=soft_cap,
        scale=queries.shape[3] ** -0.5 if scale is None else scale,
        with_page_mass=with_page_mass,
        **tiles,
    )
