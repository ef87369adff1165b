"""Mamba-3: a state-space layer that looks at two tokens at once and turns as it decays (arXiv 2603.15569)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvlab.ledger.states import ArraySpec, RecurrentState, State
from kvlab.memory.views import StateView
from kvlab.mixers.base import Knob, LayerMemory, Mixer, MixerConfig
from kvlab.mixers.layers import Linear, RMSNorm, time_step_bias
from kvlab.rotary import rotate
from kvlab.schema import ConfigError, check_ends, integer, real, reals
from kvlab.typing import Channels, Hidden, Positions
from pallas_kernels.linear_scan import linear_scan, linear_scan_step

LEAST_RATE = 1e-4
"""The slowest decay, a unit of time."""


@dataclass(frozen=True)
class Mamba3Config(MixerConfig):
    """Hyper-parameters of one Mamba-3 layer: num_heads * head_dim inner channels, state_dim numbers for each.

    `num_groups` of b and c serve the heads. The leading `rope_fraction` of b and c is turned, by an angle for each pair
    of numbers. Initial time steps are log-uniform in `dt_range`.
    """

    state_dim: int = integer(16, 2, 4096)
    num_heads: int = integer(2, 1, 1024)
    head_dim: int = integer(64, 1, 1024)
    num_groups: int = integer(1, 1, 1024)
    rope_fraction: float = real(0.5, 0.0, 1.0, open_low=True)
    chunk_len: int = integer(64, 1, 4096)
    dt_range: tuple[float, ...] = reals((1e-3, 1e-1), 0.0, 100.0, open_low=True, min_len=2)

    def cross_check(self) -> None:
        super().cross_check()
        if self.num_heads % self.num_groups:
            legal = [g for g in range(1, self.num_heads + 1) if self.num_heads % g == 0]
            raise ConfigError("num_groups", self.num_groups, f"must divide num_heads: one of {legal}")
        if not self.num_angles:
            least = 2 / self.state_dim
            raise ConfigError("rope_fraction", self.rope_fraction, f"must be at least {least:g}: a pair is turned")
        check_ends("dt_range", self.dt_range)

    @property
    def num_angles(self) -> int:
        """Pairs of each head's b and c that are turned."""
        return int(self.state_dim * self.rope_fraction) // 2

    def knob(self, context_len: int) -> Knob:
        return Knob("state_dim", range(math.ceil(2 / self.rope_fraction), 4097))


class Drive(NamedTuple):
    """What goes into the recurrence, in float32. `now` is how much of a token enters the state with itself, `before`
    how much more of it with the token behind it; both and the decay are zero for padding."""

    queries: Array  # [B, T, H, N]
    keys: Array  # [B, T, H, N]
    inputs: Array  # [B, T, H, P]
    log_decay: Array  # [B, T, H]
    now: Array  # [B, T, H]
    before: Array  # [B, T, H]: of token t - 1, at token t


