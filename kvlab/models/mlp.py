"""The gated MLP of a block, dense or with most of its gates cut off."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvlab.mixers.layers import Linear
from kvlab.models.config import LayerConfig, ModelConfig
from kvlab.typing import Hidden


class GatedMLP(nnx.Module):
    """y = W_down (silu(W_gate x) * W_up x), after arXiv 2002.05202; gelu in silu's place, and a bias in
    each product, where the model says so. The layer may have a width of its own, and cut off most of its gates."""

    def __init__(self, layer: LayerConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        width = layer.width_of_mlp(model)

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, use_bias=model.mlp_bias, dtype=jnp.dtype(model.dtype), rngs=rngs)

        self.gate_up = linear(model.model_dim, 2 * width)
        self.down = linear(width, model.model_dim)
        self.activation, self.sparsity = model.activation, layer.mlp_sparsity

    def __call__(self, x: Hidden) -> Hidden:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        if self.sparsity:
            gate = gaussian_top_k(gate, self.sparsity)
        gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate)
        return self.down(gate * up)


def gaussian_top_k(gate: Array, sparsity: float) -> Array:
    """How far each number of the last axis is above a cut-off, and 0 for those below: were they normal, a share
    `sparsity` in (0, 1) would be below (arXiv 2506.06644, and Gemma 3n's MLPs). In float32, returned in the gate's
    dtype."""
    wide = gate.astype(jnp.float32)
    mean, variance = jnp.mean(wide, axis=-1, keepdims=True), jnp.var(wide, axis=-1, keepdims=True)
    std = jnp.sqrt(jnp.maximum(variance, jnp.finfo(jnp.float32).tiny))  # of 0 the root has no gradient
    return jax.nn.relu(wide - (mean + std * NormalDist().inv_cdf(sparsity))).astype(gate.dtype)
