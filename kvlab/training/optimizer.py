"""AdamW (arXiv 1711.05101) with warm-up, cosine decay, global-norm clipping and a weight-decay mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax

from kvlab.schema import Schema, real
from kvlab.typing import Params, PyTree


@dataclass(frozen=True)
class OptimizerConfig(Schema):
    """`warmup_fraction` of the steps is linear warm-up; the cosine ends at `final_fraction` of the peak. A `clip_norm`
    of null clips nothing."""

    learning_rate: float = real(3e-3, 0.0, 10.0, open_low=True)
    weight_decay: float = real(0.1, 0.0, 10.0)
    beta1: float = real(0.9, 0.0, 0.9999)
    beta2: float = real(0.999, 0.0, 0.99999)
    eps: float = real(1e-8, 0.0, 1.0, open_low=True)
    clip_norm: float | None = real(1.0, 0.0, 1e6, open_low=True, optional=True)
    warmup_fraction: float = real(0.05, 0.0, 0.9)
    final_fraction: float = real(0.0, 0.0, 1.0)


def decays(params: Params) -> PyTree:
    """True where weight decay applies: matrices do, vectors (norms, biases, rates) and convolution kernels do not."""

    def is_decayed(path: Sequence[Any], leaf: jax.Array) -> bool:
        return leaf.ndim >= 2 and not any("conv" in str(part.key) for part in path)

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer with a peak learning rate of 1: the step multiplies by the real one, which stays a traced argument,
    so that tuning it compiles nothing anew."""
    warmup = round(num_steps * config.warmup_fraction)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else 1.0, 1.0, warmup, max(num_steps, warmup + 1), config.final_fraction
    )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    chain = optax.chain(
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule),
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # optax mixes Python floats and integer counters; our own code does not
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)
