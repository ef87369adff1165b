"""Linear attention and delta rules: one recurrence with switches, from RetNet to Gated DeltaNet and KDA."""

from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvlab.ledger.states import ArraySpec, RecurrentState, State
from kvlab.memory.views import StateView
from kvlab.mixers.base import Knob, LayerMemory, Mixer, MixerConfig
from kvlab.mixers.convolution import ShortConv
from kvlab.mixers.layers import Linear, RMSNorm, log_rates, time_step_bias
from kvlab.schema import ConfigError, added, check_ends, choice, flag, integer, reals
from kvlab.typing import Channels, Hidden, Positions
from pallas_kernels.linear_scan import RULES, Rule, linear_scan, linear_scan_step

DECAYS = ("none", "constant", "slopes", "head", "channel")
FEATURE_MAPS = ("unit", "taylor")
GATES = ("none", "silu", "sigmoid", "low_rank")
UNIT_EPS = 1e-6
"""Added to a key's squared length before its root is divided by."""


@dataclass(frozen=True)
class LinearConfig(MixerConfig):
    """Hyper-parameters of one layer: a state of key_dim x value_dim numbers for each of num_value_heads heads.

    `rule` "delta" replaces what a key held, "plain" adds to it. `decay` "constant" is RetNet's, "slopes" is Lightning
    Attention's, constant too, "head" a learned one a head, "channel" one for each key channel, through a bottleneck of
    value_dim. With `negative_eigenvalues` a delta rule may overshoot: its beta is in (0, 2) (arXiv 2411.12537). `gate`
    is what the normed outputs are multiplied with: "silu" or "sigmoid" of a projection, "low_rank" the sigmoid of one
    through a bottleneck of value_dim. Without a `write_gate` beta is 1.

    `feature_map` is what becomes of queries and keys: "unit" gives them length 1, "taylor" makes [1, x, x (x) x / sqrt
    2] of them, and the sum of all weights becomes one more column of values, by which outputs are divided in the place
    of a norm.

    With `householders` a delta rule writes as often a token, with keys, values and betas of their own.

    `num_value_heads` is a multiple of num_heads, whose queries and keys serve several of them; 0: as many. `conv_len`
    is the width of the causal convolution over queries, keys and values; 0: none. It has a bias unless `conv_bias` is
    false. Initial time steps are log-uniform in `dt_range`, initial decay rates uniform in `rate_range`.
    """

    num_heads: int = integer(2, 1, 1024)
    num_value_heads: int = integer(0, 0, 1024)
    key_dim: int = integer(16, 1, 4096)
    value_dim: int = integer(32, 1, 4096)
    rule: str = choice("delta", RULES)
    decay: str = choice("head", DECAYS)
    gate: str = choice("silu", GATES)
    write_gate: bool = flag(True)
    negative_eigenvalues: bool = flag(False)
    conv_len: int = integer(4, 0, 64)
    chunk_len: int = integer(32, 1, 4096)
    dt_range: tuple[float, ...] = reals((1e-3, 1e-1), 0.0, 100.0, open_low=True, min_len=2)
    rate_range: tuple[float, ...] = reals((1e-2, 16.0), 0.0, 1000.0, open_low=True, min_len=2)
    feature_map: str = added(choice("unit", FEATURE_MAPS))
    householders: int = added(integer(1, 1, 16))
    conv_bias: bool = added(flag(True))

    def cross_check(self) -> None:
        super().cross_check()
        if self.conv_len == 1:
            raise ConfigError("conv_len", 1, "must be 0 (none) or a width in [2, 64]")
        if self.num_value_heads % self.num_heads:
            raise ConfigError("num_value_heads", self.num_value_heads, f"must be 0, or a multiple of {self.num_heads}")
        if self.negative_eigenvalues and not (self.rule == "delta" and self.write_gate):
            raise ConfigError("negative_eigenvalues", True, "must be false without rule = delta and a write_gate")
        if self.feature_map == "taylor" and (self.rule != "plain" or self.decay == "channel"):
            legal = "must be unit, unless rule = plain and decay is not by channel"
            raise ConfigError("feature_map", self.feature_map, legal)
        if self.householders > 1 and self.rule != "delta":
            raise ConfigError("householders", self.householders, "must be 1 without rule = delta")
        check_ends("dt_range", self.dt_range)
        check_ends("rate_range", self.rate_range)

    @property
    def heads(self) -> int:
        """Heads of values, each with a state."""
        return self.num_value_heads or self.num_heads

    @property
    def has_denominator(self) -> bool:
        """Whether outputs are divided by the sum of all weights."""
        return self.feature_map == "taylor"

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, numbers of a key behind its feature map, and values with the denominator's."""
        features = 1 + self.key_dim + self.key_dim**2 if self.feature_map == "taylor" else self.key_dim
        return self.heads, features, self.value_dim + self.has_denominator

    def knob(self, context_len: int) -> Knob:
        return Knob("key_dim", range(1, 4097))


