"""Controls: what can be chosen without an index, and what could be chosen at best."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.schema import integer
from kvlab.selection.base import Candidates, Selection


@dataclass(frozen=True)
class Recency(Selection):
    """The newest pages, behind those that are always read."""

    name: ClassVar[str] = "recency"

    def score(self, candidates: Candidates) -> Float[Array, "B T K N"]:
        batch, num_tokens, num_kv_heads = candidates.queries.shape[:3]
        newest = candidates.numbers.astype(jnp.float32)[:, None, None, :]
        return jnp.broadcast_to(newest, (batch, num_tokens, num_kv_heads, newest.shape[3]))


@dataclass(frozen=True)
class Random(Selection):
    """Random pages, drawn by each KV head for each query, as methods choose by head: the control of every method. The
    draw depends on `seed`, layer and token position alone, so that it is the same however a sequence is run."""

    name: ClassVar[str] = "random"

    seed: int = integer(0, 0)

    def score(self, candidates: Candidates) -> Float[Array, "B T K N"]:
        numbers, num_kv_heads = candidates.numbers, candidates.queries.shape[2]
        base = jax.random.fold_in(jax.random.key(self.seed), candidates.layer)
        heads = jnp.arange(num_kv_heads, dtype=jnp.int32)

        def draw(position: Array, head: Array, number: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, position), head), number)
            return jax.random.uniform(key)

        of_pages = jax.vmap(draw, in_axes=(None, None, 0))
        of_heads = jax.vmap(of_pages, in_axes=(None, 0, None))
        of_tokens = jax.vmap(of_heads, in_axes=(0, None, None))
        return jax.vmap(of_tokens, in_axes=(0, None, 0))(candidates.positions, heads, numbers)


@dataclass(frozen=True)
class Oracle(Selection):
    """The pages that hold most of the attention that the query heads of a group would pay if they read everything. It
    reads all keys to find out: what others are measured by, not a way to read less."""

    name: ClassVar[str] = "oracle"
    reads_keys: ClassVar[bool] = True

    def score(self, candidates: Candidates) -> Float[Array, "B T K N"]:
        return candidates.weigh().sum(axis=3)
