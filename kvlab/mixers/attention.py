"""Softmax attention: MHA, MQA (arXiv 1911.02150) and GQA (arXiv 2305.13245) by `num_kv_heads`, full or windowed."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from kvlab.ledger.readers import Readers, Rotary
from kvlab.ledger.states import State, TokenState
from kvlab.memory.views import TokenView
from kvlab.mixers.base import Knob, LayerMemory, Mixer, MixerConfig
from kvlab.mixers.layers import Linear, RMSNorm, rms_normed
from kvlab.rotary import check_scaling, rotary_angles, rotate
from kvlab.schema import ConfigError, added, choice, flag, integer, real, reals
from kvlab.typing import HeadOutputs, Hidden, Keys, Positions, Queries, SinkLogits, Values
from pallas_kernels.visible import Visible

QK_NORMS_OVER = ("head", "all")


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Hyper-parameters of one attention layer. `window` counts visible tokens including the current one.

    `rope_scaling` stretches the rotary embedding to longer contexts: [factor] divides every frequency (arXiv
    2306.15595); [factor, low, high, original_len] divides only those that turn fewer than `low` times in original_len
    tokens, and blends up to `high` turns (arXiv 2407.21783); [factor, low, high, original_len, length] is YaRN (arXiv
    2309.00071), which blends by the number of the pair, and makes what it turns `length` times as long. It rounds the
    pairs at which blending begins and ends outwards, but with a 1 behind `length`, as in gpt-oss.

    With an `output_gate` each number of a head's output is multiplied with the sigmoid of one of a projection of the
    layer's input (arXiv 2505.06708). With `sink_logits` the softmax of each head has a learned logit that belongs to no
    token (gpt-oss, arXiv 2508.10925): what a head need not attend to costs no token, and no byte of the cache. A layer
    that `shares_kv` has neither keys nor values of its own: its queries read those of the nearest layer before it that
    fits (`kvlab.models.sharing`), and it holds no byte.

    With a `local_start` above 0 a learned vector is added to every query and another to every key, before norm and
    rotation. Both start as that number in the first of each rotated pair: logits then start highest at the token itself
    and fall with the distance (`docs/findings/training.md`), where heads would else begin with the mean of all tokens.

    Scores are products of queries and keys times `scale` (null: head_dim ** -0.5). With `qk_norm` queries and keys are
    normed before they are turned: each head by itself, or `qk_norm_over` "all" of them as one vector, as OLMo 2 does
    (arXiv 2501.00656). Every projection has a bias with `bias`, that of the output alone with `out_bias`, those of
    queries, keys and values alone with `qkv_bias`. With `value_norm` the values of each head are normed, without a
    learned scale, before they are stored (Gemma 3n).
    """

    num_heads: int = integer(4, 1, 1024)
    num_kv_heads: int = integer(4, 1, 1024)
    head_dim: int = integer(16, 1, 1024)
    rope: bool = flag(True)
    rope_base: float = real(10_000.0, 1.0, 1e15)
    rope_fraction: float = real(1.0, 0.0, 1.0, open_low=True)
    rope_scaling: tuple[float, ...] = reals((), 0.0, 1e9, open_low=True)
    window: int | None = integer(None, 1, optional=True)
    num_sinks: int = integer(0, 0, 4096)
    soft_cap: float | None = real(None, 0.0, 1e6, open_low=True, optional=True)
    qk_norm: bool = flag(False)
    bias: bool = flag(False)
    output_gate: bool = added(flag(False))
    sink_logits: bool = added(flag(False))
    shares_kv: bool = added(flag(False))
    local_start: float = added(real(0.0, 0.0, 100.0))
    scale: float | None = added(real(None, 0.0, 1e3, open_low=True, optional=True))
    qk_norm_over: str = added(choice("head", QK_NORMS_OVER))
    out_bias: bool = added(flag(False))
    qkv_bias: bool = added(flag(False))
    value_norm: bool = added(flag(False))

    def cross_check(self) -> None:
        super().cross_check()
        if self.num_heads % self.num_kv_heads:
            legal = [k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]
            raise ConfigError("num_kv_heads", self.num_kv_heads, f"must divide num_heads: one of {legal}")
        if self.num_sinks and self.window is None:
            raise ConfigError("num_sinks", self.num_sinks, "must be 0 without a window")
        if self.qk_norm_over != "head" and not self.qk_norm:
            raise ConfigError("qk_norm_over", self.qk_norm_over, "must be head without qk_norm")
        if self.out_bias and self.bias:
            raise ConfigError("out_bias", True, "must be false with bias, which is of the output too")
        if self.qkv_bias and (self.bias or self.out_bias):
            raise ConfigError("qkv_bias", True, "must be false with bias or out_bias: bias is of all projections")
        if self.value_norm and self.shares_kv:
            raise ConfigError("value_norm", True, "must be false with shares_kv: the layer has no values of its own")
        check_scaling(self.rope_scaling, self.rope_base)
        if self.rope and self.rotary_dim < 2:
            legal_low = f"must rotate at least 2 of head_dim = {self.head_dim}: at least {2 / self.head_dim:g}"
            raise ConfigError("rope_fraction", self.rope_fraction, legal_low)
        if self.local_start and not self.rope:
            raise ConfigError(
                "local_start", self.local_start, "must be 0 without rope: nothing else tells near from far"
            )

    def knob(self, context_len: int) -> Knob | None:
        """The window, where there is one; of grouped queries the KV heads; full heads have none, nor has a layer that
        shares."""
        if self.shares_kv:
            return None
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

    State: num_kv_heads * 2 * head_dim * itemsize bytes a live token; live(n) is [0, n), or the window and its sinks. A
    layer that shares keys and values states none, and finds those that it reads as its "kv" all the same.
    Rotary embeddings (arXiv 2104.09864) turn keys before they are stored; sinks after arXiv 2309.17453.
    """

    Config = AttentionConfig
    parallel_op = "flash_attention"

    def __init__(self, config: AttentionConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, use_bias=bias, dtype=jnp.dtype(dtype), rngs=rngs)

        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv_bias = config.bias or config.qkv_bias
        self.query = linear(model_dim, heads * dim, qkv_bias)
        if not config.shares_kv:
            self.key = linear(model_dim, kv_heads * dim, qkv_bias)
            self.value = linear(model_dim, kv_heads * dim, qkv_bias)
        self.out = linear(heads * dim, model_dim, config.bias or config.out_bias)
        if config.output_gate:
            self.gate = linear(model_dim, heads * dim, config.bias)
        if config.qk_norm:
            normed, normed_kv = (1, 1) if config.qk_norm_over == "head" else (heads, kv_heads)
            self.query_norm = RMSNorm(normed * dim, eps=config.norm_eps)
            if not config.shares_kv:
                self.key_norm = RMSNorm(normed_kv * dim, eps=config.norm_eps)
        if config.local_start:
            start = jnp.zeros(dim).at[: config.rotary_dim // 2].set(config.local_start)
            self.query_start = nnx.Param(start)
            if not config.shares_kv:
                self.key_start = nnx.Param(start)
        if config.sink_logits:
            self.sink_logits = nnx.Param(jnp.zeros(heads, jnp.float32))
        self.config, self.dtype = config, dtype

    def states(self) -> dict[str, State]:
        config = self.config
        if config.shares_kv:
            return {}
        visible = Visible(config.window, config.num_sinks)
        heads, dim = config.num_kv_heads, config.head_dim
        return {"kv": TokenState(heads, dim, dim, self.dtype, visible=visible, readers=self.readers)}

    @property
    def readers(self) -> Readers:
        """How the layer's queries read what is stored."""
        config = self.config
        rotary = Rotary(config.rotary_dim, config.rope_base, config.rope_scaling) if config.rope else None
        return Readers(config.num_heads, scale=config.scale, soft_cap=config.soft_cap, rotary=rotary)

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        kv: TokenView = memory["kv"]
        if not self.config.shares_kv:
            keys, values = self.stored(x, positions)
            kv = kv.append(keys=keys, values=values)
        outputs, kv = kv.attend(self.asked(x, positions), positions, sink_logits=self.logits_of_sinks)
        return self.mixed(outputs, x), {"kv": kv}

    def asked(self, x: Hidden, positions: Positions) -> Queries:
        """Queries of the step's tokens, normed and rotated."""
        queries = self._split(self.query(x))
        if self.config.local_start:
            queries = queries + self.query_start[...].astype(queries.dtype)[None, None, None, :]
        return self._rotated(self._normed(queries, "query_norm"), positions)

    def stored(self, x: Hidden, positions: Positions) -> tuple[Keys, Values]:
        """Keys of the step's tokens, normed and rotated, and their values."""
        keys = self._split(self.key(x))
        if self.config.local_start:
            keys = keys + self.key_start[...].astype(keys.dtype)[None, None, None, :]
        keys, values = self._rotated(self._normed(keys, "key_norm"), positions), self._split(self.value(x))
        return keys, rms_normed(values, self.config.norm_eps) if self.config.value_norm else values

    @property
    def logits_of_sinks(self) -> SinkLogits | None:
        """The heads' sink logits, where they have any."""
        return self.sink_logits[...] if self.config.sink_logits else None

    def mixed(self, outputs: HeadOutputs, x: Hidden) -> Hidden:
        """What the layer gives for the outputs of its heads, gated where it has a gate."""
        outputs = outputs.reshape(*x.shape[:2], -1)
        if self.config.output_gate:
            outputs = outputs * jax.nn.sigmoid(self.gate(x))
        return self.out(outputs)

    def _split(self, projected: Float[Array, "B T E"]) -> Queries:
        return projected.reshape(*projected.shape[:2], -1, self.config.head_dim)

    def _normed(self, heads: Queries, name: str) -> Queries:
        config = self.config
        if not config.qk_norm:
            return heads
        norm: RMSNorm = getattr(self, name)
        if config.qk_norm_over == "head":
            return norm(heads)
        return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)

    def _rotated(self, heads: Queries, positions: Positions) -> Queries:
        config = self.config
        if not config.rope:
            return heads
        cos, sin = rotary_angles(positions, config.rotary_dim, config.rope_base, config.rope_scaling)
        return rotate(heads, cos, sin)
