"""Multi-head latent attention (MLA, arXiv 2405.04434): all heads read one compressed row a token."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvlab.ledger.readers import Readers, Rotary
from kvlab.ledger.states import LatentState, State
from kvlab.memory.views import TokenView
from kvlab.mixers.base import Knob, LayerMemory, Mixer, MixerConfig
from kvlab.mixers.layers import Linear, RMSNorm
from kvlab.rotary import check_scaling, rotary_angles, rotate
from kvlab.schema import ConfigError, added, flag, integer, real, reals
from kvlab.typing import Hidden, Positions


@dataclass(frozen=True)
class LatentConfig(MixerConfig):
    """Hyper-parameters of one layer of latent attention.

    A token's row is `rank` numbers, from which the keys and values of all heads are expanded, and behind them a rotary
    key of `rope_dim`, which all heads share. A head's keys have `head_dim` numbers beside that, its values `value_dim`.
    Queries are compressed to `query_rank` numbers first; 0: they are projected as they are. Without `rope` nothing is
    turned (Kimi Linear, arXiv 2510.26692). `rope_scaling` is that of `AttentionConfig`. Scores are multiplied with
    `scale` (null: (head_dim + rope_dim) ** -0.5); behind YaRN DeepSeek has a larger one. `local_start` is that of
    `AttentionConfig`, of what is turned.
    """

    num_heads: int = integer(4, 1, 1024)
    rank: int = integer(16, 1, 65536)
    rope_dim: int = integer(8, 1, 1024)
    head_dim: int = integer(16, 1, 1024)
    value_dim: int = integer(16, 1, 1024)
    query_rank: int = integer(0, 0, 65536)
    rope: bool = flag(True)
    rope_base: float = real(10_000.0, 1.0, 1e15)
    rope_scaling: tuple[float, ...] = reals((), 0.0, 1e9, open_low=True)
    scale: float | None = added(real(None, 0.0, 1e3, open_low=True, optional=True))
    local_start: float = added(real(0.0, 0.0, 100.0))

    def cross_check(self) -> None:
        super().cross_check()
        if self.local_start and not self.rope:
            legal = "must be 0 without rope: nothing else tells near from far"
            raise ConfigError("local_start", self.local_start, legal)
        check_scaling(self.rope_scaling, self.rope_base)
        if self.rope and self.rope_dim % 2:
            raise ConfigError("rope_dim", self.rope_dim, "must be even to be turned, or rope false")

    def knob(self, context_len: int) -> Knob:
        """The rank, up to where rows could hold all keys and values as they are; rows are even, so that four bits a
        number fill whole bytes."""
        return Knob("rank", range(2 - self.rope_dim % 2, self.num_heads * (self.head_dim + self.value_dim) + 1, 2))


class LatentAttention(Mixer):
    """Attention over rows c_t = RMSNorm(W_c x_t) and k_t = RoPE(W_k x_t), the same for every head h:

        score = (q_h . W_uk,h c_s + RoPE(q'_h) . k_s) / sqrt(head_dim + rope_dim)
        y_t = W_o [ W_uv,h sum_s p_s c_s ]

    It is computed absorbed: W_uk,h^T q_h is scored with c_s as it is stored, and W_uv,h expands what was attended to.
    So the heads are one group over one key of rank + rope_dim numbers, whose first `rank` are its value, in training
    too. State: (rank + rope_dim) * itemsize bytes a token, whatever the heads.
    """

    Config = LatentConfig
    parallel_op = "flash_attention"

    def __init__(self, config: LatentConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)

        heads = config.num_heads
        if config.query_rank:
            self.compress = linear(model_dim, config.query_rank)
            self.query_norm = RMSNorm(config.query_rank, eps=config.norm_eps)
        self.query = linear(config.query_rank or model_dim, heads * (config.head_dim + config.rope_dim))
        self.row = linear(model_dim, config.rank + config.rope_dim)
        self.row_norm = RMSNorm(config.rank, eps=config.norm_eps)
        self.expand = linear(config.rank, heads * (config.head_dim + config.value_dim))
        self.out = linear(heads * config.value_dim, model_dim)
        if config.local_start:
            start = jnp.zeros(config.rope_dim).at[: config.rope_dim // 2].set(config.local_start)
            self.query_start, self.key_start = nnx.Param(start), nnx.Param(start)
        self.config, self.dtype = config, dtype

    def states(self) -> dict[str, State]:
        config = self.config
        rotary = None
        if config.rope:
            rotary = Rotary(config.rope_dim, config.rope_base, config.rope_scaling, start=config.rank)
        scale = config.scale or (config.head_dim + config.rope_dim) ** -0.5
        readers = Readers(config.num_heads, scale=scale, rotary=rotary)
        return {"latents": LatentState(config.rank, config.rope_dim, self.dtype, readers=readers)}

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        config = self.config
        asked = self.query_norm(self.compress(x)) if config.query_rank else x
        queries = self.query(asked).reshape(*x.shape[:2], config.num_heads, -1)
        plain, turned_queries = jnp.split(queries, [config.head_dim], axis=-1)
        compressed, turned_key = jnp.split(self.row(x)[:, :, None], [config.rank], axis=-1)
        compressed = self.row_norm(compressed)
        if config.local_start:
            turned_queries = turned_queries + self.query_start[...].astype(x.dtype)[None, None, None, :]
            turned_key = turned_key + self.key_start[...].astype(x.dtype)[None, None, None, :]
        if config.rope:
            cos, sin = rotary_angles(positions, config.rope_dim, config.rope_base, config.rope_scaling)
            turned_queries, turned_key = rotate(turned_queries, cos, sin), rotate(turned_key, cos, sin)
        of_keys, of_values = self._expansions(x.dtype)
        latents: TokenView = memory["latents"]
        latents = latents.append(keys=jnp.concatenate([compressed, turned_key], axis=-1))
        absorbed = by_head("nhd,rhd->nhr", plain, of_keys)
        outputs, latents = latents.attend(jnp.concatenate([absorbed, turned_queries], axis=-1), positions)
        values = by_head("nhr,rhv->nhv", outputs, of_values)
        return self.out(values.reshape(*x.shape[:2], -1)), {"latents": latents}

    def _expansions(self, dtype: jnp.dtype) -> tuple[Array, Array]:
        """What expands a row to keys [R, H, head_dim] and to values [R, H, value_dim]."""
        config = self.config
        both = self.expand.kernel[...].astype(dtype).reshape(config.rank, config.num_heads, -1)
        of_keys, of_values = jnp.split(both, [config.head_dim], axis=-1)
        return of_keys, of_values


def by_head(product: str, x: Array, expansion: Array) -> Array:
    """Each head's product of x [B, T, H, D], tokens in one axis n: its gradient contracts over one then (see
    `Linear`)."""
    flat = jnp.einsum(product, x.reshape(-1, *x.shape[2:]), expansion)
    return flat.reshape(*x.shape[:2], *flat.shape[1:])
