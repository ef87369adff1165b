"""The smallest mixer over a state that no mixer of kvlab declares yet: latent rows."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from kvlab.ledger.readers import Readers
from kvlab.ledger.states import LatentState, State
from kvlab.mixers.base import LayerMemory, Mixer, MixerConfig
from kvlab.mixers.layers import Linear
from kvlab.schema import integer
from kvlab.typing import Hidden, Positions

SCALE = 0.4


@dataclass(frozen=True)
class LatentConfig(MixerConfig):
    num_heads: int = integer(3, 1, 64)
    rank: int = integer(6, 1, 64)
    rope_dim: int = integer(2, 1, 64)


class TinyLatent(Mixer):
    """Absorbed latent attention without its rotation."""

    Config = LatentConfig

    def __init__(self, config: LatentConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        width = config.rank + config.rope_dim
        options = {"use_bias": False, "dtype": jnp.dtype(dtype), "rngs": rngs}
        self.query = Linear(model_dim, config.num_heads * width, **options)
        self.row = Linear(model_dim, width, **options)
        self.out = Linear(config.num_heads * config.rank, model_dim, **options)
        self.config, self.dtype = config, dtype

    def states(self) -> dict[str, State]:
        readers = Readers(self.config.num_heads, scale=SCALE)
        return {"latents": LatentState(self.config.rank, self.config.rope_dim, self.dtype, readers=readers)}

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        queries = self.query(x).reshape(*x.shape[:2], self.config.num_heads, -1)
        latents = memory["latents"].append(keys=self.row(x)[:, :, None])
        outputs, latents = latents.attend(queries, positions)
        return self.out(outputs.reshape(*x.shape[:2], -1)), {"latents": latents}


TINY = {"tiny_latent": TinyLatent}
