"""The weights that attention kernels do not give back: of every slot of a sequence's pages."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.memory.pools import stored
from kvlab.memory.rotation import turned_back
from kvlab.memory.views.dense import weights_beside_sinks
from kvlab.memory.views.paged import lists_of
from kvlab.typing import Positions, Queries, SinkLogits
from pallas_kernels.formats import Quantised
from pallas_kernels.masking import soft_capped


def gathered(state: Any, pool: Any, name: str, pages: Array) -> Float[Array, "B K S D"]:
    """An array's slots in the pages [B, N] of each sequence, in their order, in float32."""
    tiles = jax.tree.map(lambda array: array[pages], stored(state, pool, name))
    tiles = tiles.values() if isinstance(tiles, Quantised) else tiles
    batch, _, heads = tiles.shape[:3]
    tiles = turned_back(state, tiles.astype(jnp.float32))
    return tiles.transpose(0, 2, 1, 3, 4).reshape(batch, heads, -1, tiles.shape[-1])


def paged_weights(
    tokens: Any, queries: Queries, slots: Positions, sink_logits: SinkLogits | None
) -> Float[Array, "B T H S"]:
    """The softmax weights of scaled queries over the slots of a sequence's pages: what attention kernels do not give
    back. Keys are gathered, which reads them once more."""
    lists = lists_of(tokens.plan)
    keys = gathered(tokens.state, tokens.pool, "keys", lists.table)
    batch, num_tokens, num_heads, dim = queries.shape
    asked = queries.reshape(batch, num_tokens, keys.shape[1], -1, dim)
    places = jnp.arange(keys.shape[2], dtype=jnp.int32)[None, None, :]
    seen = tokens.state.visible.sees(slots[:, :, None], places) & (places < tokens.slot_lens[:, None, None])
    keys = jnp.where(seen.any(axis=1)[:, None, :, None], keys, 0)
    scores = jnp.einsum("btkgd,bksd->bkgts", asked, keys, preferred_element_type=jnp.float32)
    scores = soft_capped(scores, tokens.state.soft_cap)
    weights = weights_beside_sinks(scores, seen[:, None, None], sink_logits)
    return weights.transpose(0, 3, 1, 2, 4).reshape(batch, num_tokens, num_heads, -1)
