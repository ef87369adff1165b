"""Keys that differ from the average key (KeyDiff, arXiv 2504.15364)."""

from dataclasses import dataclass
from typing import ClassVar

from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Compression, Slots, unit


@dataclass(frozen=True)
class KeyDiff(Compression):
    """Keeps the keys least like the mean direction of all keys of a head: -cos(k, mean of k / |k|). Needs no queries,
    and is meant for `at` "chunks" too, which is how it was published. Keys without positions that repeat all look
    alike to it."""

    name: ClassVar[str] = "keydiff"

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        directions = unit(slots.keys)
        anchor = unit(slots.mean(directions))
        return -(directions * anchor).sum(axis=-1)
