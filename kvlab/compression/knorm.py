"""Keys by their length (arXiv 2406.11430)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Compression, Slots
from kvlab.schema import choice


@dataclass(frozen=True)
class Knorm(Compression):
    """Keeps the tokens with the shortest keys, as published for large pretrained models. Which end of the order is
    attended to is a property of the model: `keep` "long" reverses it, and small models trained here want that.
    `kvlab.evaluation.key_lengths` measures which. With query-key norm all keys of a head are about as long."""

    name: ClassVar[str] = "knorm"

    keep: str = choice("short", ("short", "long"))

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        lengths = jnp.linalg.norm(slots.keys, axis=-1)
        return lengths if self.keep == "long" else -lengths
