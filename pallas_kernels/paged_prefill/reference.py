"""A chunk is paged attention with a position for each of its tokens, and none for what fills it up."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention import blocked as paged_blocked
from pallas_kernels.paged_attention import reference as paged_reference
from pallas_kernels.typing import Int32


def positions_of(
    query_starts: Int32[Array, "B"], query_lens: Int32[Array, "B"], num_queries: int
) -> tuple[Int32[Array, "B T"], Int32[Array, "B"]]:
    """The position of every query, -1 for what is none and sees nothing; and the tokens stored."""
    numbers = jnp.arange(num_queries, dtype=jnp.int32)[None]
    positions = jnp.where(numbers < query_lens[:, None], query_starts[:, None] + numbers, -1)
    return positions, query_starts + query_lens


def by_positions(run: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """An implementation of `paged_attention` as one of `paged_prefill`."""

    def prefill(queries, key_pages, value_pages, page_table, page_starts, query_starts, query_lens, **options: Any):
        positions, kv_lens = positions_of(query_starts, query_lens, queries.shape[1])
        return run(queries, key_pages, value_pages, page_table, page_starts, positions, kv_lens, **options)

    return prefill


paged_prefill = by_positions(paged_reference.paged_attention)
blocked = by_positions(paged_blocked.paged_attention)
