"""Mamba-2: a state-space layer with scalar decay per head, by state-space duality (arXiv 2405.21060)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from kvlab.ledger.states import ArraySpec, RecurrentState, State
from kvlab.memory.views import StateView
from kvlab.mixers.base import Knob, LayerMemory, Mixer, MixerConfig
from kvlab.mixers.convolution import ShortConv
from kvlab.mixers.layers import Linear, RMSNorm, log_rates, time_step_bias
from kvlab.schema import ConfigError, check_ends, integer, reals
from kvlab.typing import Hidden, Positions
from pallas_kernels.ssd import ssd, ssd_step


@dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """Hyper-parameters of one Mamba-2 layer: num_heads * head_dim inner channels, state_dim numbers for each.

    Initial time steps are log-uniform in `dt_range`, initial decay rates uniform in `rate_range`; defaults as
    published.
    """

    state_dim: int = integer(16, 1, 4096)
    num_heads: int = integer(2, 1, 1024)
    head_dim: int = integer(64, 1, 1024)
    num_groups: int = integer(1, 1, 1024)
    conv_len: int = integer(4, 2, 64)
    chunk_len: int = integer(64, 1, 4096)
    dt_range: tuple[float, ...] = reals((1e-3, 1e-1), 0.0, 100.0, open_low=True, min_len=2)
    rate_range: tuple[float, ...] = reals((1.0, 16.0), 0.0, 1000.0, open_low=True, min_len=2)

    def cross_check(self) -> None:
        super().cross_check()
        if self.num_heads % self.num_groups:
            legal = [g for g in range(1, self.num_heads + 1) if self.num_heads % g == 0]
            raise ConfigError("num_groups", self.num_groups, f"must divide num_heads: one of {legal}")
        check_ends("dt_range", self.dt_range)
        check_ends("rate_range", self.rate_range)

    def knob(self, context_len: int) -> Knob:
        return Knob("state_dim", range(1, 4097))


class Mamba2(Mixer):
    """Input-dependent scalar decay: h_t = exp(-a dt_t) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t + d x_t, gated and
    normed.

    State a sequence, whatever its length: num_heads * head_dim * state_dim float32 numbers, and conv_len - 1 columns of
    the convolution over (x, b, c). Parallel form in chunks; one token is the exact recurrence.
    """

    Config = Mamba2Config
    parallel_op = "ssd"

    def __init__(self, config: Mamba2Config, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        heads = config.num_heads
        self.inner = heads * config.head_dim
        self.conv_channels = self.inner + 2 * config.num_groups * config.state_dim
        self.split = Linear(
            model_dim, self.inner + self.conv_channels + heads, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs
        )
        self.conv = ShortConv(self.conv_channels, config.conv_len, dtype=dtype, rngs=rngs)
        self.dt_bias = time_step_bias(rngs, heads, config.dt_range)
        self.log_rate = log_rates(rngs, heads, config.rate_range)
        self.skip = nnx.Param(jnp.ones(heads))
        self.norm = RMSNorm(self.inner, eps=config.norm_eps, num_groups=config.num_groups)
        self.out = Linear(self.inner, model_dim, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)
        self.config, self.dtype = config, dtype

    def states(self) -> dict[str, State]:
        config = self.config
        ssm = RecurrentState((ArraySpec("ssm", (config.num_heads, config.head_dim, config.state_dim), "float32"),))
        return {"ssm": ssm, "conv": self.conv.state()}

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        config = self.config
        batch, num_tokens, _ = x.shape
        gate, channels, dt = jnp.split(self.split(x), [self.inner, self.inner + self.conv_channels], axis=-1)
        channels, conv = self.conv(channels, memory["conv"])
        inputs, b, c = jnp.split(
            jax.nn.silu(channels).astype(jnp.float32),
            [self.inner, self.inner + config.num_groups * config.state_dim],
            axis=-1,
        )
        inputs = inputs.reshape(batch, num_tokens, config.num_heads, config.head_dim)
        b, c = (s.reshape(batch, num_tokens, config.num_groups, config.state_dim) for s in (b, c))
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...][None, None, :])
        rate = -jnp.exp(self.log_rate[...])

        ssm: StateView = memory["ssm"]
        dt = jnp.where(ssm.valid(num_tokens)[:, :, None], dt, 0)  # padding leaves the state as it is
        state = ssm.read()["ssm"]
        if num_tokens == 1:
            outputs, state = ssd_step(inputs[:, 0], dt[:, 0], rate, b[:, 0], c[:, 0], state)
            outputs = outputs[:, None]
        else:
            outputs, state = ssd(inputs, dt, rate, b, c, state, chunk_len=config.chunk_len)

        outputs = outputs + inputs * self.skip[...][None, None, :, None]
        outputs = outputs.reshape(batch, num_tokens, self.inner).astype(gate.dtype)
        y = self.out(self.norm(outputs * jax.nn.silu(gate)))
        return y, {"ssm": ssm.write({"ssm": state}), "conv": conv}
