"""The baseline: one row of max_len slots a sequence. Queries travel to the rows, so that the cache is read in place."""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kvlab.memory.pools import stored
from kvlab.memory.rotation import turned, turned_back
from kvlab.memory.views.base import PlannedTokens
from kvlab.typing import HeadOutputs, Positions, Queries, SinkLogits
from pallas_kernels.formats import Quantised, tile_values
from pallas_kernels.masking import masked_softmax, share_of_tokens, soft_capped
from pallas_kernels.products import scores_of, weighted


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseTokens(PlannedTokens):
    """Rows of keys and values; a row is one page of max_len slots."""

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        keys = stored(self.state, self.pool, "keys")
        rows = jnp.asarray(self.plan.pages)[:, 0]

        def to_rows(x: Array) -> Array:
            return jnp.zeros((len(keys), *x.shape[1:]), x.dtype).at[rows].set(x, mode="drop")

        slots = jnp.arange(keys.shape[2], dtype=jnp.int32)[None, None, :]
        seen = self.state.visible.sees(to_rows(self.query_slots(queries.shape[1]))[:, :, None], slots)
        seen = seen & (slots < to_rows(self.slot_lens)[:, None, None])
        asked = turned(self.state, queries.astype(jnp.float32) if isinstance(keys, Quantised) else queries)
        values = tile_values(stored(self.state, self.pool, "values"))
        outputs = attend_densely(self.state, to_rows(asked), tile_values(keys), values, seen, sink_logits)
        outputs = turned_back(self.state, outputs).astype(queries.dtype)
        return outputs.at[rows].get(mode="fill", fill_value=0), self


def attend_densely(
    state: Any,
    queries: Queries,
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S Dv"],
    seen: Bool[Array, "B T S"],
    sink_logits: SinkLogits | None = None,
) -> HeadOutputs:
    """Attention, as the readers of a state read it, over the keys that each query sees, in the queries' type. What
    nobody sees may hold NaN."""
    return dense_outputs(dense_weights(state, queries, keys, seen, sink_logits), values, seen).astype(queries.dtype)


def dense_weights(
    state: Any,
    queries: Queries,
    keys: Float[Array, "B K S D"],
    seen: Bool[Array, "B T S"],
    sink_logits: SinkLogits | None = None,
) -> Float[Array, "B K G T S"]:
    """The weights of that attention."""
    num_kv_heads, dim = keys.shape[1], keys.shape[3]
    grouped = queries.reshape(*queries.shape[:2], num_kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    scores = soft_capped(scores_of(grouped, keys) * state.scale(dim), state.soft_cap)
    return weights_beside_sinks(scores, seen[:, None, None], sink_logits)


def dense_outputs(
    weights: Float[Array, "B K G T S"], values: Float[Array, "B K S Dv"], seen: Bool[Array, "B T S"]
) -> Float[Array, "B T H Dv"]:
    """What weights make of values, in float32."""
    readable = jnp.where(seen.any(axis=1)[:, None, :, None], values, 0).astype(jnp.float32)
    outputs = weighted(weights, readable).transpose(0, 3, 1, 2, 4)
    return outputs.reshape(*outputs.shape[:2], -1, values.shape[-1])


def weights_beside_sinks(
    scores: Float[Array, "B K G T S"], seen: Bool[Array, "*#shape"], sink_logits: SinkLogits | None
) -> Float[Array, "B K G T S"]:
    """Softmax weights over the keys that each query sees, beside the sink logits of the query heads, K times G."""
    weights, log_sums = masked_softmax(scores, seen)
    if sink_logits is None:
        return weights
    return weights * share_of_tokens(log_sums, sink_logits.reshape(1, *scores.shape[1:3], 1))[..., None]
