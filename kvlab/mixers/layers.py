"""The layers that mixers and blocks are made of: `Linear`, `RMSNorm` and `LayerNorm`; and how learned decays begin."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from pallas_kernels.selection import this_device


class Linear(nnx.Linear):
    """`nnx.Linear` on the flattened leading axes: its weight gradient is then one matrix product, which XLA on CPU runs
    twice as fast as the contraction over two axes (docs/findings/training.md). On a GPU there are two rows at least: of
    one, XLA writes all products of weights to memory before it adds them up (docs/findings/kernels.md)."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) == 1 and this_device().platform == "gpu":
            rows = jnp.pad(rows, ((0, 1), (0, 0)))
        flat = super().__call__(rows, out_sharding)[: inputs.size // inputs.shape[-1]]
        return flat.reshape(*inputs.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (arXiv 1910.07467), in float32, returned in the input's
    dtype.

    With `num_groups` each of as many equal parts of the axis has its own mean. Flax's own norm mixes float32
    statistics with bfloat16 inputs, which strict promotion refuses.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, num_groups: int = 1):
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps, self.num_groups = eps, num_groups

    def __call__(self, inputs: Array) -> Array:
        x = inputs.astype(jnp.float32).reshape(*inputs.shape[:-1], self.num_groups, -1)
        scale = self.scale[...].reshape(*(1,) * (x.ndim - 2), *x.shape[-2:])
        return (rms_normed(x, self.eps) * scale).reshape(inputs.shape).astype(inputs.dtype)


def rms_normed(inputs: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32, returned in the input's dtype: `RMSNorm` without its
    scale."""
    x = inputs.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)).astype(inputs.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis (arXiv 1607.06450), in float32, returned in
    the input's dtype."""

    def __init__(self, dim: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))
        self.eps = eps

    def __call__(self, inputs: Array) -> Array:
        x = inputs.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        shape = (1,) * (x.ndim - 1) + (-1,)
        return (normed * self.scale[...].reshape(shape) + self.bias[...].reshape(shape)).astype(inputs.dtype)


def time_step_bias(rngs: nnx.Rngs, size: int, dt_range: Sequence[float]) -> nnx.Param[Array]:
    """Biases [size] whose softplus, a time step, is uniform by its logarithm in the range (Mamba, arXiv 2312.00752)."""
    shortest, longest = dt_range
    log_dt = jax.random.uniform(rngs.params(), (size,), minval=math.log(shortest), maxval=math.log(longest))
    dt = jnp.exp(log_dt)
    return nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))


def log_rates(rngs: nnx.Rngs, num_heads: int, rate_range: Sequence[float]) -> nnx.Param[Array]:
    """Logarithms [num_heads] of decay rates that are uniform in the range (Mamba-2, arXiv 2405.21060)."""
    slowest, fastest = rate_range
    return nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (num_heads,), minval=slowest, maxval=fastest)))
