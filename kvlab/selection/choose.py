"""From scores to the pages that are read: one implementation for all methods."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32


class Chosen(NamedTuple):
    """What each query reads of the entries of its sequence's list of pages."""

    entries: Int32[Array, "B T K N"]
    """Entries that are read, ascending; behind them N."""
    is_read: Bool[Array, "B T K N"]
    """The same by entry."""


def choose(
    scores: Float[Array, "B T K N"],
    numbers: Int32[Array, "B N"],
    newest: Int32[Array, "B T"],
    counts: Int32[Array, "B T"],
    *,
    first: int,
    last: int,
) -> Chosen:
    """The pages that each query reads. `numbers` says which page of its sequence each entry is; a query may read those
    up to `newest`, and reads `counts` of them: the `first` ones and the `last` ones, then those of the highest score,
    the newer one where two are equal. A score that is NaN counts as the lowest; of what may not be read it is not
    looked at."""
    pages, newest = numbers[:, None, :], newest[:, :, None]
    may_be_read = pages <= newest
    always = may_be_read & ((pages < first) | (pages > newest - last))
    rank = jnp.broadcast_to(jnp.where(always, 2, jnp.where(may_be_read, 1, 0))[:, :, None], scores.shape)
    scores = jnp.where((rank == 1) & ~jnp.isnan(scores), scores, -jnp.inf)
    pages = jnp.broadcast_to(pages[:, :, None], scores.shape)
    num_entries = scores.shape[3]
    entries = jnp.broadcast_to(jnp.arange(num_entries, dtype=jnp.int32), scores.shape)
    *_, order = jax.lax.sort((-rank, -scores, -pages, entries), dimension=3, num_keys=3)
    counts = jnp.minimum(counts, may_be_read.sum(axis=2))[:, :, None, None]
    is_read = jnp.argsort(order, axis=3) < counts
    return Chosen(jnp.sort(jnp.where(entries < counts, order, num_entries), axis=3), is_read)
