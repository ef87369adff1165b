"""RG-LRU, the recurrent layer of Griffin: one gated decay a channel, and no matrix (arXiv 2402.19427)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvlab.ledger.states import ArraySpec, RecurrentState, State
from kvlab.memory.views import StateView
from kvlab.mixers.base import Knob, LayerMemory, Mixer, MixerConfig
from kvlab.mixers.convolution import ShortConv
from kvlab.mixers.layers import Linear
from kvlab.schema import ConfigError, check_ends, integer, reals
from kvlab.typing import Channels, Hidden, Positions

SHARPNESS = 8.0
"""c in a = exp(-c r softplus(Lambda))."""
MOST_SLOPE = 1000.0
"""Where the gradient of the square root is cut off: as 1 - a^2 goes to zero it has no bound."""


@dataclass(frozen=True)
class RGLRUConfig(MixerConfig):
    """Hyper-parameters of one layer: `width` channels, each a number of state.

    Both gates are block-diagonal maps of `num_heads` blocks. `conv_len` is the width of the causal convolution in front
    of the recurrence; 0: none. exp(-softplus(Lambda)), to the power of 8 r a channel's decay, begins uniform by area in
    the ring `radius_range`.
    """

    width: int = integer(64, 1, 65536)
    num_heads: int = integer(2, 1, 1024)
    conv_len: int = integer(4, 0, 64)
    radius_range: tuple[float, ...] = reals((0.9, 0.999), 0.0, 1.0, open_low=True, min_len=2)

    def cross_check(self) -> None:
        super().cross_check()
        if self.conv_len == 1:
            raise ConfigError("conv_len", 1, "must be 0 (none) or a width in [2, 64]")
        if self.width % self.num_heads:
            raise ConfigError("num_heads", self.num_heads, f"must divide width = {self.width}")
        check_ends("radius_range", self.radius_range, below=1.0)

    def knob(self, context_len: int) -> Knob:
        return Knob("width", range(self.num_heads, 65537, self.num_heads))


class RGLRU(Mixer):
    """Every channel decays by itself, and the input fills up what the decay left free:

        r_t = sigmoid(W_r x_t + b_r),   i_t = sigmoid(W_i x_t + b_i)            block-diagonal
        a_t = exp(-8 r_t softplus(Lambda))
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)
        y_t = W_o [ gelu(gate(u_t)) * h_t ],   x = convolution(W_x u)

    The token at position 0 enters whole, without the root, as in RecurrentGemma.

    State a sequence, whatever its length: width float32 numbers, and conv_len - 1 columns of the convolution. Parallel
    form by an associative scan in float32; one token is the exact recurrence.
    """

    Config = RGLRUConfig

    def __init__(self, config: RGLRUConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.inputs = Linear(model_dim, config.width, dtype=jnp.dtype(dtype), rngs=rngs)
        self.gate = Linear(model_dim, config.width, dtype=jnp.dtype(dtype), rngs=rngs)
        if config.conv_len:
            self.conv = ShortConv(config.width, config.conv_len, dtype=dtype, rngs=rngs)
        self.decay_gate = BlockDiagonal(config.width, config.num_heads, rngs=rngs)
        self.input_gate = BlockDiagonal(config.width, config.num_heads, rngs=rngs)
        low, high = config.radius_range
        area = jax.random.uniform(rngs.params(), (config.width,), minval=low**2, maxval=high**2)
        self.lambda_ = nnx.Param(jnp.log(jnp.expm1(-0.5 * jnp.log(area))))  # the inverse softplus of -log radius
        self.out = Linear(config.width, model_dim, dtype=jnp.dtype(dtype), rngs=rngs)

    def states(self) -> dict[str, State]:
        found: dict[str, State] = {"lru": RecurrentState((ArraySpec("lru", (self.config.width,), "float32"),))}
        return found | {"conv": self.conv.state()} if self.config.conv_len else found

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        channels, written = self.inputs(x), {}
        if self.config.conv_len:
            channels, written["conv"] = self.conv(channels, memory["conv"])
        lru: StateView = memory["lru"]
        decay, added = self._gated(channels.astype(jnp.float32), positions)
        is_real = lru.valid(x.shape[1])[:, :, None]  # padding leaves the state as it is
        decay, added = jnp.where(is_real, decay, 1), jnp.where(is_real, added, 0)
        hidden = linear_recurrence(decay, added, lru.read()["lru"])
        written["lru"] = lru.write({"lru": hidden[:, -1]})
        return self.out(jax.nn.gelu(self.gate(x)) * hidden.astype(x.dtype)), written

    def _gated(self, channels: Channels, positions: Positions) -> tuple[Array, Array]:
        """What every channel keeps of its state, and what is added to it, both [B, T, C] in float32."""
        rate = SHARPNESS * jax.nn.softplus(self.lambda_[...])[None, None, :]
        log_decay = -rate * jax.nn.sigmoid(self.decay_gate(channels))
        share = bounded_sqrt(-jnp.expm1(2 * log_decay))  # of 1 - a^2, without its cancellation near a = 1
        share = jnp.where((positions == 0)[:, :, None], 1, share)
        return jnp.exp(log_decay), share * jax.nn.sigmoid(self.input_gate(channels)) * channels


class BlockDiagonal(nnx.Module):
    """y = W x + b in float32, with W of `num_blocks` equal blocks on the diagonal."""

    def __init__(self, width: int, num_blocks: int, *, rngs: nnx.Rngs):
        size = width // num_blocks
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (num_blocks, size, size)) * size**-0.5)
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Channels) -> Channels:
        kernel = self.kernel[...].astype(x.dtype)
        blocks = jnp.einsum("bthi,hij->bthj", x.reshape(*x.shape[:2], kernel.shape[0], kernel.shape[1]), kernel)
        return blocks.reshape(x.shape) + self.bias[...][None, None, :]


def linear_recurrence(decay: Channels, added: Channels, state: Array) -> Channels:
    """h_t = decay_t h_{t-1} + added_t for all t [B, T, C], h_{-1} = state [B, C], in parallel over tokens."""
    added = added.at[:, 0].add(decay[:, 0] * state)

    def then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return second[0] * first[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(then, (decay, added), axis=1)[1]


@jax.custom_vjp
def bounded_sqrt(x: Array) -> Array:
    """The square root, with a gradient of at most MOST_SLOPE."""
    return jnp.sqrt(x)


def _bounded_sqrt_forward(x: Array) -> tuple[Array, Array]:
    root = jnp.sqrt(x)
    return root, root


def _bounded_sqrt_backward(root: Array, gradient: Array) -> tuple[Array]:
    return (gradient / jnp.maximum(2 * root, 1 / MOST_SLOPE),)


bounded_sqrt.defvjp(_bounded_sqrt_forward, _bounded_sqrt_backward)
