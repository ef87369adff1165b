"""What the last queries of the prompt attend to (SnapKV, arXiv 2404.14469)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Slots
from kvlab.compression.last_queries import ByLastQueries, before_window, window_weights
from kvlab.schema import integer


@dataclass(frozen=True)
class SnapKV(ByLastQueries):
    """Keeps what the last `window` queries attend to, averaged over them and over the query heads of a group, then over
    `pool` neighbouring slots before the window. Sees the coming question only if that lies within the window."""

    name: ClassVar[str] = "snapkv"

    recent: int = integer(32, 0, 1 << 20)
    pool: int = integer(5, 1, 255)

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        before = before_window(slots)[:, None, :]
        return pooled(jnp.where(before, window_weights(slots), 0), self.pool)


def pooled(scores: Float[Array, "B K N"], size: int) -> Array:
    """The mean over `size` neighbouring slots; past the ends there are zeros."""
    if size == 1:
        return scores
    padding = ((0, 0), (0, 0), ((size - 1) // 2, size // 2))
    sums = jax.lax.reduce_window(scores, 0.0, jax.lax.add, (1, 1, size), (1, 1, 1), padding)
    return sums / size
