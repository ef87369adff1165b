"""What is attended to and not yet said by another key (R-KV, arXiv 2505.24133)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Slots, by_group, unit
from kvlab.compression.last_queries import ByLastQueries, before_window, num_queries, reaching
from kvlab.schema import integer, real
from pallas_kernels.masking import masked_softmax

ROWS = 128
"""Keys whose similarity to all others is held at a time."""


@dataclass(frozen=True)
class RKV(ByLastQueries):
    """`weight` * importance - (1 - `weight`) * redundancy, published for decoding (`every=128`).

    Importance is that of SnapKV with its two averages replaced: queries of a group take their largest score, and
    `pool` neighbouring slots their largest weight. Redundancy is the mean cosine of a key to all others, as a softmax
    over slots. Of what is similar to a key by more than `threshold` the newest is let off, so that of several copies
    one stays. N * N cosines a head are computed; 128 rows of them are held at a time."""

    name: ClassVar[str] = "rkv"

    window: int = integer(8, 1, 4096)
    pool: int = integer(7, 1, 255)
    weight: float = real(0.1, 0.0, 1.0)
    threshold: float = real(0.5, -1.0, 1.0)

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        importance = _largest(_importance(slots), self.pool)
        return self.weight * importance - (1 - self.weight) * redundancy(slots, self.threshold)


def _importance(slots: Slots) -> Float[Array, "B K N"]:
    """Weights of the last queries over what came before them, of each group's largest scores."""
    asked = by_group(slots.noted["queries"].swapaxes(1, 2), slots.keys.shape[1])
    scores = slots.capped(jnp.einsum("bkgwd,bknd->bkgwn", asked, slots.keys))
    seen = reaching(slots) & before_window(slots)[:, None, :]
    weights, _ = masked_softmax(scores.max(axis=2), seen[:, None])
    return weights.sum(axis=2) / num_queries(slots)[:, None, None]


def redundancy(slots: Slots, threshold: float) -> Float[Array, "B K N"]:
    """The mean cosine of each key to all others of its head, as a softmax over the slots that hold a token. Of each
    key's similar ones the newest counts as dissimilar to it."""
    num_slots = slots.keys.shape[2]
    places = jnp.arange(num_slots, dtype=jnp.int32)
    directions = unit(slots.keys)

    def of_rows(start: Array) -> Float[Array, "B K N"]:
        mine = start + jnp.arange(rows, dtype=jnp.int32)
        is_real = (mine < num_slots)[None, None, :, None]
        chosen = jnp.where(is_real, directions[:, :, jnp.minimum(mine, num_slots - 1)], 0)
        cosines = jnp.einsum("bkrd,bknd->bkrn", chosen, directions)
        is_other = slots.valid[:, None, None, :] & (mine[:, None] != places[None, :])[None, None]
        cosines = jnp.where(is_other, cosines, 0)
        newest = jnp.where(cosines > threshold, places[None, None, None, :], -1).max(axis=-1, keepdims=True)
        return jnp.where(places[None, None, None, :] == newest, 0, cosines).sum(axis=2)

    rows = min(ROWS, num_slots)
    starts = jnp.arange(0, num_slots, rows, dtype=jnp.int32)
    total = jax.lax.map(of_rows, starts).sum(axis=0)
    mean = total / slots.num_stored[:, None, None]
    return masked_softmax(mean, jnp.broadcast_to(slots.valid[:, None, :], mean.shape))[0]


def _largest(scores: Float[Array, "B K N"], size: int) -> Array:
    """The largest of `size` neighbouring slots."""
    padding = ((0, 0), (0, 0), ((size - 1) // 2, size // 2))
    return jax.lax.reduce_window(scores, -jnp.inf, jax.lax.max, (1, 1, size), (1, 1, 1), padding)
