"""The gated MLP of a block, dense or with most of its gates cut off."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvlab.mixers.layers import Linear
from kvlab.typing import Hidden


class GatedMLP(nnx.Module):
    """y = W_down (silu(W_gate x) * W_up x), after arXiv 2002.05202; with `activation` "gelu" its tanh form in silu's
    place, and with `bias` one in each product. A `sparsity` above 0 is the share of gates that are cut off."""

    def __init__(
        self,
        model_dim: int,
        mlp_dim: int,
        *,
        activation: str,
        bias: bool,
        dtype: str,
        sparsity: float = 0.0,
        rngs: nnx.Rngs,
    ):
        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, use_bias=bias, dtype=jnp.dtype(dtype), rngs=rngs)

        self.gate_up = linear(model_dim, 2 * mlp_dim)
        self.down = linear(mlp_dim, model_dim)
        self.activation, self.sparsity = activation, sparsity

    def __call__(self, x: Hidden) -> Hidden:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        if self.sparsity:
            gate = gaussian_top_k(gate, self.sparsity)
        return self.down(activated(gate, self.activation) * up)


def activated(gate: Array, activation: str) -> Array:
    """The gate under "silu", or "gelu" in its tanh form."""
    return jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate)


def gaussian_top_k(gate: Array, sparsity: float) -> Array:
    """How far each number of the last axis is above a cut-off, and 0 for those below: were they normal, a share
    `sparsity` in (0, 1) would be below (arXiv 2506.06644, and Gemma 3n's MLPs). In float32, returned in the gate's
    dtype."""
    wide = gate.astype(jnp.float32)
    mean, variance = jnp.mean(wide, axis=-1, keepdims=True), jnp.var(wide, axis=-1, keepdims=True)
    std = jnp.sqrt(jnp.maximum(variance, jnp.finfo(jnp.float32).tiny))  # of 0 the root has no gradient
    return jax.nn.relu(wide - (mean + std * NormalDist().inv_cdf(sparsity))).astype(gate.dtype)
