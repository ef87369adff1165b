"""The smallest mixer over a state that no mixer of kvlab declares yet: a retrieval memory."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from kvlab.ledger.states import RetrievalState, State
from kvlab.mixers.base import LayerMemory, Mixer, MixerConfig
from kvlab.mixers.layers import Linear
from kvlab.schema import integer
from kvlab.typing import Hidden, Positions


@dataclass(frozen=True)
class RetrievalConfig(MixerConfig):
    num_heads: int = integer(4, 1, 64)
    num_kv_heads: int = integer(2, 1, 64)
    head_dim: int = integer(4, 1, 64)
    index_dim: int = integer(3, 1, 64)
    num_selected: int = integer(5, 1, 64)


class TinyRetrieval(Mixer):
    """Attention over the tokens that an index selects."""

    Config = RetrievalConfig

    def __init__(self, config: RetrievalConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        options = {"use_bias": False, "dtype": jnp.dtype(dtype), "rngs": rngs}
        dim = config.head_dim
        self.query = Linear(model_dim, config.num_heads * dim, **options)
        self.key = Linear(model_dim, config.num_kv_heads * dim, **options)
        self.value = Linear(model_dim, config.num_kv_heads * dim, **options)
        self.index_query = Linear(model_dim, config.index_dim, **options)
        self.index = Linear(model_dim, config.index_dim, **options)
        self.out = Linear(config.num_heads * dim, model_dim, **options)
        self.config, self.dtype = config, dtype

    def states(self) -> dict[str, State]:
        config = self.config
        heads = config.num_kv_heads, config.head_dim, config.head_dim
        return {"kv": RetrievalState(*heads, config.index_dim, config.num_selected, self.dtype)}

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        queries, keys, values = (
            project(x).reshape(*x.shape[:2], -1, self.config.head_dim) for project in (self.query, self.key, self.value)
        )
        kv = memory["kv"].append(keys=keys, values=values, index=self.index(x)[:, :, None])
        outputs, kv = kv.attend(queries, positions, index_queries=self.index_query(x))
        return self.out(outputs.reshape(*x.shape[:2], -1)), {"kv": kv}


TINY = {"tiny_retrieval": TinyRetrieval}
