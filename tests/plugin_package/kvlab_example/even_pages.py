"""Pages with even numbers."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.selection.base import Candidates, Selection


@dataclass(frozen=True)
class EvenPages(Selection):
    """Every other page."""

    name: ClassVar[str] = "even_pages"

    def score(self, candidates: Candidates) -> Float[Array, "B T K N"]:
        batch, num_tokens, num_kv_heads = candidates.queries.shape[:3]
        even = (candidates.numbers % 2 == 0).astype(jnp.float32)[:, None, None, :]
        return jnp.broadcast_to(even, (batch, num_tokens, num_kv_heads, even.shape[3]))
