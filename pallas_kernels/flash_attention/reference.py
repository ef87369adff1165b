"""Dense causal attention in plain XLA, by blocks of queries.

Block i of queries reads keys [a, b) only: b is the block's end (causality), a the first position its first query sees.
Keys outside are never multiplied, so a causal layer costs about half of the full square and a windowed one its band.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.flash_attention.softmax import softmax_product
from pallas_kernels.masking import Scoring, share_of_tokens
from pallas_kernels.products import scores_of
from pallas_kernels.typing import Float

BLOCK_LEN = 64


def flash_attention(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K Dv"],
    scoring: Scoring,
    sink_logits: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H Dv"]:
    """See `api.flash_attention`."""
    batch, seq_len, num_heads, head_dim = queries.shape
    num_kv_heads, value_dim = values.shape[2:]
    # Head-major, so that each product is one plain batched matrix product.
    grouped = (queries * scoring.scale).reshape(batch, seq_len, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    keys, values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
    positions = jnp.arange(seq_len, dtype=jnp.int32)
    if sink_logits is not None:
        sink_logits = sink_logits.reshape(1, num_kv_heads, -1, 1)

    outputs = []
    for start in range(0, seq_len, BLOCK_LEN):
        end = min(start + BLOCK_LEN, seq_len)
        # With sinks the band would be two intervals; one interval from 0 is simpler and right.
        first = 0 if scoring.num_sinks else max(0, scoring.visible.earliest(start))
        scores = scores_of(grouped[:, :, :, start:end], keys[:, :, first:end])
        seen = scoring.visible.sees(positions[start:end, None], positions[None, first:end])
        # XLA on CPU adds the mask within the product; to select would be a pass of its own over the scores.
        masked = scoring.capped(scores) + jnp.where(seen, 0.0, -jnp.inf)[None, None, None]
        output, log_sums = softmax_product(masked, values[:, :, first:end])
        if sink_logits is not None:
            output = output * share_of_tokens(log_sums, sink_logits)[..., None]
        outputs.append(output)
    joined = jnp.concatenate(outputs, axis=3).astype(values.dtype)
    return joined.transpose(0, 3, 1, 2, 4).reshape(batch, seq_len, num_heads, value_dim)
