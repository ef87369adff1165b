"""Every other slot."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Compression, Slots
from kvlab.schema import integer


@dataclass(frozen=True)
class Alternate(Compression):
    """Keeps one slot of `stride`, then the oldest of the others."""

    name: ClassVar[str] = "alternate"
    by_place: ClassVar[bool] = True

    stride: int = integer(2, 2, 64)

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        places = jnp.arange(slots.keys.shape[2], dtype=jnp.int32)
        scores = (places % self.stride == 0).astype(jnp.float32) - places / places.size
        return slots.everywhere(jnp.broadcast_to(scores, slots.valid.shape))
