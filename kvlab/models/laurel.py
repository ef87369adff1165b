"""A learned residual of low rank beside the mixer (LAuReL, arXiv 2411.07501, as Gemma 3n has it)."""

import jax.numpy as jnp
from flax import nnx

from kvlab.mixers.layers import Linear, RMSNorm
from kvlab.models.config import ModelConfig
from kvlab.typing import Hidden


class Laurel(nnx.Module):
    """(x + h + norm(W_up W_down h)) / sqrt(2): x is what mixer and residual stream give together, h what the mixer
    read, and the product has rank `model.laurel_rank`."""

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        dtype, dim, rank = jnp.dtype(model.dtype), model.model_dim, model.laurel_rank
        self.down = Linear(dim, rank, use_bias=False, dtype=dtype, rngs=rngs)
        self.up = Linear(rank, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(dim, eps=model.norm_eps)

    def __call__(self, x: Hidden, h: Hidden) -> Hidden:
        return (x + h + self.norm(self.up(self.down(h)))) * 2**-0.5
