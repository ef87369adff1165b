"""The gated MLP of a dense layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from kvlab.mixers.layers import Linear
from kvlab.typing import Hidden


class GatedMLP(nnx.Module):
    """y = W_down (silu(W_gate x) * W_up x), after arXiv 2002.05202; with `activation` "gelu" its tanh form in silu's
    place, and with `bias` one in each product."""

    def __init__(self, model_dim: int, mlp_dim: int, *, activation: str, bias: bool, dtype: str, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, use_bias=bias, dtype=jnp.dtype(dtype), rngs=rngs)

        self.gate_up = linear(model_dim, 2 * mlp_dim)
        self.down = linear(mlp_dim, model_dim)
        self.activation = activation

    def __call__(self, x: Hidden) -> Hidden:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate)
        return self.down(gate * up)
