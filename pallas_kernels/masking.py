"""Which keys a query sees, what may be asked of that, and a softmax that survives seeing none: shared by all attention."""

import jax
import jax.numpy as jnp
import numpy as np
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


def check_options(window: int | None, num_sinks: int, soft_cap: float | None) -> None:
    """Raises ValueError for what attention of any kind cannot be asked."""
    for name, value in (("window", window), ("num_sinks", num_sinks)):
        if value is not None and not isinstance(value, int | np.integer):
            raise ValueError(f"{name} = {value!r}: must be a whole number")
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: must be at least 1 (the current token counts)")
    if num_sinks < 0:
        raise ValueError(f"num_sinks = {num_sinks}: must be at least 0")
    for name, value in (("window", window), ("num_sinks", num_sinks)):
        if value is not None and value >= NOWHERE:
            raise ValueError(f"{name} = {value}: must be below {NOWHERE}")
    is_number = isinstance(soft_cap, int | float | np.number)
    if soft_cap is not None and not (is_number and 0 < soft_cap < np.inf):
        raise ValueError(f"soft_cap = {soft_cap!r}: must be positive and finite")
