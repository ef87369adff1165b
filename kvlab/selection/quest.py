"""Pages by an upper bound of what a query could find in them (Quest, arXiv 2406.10774)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kvlab.ledger.states import ArraySpec
from kvlab.schema import choice
from kvlab.selection.base import Candidates, Selection


@dataclass(frozen=True)
class Quest(Selection):
    """Reads the pages with the largest bound sum_c max(q_c min_c, q_c max_c) on a product with the query, from the
    elementwise minimum and maximum of the page's keys. Of the query heads that share a KV head the `group` takes the
    largest bound, as published for single heads, or the mean of them.

    Memory grows by 2 * key_dim * itemsize bytes a page and head."""

    name: ClassVar[str] = "quest"

    group: str = choice("max", ("max", "mean"))

    def arrays(self, num_kv_heads: int, key_dim: int, dtype: str) -> tuple[ArraySpec, ...]:
        return tuple(
            ArraySpec(name, (num_kv_heads, key_dim), dtype, per_page=True, is_statistics=True)
            for name in ("key_min", "key_max")
        )

    def note(self, keys: Float[Array, "*pages K S D"], used: Bool[Array, "*pages S"], dtype: Any) -> dict[str, Array]:
        used = used[..., None, :, None]
        least = jnp.where(used, keys, jnp.inf).min(axis=-2)
        most = jnp.where(used, keys, -jnp.inf).max(axis=-2)
        return {"key_min": outward(least, dtype, -jnp.inf), "key_max": outward(most, dtype, jnp.inf)}

    def score(self, candidates: Candidates) -> Float[Array, "B T K N"]:
        return over_group(bounds(candidates), self.group)


def bounds(candidates: Candidates) -> Float[Array, "B T K G N"]:
    """The bound of each query's product with any key of each page: where a channel of the query is positive, its
    largest product is with the maximum, elsewhere with the minimum."""
    queries = candidates.queries

    def products(part: Array, name: str) -> Array:
        return jnp.einsum("btkgd,bnkd->btkgn", part, candidates.index[name])

    return products(jnp.maximum(queries, 0), "key_max") + products(jnp.minimum(queries, 0), "key_min")


def over_group(by_query_head: Float[Array, "B T K G N"], group: str) -> Float[Array, "B T K N"]:
    """Scores of the query heads that share a KV head as one: their "max", or their "mean"."""
    return by_query_head.max(axis=3) if group == "max" else by_query_head.mean(axis=3)


def outward(bound: Float[Array, "*shape"], dtype: Any, towards: float) -> Array:
    """A bound in a narrower type, rounded so that it remains one: never away from `towards`, an infinity."""
    narrow = bound.astype(dtype)
    falls_short = (narrow.astype(bound.dtype) - bound) * jnp.sign(towards) < 0
    return jnp.where(falls_short, jax.lax.nextafter(narrow, jnp.full_like(narrow, towards)), narrow)
