"""Paged attention in plain XLA: gathers whole (page, head) tiles, then attends. The oracle, and the CPU path."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.formats import each_array, tile_values
from pallas_kernels.masking import Scoring, masked_softmax
from pallas_kernels.paged_attention.sharing import any_lists
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.typing import Float, Int32


@any_lists
def paged_attention(
    queries: Float[Array, "B T H D"],
    pages: Pages,
    lists: Lists,
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    scoring: Scoring,
) -> tuple[Array, ...]:
    """See `api.paged_attention`."""
    batch, num_queries, num_heads, _ = queries.shape
    num_kv_heads, page_size, value_dim = pages.num_kv_heads, pages.page_size, pages.head_dims[1]
    num_slots = lists.num_entries * page_size

    offsets = jnp.arange(page_size, dtype=jnp.int32)[None, None, :]
    positions = (lists.starts[:, :, None] + offsets).reshape(batch, 1, num_slots)
    seen = scoring.visible.sees(query_positions[:, :, None], positions)
    seen = seen & (positions < kv_lens[:, None, None])  # [B, T, slots]
    if lists.valid is not None:
        seen = seen & lists.valid.reshape(batch, 1, num_slots)

    grouped = queries.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, -1)
    # [B, num_pages, K, page, D]
    tiles = [tile_values(each_array(pool, lambda x: x[lists.table])) for pool in pages.pools]
    # A zero weight does not silence a NaN, forwards or backwards: slots that nobody sees are replaced before products.
    readable = seen.any(axis=1).reshape(batch, -1, 1, page_size, 1)
    tiles = [jnp.where(readable, tile, 0) for tile in tiles]
    key_tiles, value_tiles = tiles[0], tiles[-1][..., :value_dim]
    if pages.per is not None:
        grouped = grouped.astype(jnp.float32)
    scores = jnp.einsum("btkgd,bnkpd->bkgtnp", grouped, key_tiles, preferred_element_type=jnp.float32) * scoring.scale
    scores = scoring.capped(scores.reshape(*scores.shape[:4], num_slots))
    weights, log_sum_exp = masked_softmax(scores, seen[:, None, None])

    value_tiles = value_tiles.astype(jnp.float32)
    weights = weights.reshape(*weights.shape[:4], -1, page_size)
    outputs = jnp.einsum("bkgtnp,bnkpd->btkgd", weights, value_tiles)
    outputs = outputs.reshape(batch, num_queries, num_heads, value_dim).astype(queries.dtype)
    log_sum_exp = log_sum_exp.transpose(0, 3, 1, 2).reshape(batch, num_queries, num_heads)
    if not scoring.with_page_mass:
        return outputs, log_sum_exp
    mass = weights.sum(axis=-1).transpose(0, 3, 1, 2, 4)
    return outputs, log_sum_exp, mass.reshape(batch, num_queries, num_heads, -1)
