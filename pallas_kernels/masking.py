"""How products of queries and keys become weights: the mask, the scale, the soft cap, and a softmax that survives
seeing none."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.typing import Bool, Float
from pallas_kernels.visible import CAUSAL, Visible


@dataclass(frozen=True)
class Scoring:
    """What attention is asked beside its arrays. Static: hashable, and equal if the fields are."""

    scale: float
    """Multiplies the products of queries and keys."""
    soft_cap: float | None = None
    """c maps a scaled score s to c * tanh(s / c), before masking."""
    visible: Visible = CAUSAL
    with_page_mass: bool = False
    """Whether the share of each page in a row's attention is asked for as well."""

    def __post_init__(self) -> None:
        is_number = isinstance(self.soft_cap, int | float | np.number)
        if self.soft_cap is not None and not (is_number and 0 < self.soft_cap < np.inf):
            raise ValueError(f"soft_cap = {self.soft_cap!r}: must be positive and finite")

    @property
    def num_sinks(self) -> int | None:
        """Sinks in front of what each query sees; None: there is no first position, every query sees from 0 on."""
        return None if self.visible.span is None else self.visible.num_sinks

    def capped(self, scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scaled scores under the soft cap, if there is one."""
        return soft_capped(scores, self.soft_cap)


def soft_capped(scores: Float[Array, "*shape"], soft_cap: float | None) -> Float[Array, "*shape"]:
    """Scaled scores s as c * tanh(s / c), for a soft cap c; None: as they are."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def share_of_tokens(
    log_sum_exp: Float[Array, "*shape"], sink_logits: Float[Array, "*#shape"] | None
) -> Float[Array, "*shape"]:
    """What tokens keep of a row's attention beside a logit that belongs to none of them, which takes exp(b) / (exp(b) +
    sum of exp(scores)); all of it without one. Outputs and weights are multiplied with it."""
    return jnp.ones_like(log_sum_exp) if sink_logits is None else jax.nn.sigmoid(log_sum_exp - sink_logits)


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
