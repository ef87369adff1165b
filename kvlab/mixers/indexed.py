"""Indexed attention (DeepSeek Sparse Attention, arXiv 2512.02556): a small indexer selects the tokens that a query
attends to. The bytes held grow, the bytes read fall."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from kvlab.ledger.states import RetrievalState, State
from kvlab.memory.lightning import IndexQueries, WarmUp
from kvlab.mixers.attention import Attention, AttentionConfig
from kvlab.mixers.base import LayerMemory
from kvlab.mixers.layers import LayerNorm, Linear
from kvlab.rotary import rotary_angles, rotate
from kvlab.schema import ConfigError, integer, real
from kvlab.typing import Hidden, Positions


@dataclass(frozen=True)
class IndexedConfig(AttentionConfig):
    """Attention without a window, and its indexer: `index_heads` heads of `index_dim`, of which `index_rope_fraction`
    is rotated, select `num_selected` tokens for each query. With an `index_block` whole blocks of as many tokens are
    selected by their best token, the first one and the query's own always among them; 0: single tokens.

    Selecting has no gradient. The indexer learns to guess the attention of all heads together: its divergence from
    that, in nats, counts `index_loss` times beside the loss, and trains nothing else. The first `dense_share` of the
    training's steps attend to everything; the others, and every evaluation, to what is selected.
    """

    index_heads: int = integer(4, 1, 1024)
    index_dim: int = integer(16, 1, 1024)
    index_rope_fraction: float = real(0.5, 0.0, 1.0)
    num_selected: int = integer(16, 1, 1 << 20)
    index_block: int = integer(0, 0, 65536)
    index_loss: float = real(1.0, 0.0, 1e6)
    dense_share: float = real(0.8, 0.0, 1.0)

    def cross_check(self) -> None:
        super().cross_check()
        if self.shares_kv:
            raise ConfigError("shares_kv", True, "must be false: the index is one of the layer's own keys")
        if self.window is not None:
            raise ConfigError("window", self.window, "must be null: the indexer says what is read")
        block = self.index_block
        if block and (self.num_selected % block or self.num_selected < 2 * block):
            legal = f"must be a multiple of index_block = {block}, and at least {2 * block}"
            raise ConfigError("num_selected", self.num_selected, legal)

    @property
    def index_rotary_dim(self) -> int:
        """Leading numbers of an index key that are rotated, an even one; 0 without rotary embeddings."""
        return int(self.index_dim * self.index_rope_fraction) // 2 * 2 if self.rope else 0


class Indexed(Attention):
    """y = W_o softmax(q k^T / sqrt(D)) v over the `num_selected` tokens s with the largest

        I_ts = sum_j w_tj relu(q^I_tj . k^I_s)

    the newer one where two are equal. k^I is one key a token, behind a layer norm; w_t is a projection of the layer's
    input over sqrt(index_heads * index_dim). No gradient passes from I into the layer's input.

    State: (num_kv_heads * 2 * head_dim + index_dim) * itemsize bytes a token, more than attention alone. A step reads
    all of the index, and of keys and values what is selected.
    """

    Config = IndexedConfig
    config: IndexedConfig
    parallel_op = None

    def __init__(self, config: IndexedConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        super().__init__(config, model_dim, dtype=dtype, rngs=rngs)

        def linear(outputs: int) -> Linear:
            return Linear(model_dim, outputs, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)

        self.index_query = linear(config.index_heads * config.index_dim)
        self.index_key = linear(config.index_dim)
        self.index_weight = linear(config.index_heads)
        self.index_norm = LayerNorm(config.index_dim, eps=config.norm_eps)

    def states(self) -> dict[str, State]:
        config = self.config
        heads = config.num_kv_heads, config.head_dim, config.head_dim
        selects = config.index_dim, config.num_selected, self.dtype, config.index_block
        return {"kv": RetrievalState(*heads, *selects, readers=self.readers)}

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        config = self.config
        queries, (keys, values) = self.asked(x, positions), self.stored(x, positions)
        asked, index = self.indexed(jax.lax.stop_gradient(x), positions)
        kv = memory["kv"].append(keys=keys, values=values, index=index)
        warm_up = WarmUp(config.index_loss, config.dense_share)
        outputs, kv = kv.attend(
            queries, positions, index_queries=asked, warm_up=warm_up, sink_logits=self.logits_of_sinks
        )
        return self.mixed(outputs, x), {"kv": kv}

    def indexed(self, x: Hidden, positions: Positions) -> tuple[IndexQueries, jax.Array]:
        """The step's queries of the index, and its tokens' keys in it [B, T, 1, index_dim]."""
        config = self.config
        queries = self.index_query(x).reshape(*x.shape[:2], config.index_heads, config.index_dim)
        keys = self.index_norm(self.index_key(x))[:, :, None]
        if config.index_rotary_dim:
            cos, sin = rotary_angles(positions, config.index_rotary_dim, config.rope_base, config.rope_scaling)
            queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        weights = self.index_weight(x).astype(jnp.float32) * (config.index_heads * config.index_dim) ** -0.5
        return IndexQueries(queries, weights), keys
