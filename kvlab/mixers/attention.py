"""Softmax attention: MHA, MQA (arXiv 1911.02150) and GQA (arXiv 2305.13245) by `num_kv_heads`, full or windowed."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvlab.ledger.readers import Readers, Rotary
from kvlab.ledger.states import State, TokenState
from kvlab.memory.views import TokenView
from kvlab.mixers.base import Knob, LayerMemory, Mixer, MixerConfig
from kvlab.mixers.layers import Linear, RMSNorm
from kvlab.rotary import rotary_angles, rotate
from kvlab.schema import ConfigError, added, flag, integer, real, reals
from kvlab.typing import Hidden, Positions
from pallas_kernels.visible import Visible


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Hyper-parameters of one attention layer. `window` counts visible tokens including the current one.

    `rope_scaling` stretches the rotary embedding to longer contexts: [factor] divides every frequency (arXiv
    2306.15595); [factor, low, high, original_len] divides only those that turn fewer than `low` times in original_len
    tokens, and blends up to `high` turns (arXiv 2407.21783). With an `output_gate` each number of a head's output is
    multiplied with the sigmoid of one of a projection of the layer's input (arXiv 2505.06708).
    """

    num_heads: int = integer(4, 1, 1024)
    num_kv_heads: int = integer(4, 1, 1024)
    head_dim: int = integer(16, 1, 1024)
    rope: bool = flag(True)
    rope_base: float = real(10_000.0, 1.0, 1e9)
    rope_fraction: float = real(1.0, 0.0, 1.0, open_low=True)
    rope_scaling: tuple[float, ...] = reals((), 0.0, 1e9, open_low=True)
    window: int | None = integer(None, 1, optional=True)
    num_sinks: int = integer(0, 0, 4096)
    soft_cap: float | None = real(None, 0.0, 1e6, open_low=True, optional=True)
    qk_norm: bool = flag(False)
    bias: bool = flag(False)
    output_gate: bool = added(flag(False))
    local_start: float = added(real(0.0, 0.0, 100.0))

    def cross_check(self) -> None:
        super().cross_check()
        if self.num_heads % self.num_kv_heads:
            legal = [k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]
            raise ConfigError("num_kv_heads", self.num_kv_heads, f"must divide num_heads: one of {legal}")
        if self.num_sinks and self.window is None:
            raise ConfigError("num_sinks", self.num_sinks, "must be 0 without a window")
        if len(self.rope_scaling) not in (0, 1, 4) or (
            len(self.rope_scaling) == 4 and not self.rope_scaling[1] < self.rope_scaling[2]
        ):
            legal_scaling = "must be [], [factor] or [factor, low, high, original_len] with low < high"
            raise ConfigError("rope_scaling", list(self.rope_scaling), legal_scaling)
        if self.rope and self.rotary_dim < 2:
            legal_low = f"must rotate at least 2 of head_dim = {self.head_dim}: at least {2 / self.head_dim:g}"
            raise ConfigError("rope_fraction", self.rope_fraction, legal_low)

    def knob(self, context_len: int) -> Knob | None:
        """The window, where there is one; of grouped queries the KV heads; full heads have none."""
        if self.window is not None:
            return Knob("window", range(1, context_len + 2))
        if self.num_kv_heads < self.num_heads:
            return Knob("num_kv_heads", [k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0])
        return None

    @property
    def rotary_dim(self) -> int:
        """Leading head dimensions that are rotated, an even number."""
        return int(self.head_dim * self.rope_fraction) // 2 * 2


class Attention(Mixer):
    """y = W_o softmax(q k^T / sqrt(D)) v over full or windowed causal context, heads sharing KV heads in groups.

    State: num_kv_heads * 2 * head_dim * itemsize bytes a live token; live(n) is [0, n), or the window and its sinks.
    Rotary embeddings (arXiv 2104.09864) turn keys before they are stored; sinks after arXiv 2309.17453.
    """

    Config = AttentionConfig
    parallel_op = "flash_attention"

    def __init__(self, config: AttentionConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, use_bias=bias, dtype=jnp.dtype(dtype), rngs=rngs)

        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.query = linear(model_dim, heads * dim, config.bias)
        self.key = linear(model_dim, kv_heads * dim, config.bias)
        self.value = linear(model_dim, kv_heads * dim, config.bias)
        self.out = linear(heads * dim, model_dim, config.bias)
        if config.output_gate:
            self.gate = linear(model_dim, heads * dim, config.bias)
        if config.qk_norm:
            self.query_norm = RMSNorm(dim, eps=config.norm_eps)
            self.key_norm = RMSNorm(dim, eps=config.norm_eps)
        if config.local_start:
            half = config.rotary_dim // 2
            start = jnp.zeros(dim).at[:half].set(config.local_start)
            self.query_start = nnx.Param(start)
            self.key_start = nnx.Param(start)
        self.config, self.dtype = config, dtype

    def states(self) -> dict[str, State]:
        config = self.config
        visible = Visible(config.window, config.num_sinks)
        heads, dim = config.num_kv_heads, config.head_dim
        rotary = Rotary(config.rotary_dim, config.rope_base, config.rope_scaling) if config.rope else None
        readers = Readers(config.num_heads, soft_cap=config.soft_cap, rotary=rotary)
        return {"kv": TokenState(heads, dim, dim, self.dtype, visible=visible, readers=readers)}

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        config = self.config

        def heads(projected: Array) -> Array:
            return projected.reshape(*projected.shape[:2], -1, config.head_dim)

        queries, keys, values = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        if config.local_start:
            queries = queries + self.query_start[...].astype(queries.dtype)[None, None, None, :]
            keys = keys + self.key_start[...].astype(keys.dtype)[None, None, None, :]
        if config.qk_norm:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if config.rope:
            cos, sin = rotary_angles(positions, config.rotary_dim, config.rope_base, config.rope_scaling)
            queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        kv: TokenView = memory["kv"]
        kv = kv.append(keys=keys, values=values)
        outputs, kv = kv.attend(queries, positions, soft_cap=config.soft_cap)
        outputs = outputs.reshape(*x.shape[:2], -1)
        if config.output_gate:
            outputs = outputs * jax.nn.sigmoid(self.gate(x))
        return self.out(outputs), {"kv": kv}
