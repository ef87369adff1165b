"""Controls: what may be kept without looking at anything."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Compression, Slots
from kvlab.schema import choice


@dataclass(frozen=True)
class Random(Compression):
    """A random set, the control of every method. `share` says who draws: each "head" its own, as methods that score by
    head do, or the heads of a "layer" together. What heads draw apart covers more of the prompt between them."""

    name: ClassVar[str] = "random"
    by_place: ClassVar[bool] = True

    share: str = choice("head", ("head", "layer"))

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        num_heads = slots.keys.shape[1] if self.share == "head" else 1

        def draw(seed: Array, length: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(slots.layer), seed), length)
            # Slot by slot, so that a draw does not hang on how many slots pages happen to have.
            return jax.random.uniform(key, (slots.keys.shape[2], num_heads)).T

        drawn = jax.vmap(draw)(slots.seeds, slots.lengths)
        return jnp.broadcast_to(drawn, slots.keys.shape[:3])


@dataclass(frozen=True)
class Recency(Compression):
    """The newest tokens, behind the sinks: what a window does, once."""

    name: ClassVar[str] = "recency"
    by_place: ClassVar[bool] = True

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        newest = jnp.arange(slots.keys.shape[2], dtype=jnp.float32)
        return slots.everywhere(jnp.broadcast_to(newest[None, :], slots.valid.shape))
