"""Short causal depthwise convolution with its history: inside Mamba-2, and optionally in front of any mixer."""

import jax
import jax.numpy as jnp
from flax import nnx

from kvlab.ledger.states import ArraySpec, RecurrentState
from kvlab.memory.views import StateView
from kvlab.typing import Channels


class ShortConv(nnx.Module):
    """y_t = bias + sum_{j < width} kernel_j * x_{t - j}, each channel by itself; no bias without `use_bias`.

    State: the last width - 1 inputs, (width - 1) * channels * itemsize bytes a sequence.
    """

    def __init__(self, channels: int, width: int, *, use_bias: bool = True, dtype: str, rngs: nnx.Rngs):
        bound = width**-0.5
        shape = (width, channels)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(channels))
        self.width, self.channels, self.use_bias, self.dtype = width, channels, use_bias, dtype

    def state(self) -> RecurrentState:
        """The history of inputs this convolution needs."""
        return RecurrentState((ArraySpec("history", (self.width - 1, self.channels), self.dtype),))

    def __call__(self, x: Channels, memory: StateView) -> tuple[Channels, StateView]:
        """Outputs [B, T, C] for inputs [B, T, C], and the history behind them."""
        num_tokens = x.shape[1]
        before = memory.read()["history"].astype(x.dtype)
        extended = jnp.concatenate([before, x], axis=1)
        kernel = self.kernel[...].astype(x.dtype)
        outputs = self.bias[...].astype(x.dtype)[None, None, :] if self.use_bias else jnp.zeros((), x.dtype)
        for lag in range(self.width):
            first = self.width - 1 - lag
            outputs = outputs + kernel[lag][None, None, :] * extended[:, first : first + num_tokens]
        # Tokens [count - width + 1, count) of the step, reaching into the old history: rows [count, count + width - 1).
        rows = memory.counts[:, None] + jnp.arange(self.width - 1, dtype=jnp.int32)[None, :]
        history = jnp.take_along_axis(extended, rows[:, :, None], axis=1)
        return outputs, memory.write({"history": history})