class Mamba3(Mixer):
    """The trapezoid's rule: a token enters with its own step, and again with the next one.

        a_t = -max(softplus(.), 1e-4),   dt_t = softplus(.),   lambda_t = sigmoid(.)
        angle_t = angle_{t-1} + pi dt_t tanh(.)   turns pairs of b_t and c_t, behind a norm and a bias each
        S_t = e^{a_t dt_t} [ S_{t-1} + (1 - lambda_t) dt_t b_{t-1} x_{t-1}^T ] + lambda_t dt_t b_t x_t^T
        y_t = W_o [ (S_t^T c_t + d x_t) silu(z_t) ]

    There is no convolution: the sum over two tokens takes its place. State a sequence, whatever its length:
    num_heads * (state_dim * head_dim + state_dim + head_dim + num_angles) float32 numbers, which are S, the last
    token's turned b and its x, and angles, in turns modulo 1. Parallel form in chunks; one token is the exact
    recurrence.
    """

    Config = Mamba3Config
    parallel_op = "linear_scan"

    def __init__(self, config: Mamba3Config, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        heads = config.num_heads
        self.inner, self.group_channels = heads * config.head_dim, config.num_groups * config.state_dim
        sizes = (self.inner, self.inner, self.group_channels, self.group_channels, heads, heads, heads)
        self.ends = tuple(sum(sizes[: i + 1]) for i in range(len(sizes)))
        width = self.ends[-1] + config.num_angles
        self.split = Linear(model_dim, width, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)
        self.dt_bias = time_step_bias(rngs, heads, config.dt_range)
        self.b_norm = RMSNorm(config.state_dim, eps=config.norm_eps)
        self.c_norm = RMSNorm(config.state_dim, eps=config.norm_eps)
        self.b_bias = nnx.Param(jnp.ones(heads * config.state_dim))  # vectors, so that no weight decay applies
        self.c_bias = nnx.Param(jnp.ones(heads * config.state_dim))
        self.skip = nnx.Param(jnp.ones(heads))
        self.out = Linear(self.inner, model_dim, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)
        self.config, self.dtype = config, dtype

    def states(self) -> dict[str, State]:
        config = self.config
        shapes = {
            "matrix": (config.num_heads, config.state_dim, config.head_dim),
            "key": (config.num_heads, config.state_dim),
            "input": (config.num_heads, config.head_dim),
            "turns": (config.num_heads, config.num_angles),
        }
        return {"ssm": RecurrentState(tuple(ArraySpec(name, shape, "float32") for name, shape in shapes.items()))}

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        config, (batch, num_tokens, _) = self.config, x.shape
        ssm: StateView = memory["ssm"]
        held = ssm.read()
        gate, drive, turns = self._drive(x, held["turns"], ssm.valid(num_tokens))
        outputs, matrix = trapezoid(drive, held["key"], held["input"], held["matrix"], chunk_len=config.chunk_len)
        after = {"matrix": matrix, "turns": turns[:, -1]}
        for name, tokens in (("key", drive.keys), ("input", drive.inputs)):  # of the last token that is real
            extended = jnp.concatenate([held[name][:, None], tokens], axis=1)
            after[name] = jnp.take_along_axis(extended, ssm.counts[:, None, None, None], axis=1)[:, 0]
        outputs = outputs + drive.inputs * self.skip[...][None, None, :, None]
        outputs = outputs.reshape(batch, num_tokens, self.inner).astype(x.dtype)
        return self.out(outputs * jax.nn.silu(gate)), {"ssm": ssm.write(after)}

    def _drive(self, x: Hidden, turns: Array, is_real: Array) -> tuple[Channels, Drive, Array]:
        """The gate [B, T, H * P], what drives the recurrence, and every token's angles [B, T, H, R] in turns."""
        config, leading = self.config, x.shape[:2]
        gate, inputs, b, c, step, rate, share, angle = jnp.split(self.split(x), self.ends, axis=-1)
        inputs, b, c, step, rate, share, angle = (
            part.astype(jnp.float32) for part in (inputs, b, c, step, rate, share, angle)
        )
        dt = jax.nn.softplus(step + self.dt_bias[...][None, None, :])
        dt = jnp.where(is_real[:, :, None], dt, 0)  # padding leaves the state as it is
        share = jax.nn.sigmoid(share)
        log_decay = -jnp.maximum(jax.nn.softplus(rate), LEAST_RATE) * dt
        turns = turned(turns, dt[..., None] * jnp.tanh(angle)[:, :, None, :] / 2)
        cos, sin = jnp.cos(2 * math.pi * turns), jnp.sin(2 * math.pi * turns)

        def turned_heads(part: Array, norm: RMSNorm, bias: nnx.Param) -> Array:  # [B, T, H, N]
            part = norm(part.reshape(*leading, config.num_groups, config.state_dim))
            part = jnp.repeat(part, config.num_heads // config.num_groups, axis=2)
            return rotate(part + bias[...].reshape(1, 1, config.num_heads, config.state_dim), cos, sin)

        keys, queries = turned_heads(b, self.b_norm, self.b_bias), turned_heads(c, self.c_norm, self.c_bias)
        inputs = inputs.reshape(*leading, config.num_heads, config.head_dim)
        return gate, Drive(queries, keys, inputs, log_decay, share * dt, (1 - share) * dt), turns


def turned(before: Array, steps: Array) -> Array:
    """Running sums [B, T, H, R] of steps in turns, behind `before` [B, H, R], modulo 1 after each addition: the
    precision of an angle does not depend on how often it went round."""

    def then(first: Array, second: Array) -> Array:
        total = first + second
        return total - jnp.floor(total)

    steps = steps.at[:, 0].set(then(before, steps[:, 0]))
    return jax.lax.associative_scan(then, steps, axis=1)


def trapezoid(drive: Drive, key: Array, inputs: Array, state: Array, *, chunk_len: int) -> tuple[Array, Array]:
    """Outputs [B, T, H, P] and the last state [B, H, N, P], behind a state and the key [B, H, N] and inputs [B, H, P]
    of the token before.

    All of token t - 1 that is in S_t is in the state before token t is written,

        V_t = e^{g_t} [ V_{t-1} + (now_{t-1} + before_t) k_{t-1} x_{t-1}^T ],    S_t = V_t + now_t k_t x_t^T

    which is one plain recurrence over inputs that are shifted by a token. Nothing is subtracted, and no output depends
    on what follows."""
    if drive.keys.shape[1] == 1:
        queries, own, own_inputs, log_decay, now, before = (part[:, 0] for part in drive)
        weight = jnp.exp(log_decay) * before
        _, state = linear_scan_step(queries, key, inputs, weight, log_decay[..., None], state, rule="plain")
        outputs, state = linear_scan_step(queries, own, own_inputs, now, None, state, rule="plain")
        return outputs[:, None], state
    keys_before = jnp.concatenate([key[:, None], drive.keys[:, :-1]], axis=1)
    inputs_before = jnp.concatenate([inputs[:, None], drive.inputs[:, :-1]], axis=1)
    now_before = jnp.pad(drive.now[:, :-1], ((0, 0), (1, 0), (0, 0)))  # the state holds the token before already
    weight = jnp.exp(drive.log_decay) * (now_before + drive.before)
    arrays = (drive.queries, keys_before, inputs_before, weight, drive.log_decay[..., None], state)
    outputs, state = linear_scan(*arrays, rule="plain", chunk_len=chunk_len)
    own = drive.now * (drive.queries * drive.keys).sum(axis=-1)
    outputs = outputs + own[..., None] * drive.inputs
    last = drive.now[:, -1, :, None] * drive.keys[:, -1]
    return outputs, state + last[..., None] * drive.inputs[:, -1, :, None, :]