class LinearAttention(Mixer):
    """A matrix S [key_dim, value_dim] for each head, written with keys and read with queries:

        S_t = e^{g_t} S_{t-1}
        S_t += beta_t k_t (v_t - S_t^T k_t)^T  (delta),   S_t += beta_t k_t v_t^T  (plain)
        y_t = W_o [ RMSNorm(S_t^T q_t) * gate(x_t) ]

    Gated DeltaNet (arXiv 2412.06464) by default, DeltaNet (2406.06484) without decay, KDA (2510.26692) with one a
    channel; with the plain rule linear attention (2006.16236), RetNet (2307.08621) and GLA (2312.06635) by their
    decays; Lightning Attention (2401.04658) keeps e^{-slope}, with ALiBi's slopes 2^{-8 h / H} of heads 1 to H
    (2108.12409). Queries and keys have length 1, queries are scaled by key_dim ** -0.5.

    DeltaProduct (2502.10297) takes several such steps a token, its `householders`, before it is read. The state decays
    before the first of them.

    Based (2402.18668) by its feature map phi, [1, x, x (x) x / sqrt 2]: with s = q^T k / sqrt(key_dim) a token's weight
    is phi(q)^T phi(k) = 1 + s + s^2 / 2, never under 1/2. Their sum needs no recurrence of its own, for it is what a
    column of ones among the values adds up to. Outputs are divided by it and not normed, since a norm would undo that.

    State a sequence, whatever its length: heads * key_dim * value_dim float32 numbers, and conv_len - 1 columns of the
    convolution; of Based heads * (1 + key_dim + key_dim^2) * (value_dim + 1). Parallel form in chunks; one token is the
    exact recurrence.
    """

    Config = LinearConfig
    parallel_op = "linear_scan"

    def __init__(self, config: LinearConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.key_channels, self.value_channels = config.num_heads * config.key_dim, config.heads * config.value_dim

        def projection(inner: int, outer: int) -> Linear:
            return Linear(inner, outer, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)

        channels = self.key_channels + config.householders * (self.key_channels + self.value_channels)
        self.split = projection(model_dim, channels)
        if config.conv_len:
            self.conv = ShortConv(channels, config.conv_len, use_bias=config.conv_bias, dtype=dtype, rngs=rngs)
        if config.write_gate:
            self.beta = projection(model_dim, config.householders * config.heads)
        if config.decay == "head":
            self.step = projection(model_dim, config.heads)
        elif config.decay == "channel":
            self.step_in = projection(model_dim, config.value_dim)
            self.step = projection(config.value_dim, config.heads * config.key_dim)
        if config.decay in ("head", "channel"):
            self._init_decay(rngs)
        if config.gate == "low_rank":
            self.gate_in = projection(model_dim, config.value_dim)
            self.gate = projection(config.value_dim, self.value_channels)
        elif config.gate != "none":
            self.gate = projection(model_dim, self.value_channels)
        if not config.has_denominator:
            self.norm = RMSNorm(config.value_dim, eps=config.norm_eps)
        self.out = projection(self.value_channels, model_dim)

    def _init_decay(self, rngs: nnx.Rngs) -> None:
        """Rates, one a head, and biases of the time steps; as published, time steps are small and rates differ."""
        config = self.config
        size = config.heads * (config.key_dim if config.decay == "channel" else 1)
        self.dt_bias = time_step_bias(rngs, size, config.dt_range)
        self.log_rate = log_rates(rngs, config.heads, config.rate_range)

    def states(self) -> dict[str, State]:
        config = self.config
        matrix = RecurrentState((ArraySpec("matrix", config.state_shape, "float32"),))
        found: dict[str, State] = {"matrix": matrix}
        return found | {"conv": self.conv.state()} if config.conv_len else found

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        config, written = self.config, {}
        channels = self.split(x)
        if config.conv_len:
            channels, written["conv"] = self.conv(channels, memory["conv"])
            channels = jax.nn.silu(channels)
        matrix: StateView = memory["matrix"]
        is_real = matrix.valid(x.shape[1])[:, :, None, None]  # padding leaves the state as it is: beta = 0, no decay
        beta, decay = jnp.where(is_real, self._beta(x), 0), self._log_decay(x)
        decay = None if decay is None else jnp.where(is_real, decay, 0)
        outputs, state = self._scan(*self._heads(channels), beta, decay, matrix.read()["matrix"])
        outputs = divided(outputs) if config.has_denominator else self.norm(outputs)
        outputs = outputs.reshape(*x.shape[:2], self.value_channels).astype(x.dtype)
        written["matrix"] = matrix.write({"matrix": state})
        return self.out(self._gated(outputs, x)), written

    def _scan(
        self, queries: Array, keys: Array, values: Array, beta: Array, decay: Array | None, state: Array
    ) -> tuple[Array, Array]:
        """Outputs [B, T, H, P] and the last state. A token is as many steps of the recurrence as it has householders;
        it decays with the first and is read with the last."""
        config, num_steps, rule = self.config, self.config.householders, cast(Rule, self.config.rule)
        if queries.shape[1] == 1:
            outputs, step = queries, None if decay is None else decay[:, 0]
            for i in range(num_steps):
                arrays = (queries[:, 0], keys[:, 0, i], values[:, 0, i], beta[:, 0, i], step, state)
                outputs, state = linear_scan_step(*arrays, rule=rule)
                step = None
            return outputs[:, None], state

        def steps(part: Array) -> Array:  # [B, T, n, ...] -> [B, T * n, ...]
            return part.reshape(len(part), -1, *part.shape[3:])

        def at_step(part: Array, index: int) -> Array:  # zeros in a token's other steps
            around = index, num_steps - 1 - index
            return steps(jnp.pad(part[:, :, None], ((0, 0), (0, 0), around, (0, 0), (0, 0))))

        decay = None if decay is None else at_step(decay, 0)
        arrays = (at_step(queries, num_steps - 1), steps(keys), steps(values), steps(beta), decay, state)
        outputs, state = linear_scan(*arrays, rule=rule, chunk_len=config.chunk_len)
        return outputs[:, num_steps - 1 :: num_steps], state

    def _heads(self, channels: Channels) -> tuple[Array, Array, Array]:
        """Queries [B, T, H, N] and keys [B, T, n, H, N] behind their feature map, and values [B, T, n, H, P] of n
        householders, in float32."""
        config, leading = self.config, channels.shape[:2]
        channels, num_steps = channels.astype(jnp.float32), config.householders
        ends = [self.key_channels, (1 + num_steps) * self.key_channels]
        queries, keys, values = jnp.split(channels, ends, axis=-1)
        queries = queries.reshape(*leading, config.num_heads, config.key_dim)
        keys = keys.reshape(*leading, num_steps, config.num_heads, config.key_dim)
        values = values.reshape(*leading, num_steps, config.heads, config.value_dim)
        if config.feature_map == "unit":
            queries, keys = unit(queries), unit(keys)
        queries = queries * config.key_dim**-0.5
        if config.feature_map == "taylor":
            queries, keys = taylor(queries), taylor(keys)
            values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
        repeats = config.heads // config.num_heads
        queries, keys = (jnp.repeat(part, repeats, axis=-2) for part in (queries, keys))
        return queries, keys, values

    def _beta(self, x: Hidden) -> Array:
        """How much of each of a token's steps is written, [B, T, n, H]."""
        shape = (*x.shape[:2], self.config.householders, self.config.heads)
        if not self.config.write_gate:
            return jnp.ones(shape, jnp.float32)
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32)).reshape(shape)
        return 2 * beta if self.config.negative_eigenvalues else beta

    def _log_decay(self, x: Hidden) -> Array | None:
        """g [B, T, H, 1 or N], never positive; None: nothing decays."""
        config = self.config
        if config.decay == "none":
            return None
        if config.decay in ("constant", "slopes"):
            numbers = jnp.arange(config.heads, dtype=jnp.float32)
            slopes = -jnp.exp2(-8 * (numbers + 1) / config.heads)
            # 1 - 2^-5, 1 - 2^-6, ...
            rates = jnp.log1p(-jnp.exp2(-5.0 - numbers)) if config.decay == "constant" else slopes
            return jnp.broadcast_to(rates[None, None, :, None], (*x.shape[:2], config.heads, 1))
        step = self.step(self.step_in(x) if config.decay == "channel" else x).astype(jnp.float32)
        step = step.reshape(*x.shape[:2], config.heads, -1)
        bias = self.dt_bias[...].reshape(1, 1, config.heads, -1)
        return -jnp.exp(self.log_rate[...])[None, None, :, None] * jax.nn.softplus(step + bias)

    def _gated(self, outputs: Channels, x: Hidden) -> Channels:
        """Normed outputs [B, T, H * P] times their gate."""
        if self.config.gate == "none":
            return outputs
        opened = self.gate(self.gate_in(x) if self.config.gate == "low_rank" else x)
        return outputs * (jax.nn.silu(opened) if self.config.gate == "silu" else jax.nn.sigmoid(opened))


def unit(x: Array) -> Array:
    """x with length 1 along the last axis; zero stays zero."""
    return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + UNIT_EPS)


def taylor(x: Array) -> Array:
    """[1, x, x (x) x / sqrt 2] along the last axis: products of two such are 1 + s + s^2 / 2, s = x^T y."""
    squares = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1) * 2**-0.5
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, squares], axis=-1)


def divided(outputs: Array) -> Array:
    """All columns but the last, divided by it; padding in front of which nothing was written stays zero."""
    weighted, total = outputs[..., :-1], outputs[..., -1:]
    return weighted / jnp.where(total == 0, 1, total)
