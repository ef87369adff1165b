"""Paged attention in plain XLA: gathers whole (page, head) tiles, then attends. The oracle, and the CPU path."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.formats import Quantised, each_array, tile_values
from pallas_kernels.masking import masked_softmax, visible
from pallas_kernels.paged_attention.pages import any_lists
from pallas_kernels.typing import Bool, Float, Int32


@any_lists
def paged_attention(
    queries: Float[Array, "B T H D"],
    key_pages: Float[Array, "P K page D"] | Quantised,
    value_pages: Float[Array, "P K page Dv"] | Quantised,
    page_table: Int32[Array, "B num_pages"],
    page_starts: Int32[Array, "B num_pages"],
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    *,
    valid_slots: Bool[Array, "B num_pages page"] | None = None,
    window: int | None,
    num_sinks: int,
    soft_cap: float | None,
    scale: float,
    with_page_mass: bool = False,
) -> tuple[Array, ...]:
    """See `api.paged_attention`."""
    batch, num_queries, num_heads, _ = queries.shape
    _, num_kv_heads, page_size, value_dim = value_pages.shape
    num_slots = page_table.shape[1] * page_size

    offsets = jnp.arange(page_size, dtype=jnp.int32)[None, None, :]
    positions = (page_starts[:, :, None] + offsets).reshape(batch, 1, num_slots)
    seen = visible(query_positions[:, :, None], positions, window, num_sinks)
    seen = seen & (positions < kv_lens[:, None, None])  # [B, T, slots]
    if valid_slots is not None:
        seen = seen & valid_slots.reshape(batch, 1, num_slots)

    grouped = queries.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, -1)
    # [B, num_pages, K, page, D]
    key_tiles, value_tiles = (
        tile_values(each_array(pool, lambda x: x[page_table])) for pool in (key_pages, value_pages)
    )
    # A weight of zero does not silence a NaN, forwards or backwards: slots that nobody sees are replaced before the products.
    readable = seen.any(axis=1).reshape(batch, -1, 1, page_size, 1)
    key_tiles, value_tiles = (jnp.where(readable, tiles, 0) for tiles in (key_tiles, value_tiles))
    if isinstance(key_pages, Quantised):
        grouped = grouped.astype(jnp.float32)
    scores = jnp.einsum("btkgd,bnkpd->bkgtnp", grouped, key_tiles, preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(*scores.shape[:4], num_slots)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights, log_sum_exp = masked_softmax(scores, seen[:, None, None])

    value_tiles = value_tiles.astype(jnp.float32)
    weights = weights.reshape(*weights.shape[:4], -1, page_size)
    outputs = jnp.einsum("bkgtnp,bnkpd->btkgd", weights, value_tiles)
    outputs = outputs.reshape(batch, num_queries, num_heads, value_dim).astype(queries.dtype)
    log_sum_exp = log_sum_exp.transpose(0, 3, 1, 2).reshape(batch, num_queries, num_heads)
    if not with_page_mass:
        return outputs, log_sum_exp
    mass = weights.sum(axis=-1).transpose(0, 3, 1, 2, 4)
    return outputs, log_sum_exp, mass.reshape(batch, num_queries, num_heads, -1)
