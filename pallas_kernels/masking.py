"""Which keys a query sees, and a softmax that survives seeing none: shared by the attention references."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.typing import Bool, Float, Int32

NOWHERE = 2**30
"""First position of an unused page-table entry: later than every query, so none of its slots is ever visible."""


def visible(
    query_positions: Int32[Array, "..."], key_positions: Int32[Array, "..."], window: int | None, num_sinks: int
) -> Bool[Array, "..."]:
    """Causal visibility with an optional window (including the current token) and attention sinks at [0, num_sinks)."""
    seen = key_positions <= query_positions
    if window is not None:
        seen = seen & ((key_positions > query_positions - window) | (key_positions < num_sinks))
    return seen


def masked_softmax(
    scores: Float[Array, "*batch T S"], seen: Bool[Array, "*#batch T S"]
) -> tuple[Float[Array, "*batch T S"], Float[Array, "*batch T"]]:
    """Softmax over the seen keys and its log-sum-exp; a row that sees nothing gets zeros and -inf. NaN scores may hide
    behind the mask: they are replaced, never multiplied."""
    scores = jnp.where(seen, scores, -jnp.inf)
    highest = scores.max(axis=-1, keepdims=True)
    highest = jax.lax.stop_gradient(jnp.where(highest == -jnp.inf, 0, highest))  # cancels in both results
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    log_sum_exp = jnp.log(total) + highest
    return weights / jnp.where(total == 0, 1, total), log_sum_exp[..., 0]
