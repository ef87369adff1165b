"""The mean of all tokens so far."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from kvlab.ledger.states import ArraySpec, RecurrentState, State
from kvlab.mixers.base import LayerMemory, Mixer, MixerConfig
from kvlab.mixers.layers import Linear
from kvlab.schema import integer
from kvlab.typing import Hidden, Positions


@dataclass(frozen=True)
class RunningMeanConfig(MixerConfig):
    """`channels` means."""

    channels: int = integer(32, 1, 65536)


class RunningMean(Mixer):
    """y_t = W_o mean(W_i x_s, s <= t). State: channels float32 sums a sequence; positions say how many tokens."""

    Config = RunningMeanConfig

    def __init__(self, config: RunningMeanConfig, model_dim: int, *, dtype: str, rngs: nnx.Rngs):
        self.config = config
        self.inputs = Linear(model_dim, config.channels, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)
        self.out = Linear(config.channels, model_dim, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)

    def states(self) -> dict[str, State]:
        return {"sum": RecurrentState((ArraySpec("sum", (self.config.channels,), "float32"),))}

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        held = memory["sum"]
        is_real = held.valid(x.shape[1])[..., None]
        new = jnp.where(is_real, self.inputs(x).astype(jnp.float32), 0)
        sums = held.read()["sum"][:, None] + jnp.cumsum(new, axis=1)
        means = sums / (1 + positions.astype(jnp.float32))[..., None]
        return self.out(means.astype(x.dtype)), {"sum": held.write({"sum": sums[:, -1]})}
