"""What the last queries attend to: what `snapkv`, `rkv` and `tova` have in common."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kvlab.compression.base import Attended, Compression, Noted, Shape, Slots, grouped, weights_of
from kvlab.ledger.states import ArraySpec, PerToken
from kvlab.schema import ConfigError, integer


@dataclass(frozen=True)
class ByLastQueries(Compression, abc.ABC):
    """The base of what scores by the last `window` queries, whose slots are among the `recent` ones."""

    uses_readers: ClassVar[bool] = True
    of_last_layer: ClassVar[bool] = True
    by_place: ClassVar[bool] = True

    window: int = integer(32, 1, 4096)

    def cross_check(self) -> None:
        if self.recent < self.window:
            legal = f"must be at least window = {self.window}: the slots of the queries that choose are kept"
            raise ConfigError("recent", self.recent, legal)

    def statistics(self, state: PerToken, shape: Shape) -> tuple[ArraySpec, ...]:
        return query_statistics(state, self.window)

    def observe(self, noted: Noted, seen: Attended) -> Noted:
        return last_queries(noted, seen, self.window)


def query_statistics(state: PerToken, window: int) -> tuple[ArraySpec, ...]:
    """What `last_queries` remembers: window * H * D float32 numbers a sequence, and their count."""
    assert state.readers is not None
    key_dim = state.arrays[0].shape[1]
    queries = ArraySpec("queries", (window, state.readers.num_heads, key_dim), "float32")
    return queries, ArraySpec("count", (1,), "int32")


def last_queries(noted: Noted, seen: Attended, window: int) -> Noted:
    """The newest `window` queries in their order, the newest last, and how many there have been up to that many."""
    counts = seen.real.sum(axis=1).astype(jnp.int32)
    joined = jnp.concatenate([noted["queries"], seen.queries], axis=1)
    newest = jax.vmap(lambda row, count: jax.lax.dynamic_slice_in_dim(row, count, window, axis=0))(joined, counts)
    return {"queries": newest, "count": jnp.minimum(noted["count"] + counts[:, None], window)}


def window_weights(slots: Slots) -> Float[Array, "B K N"]:
    """The weights of the last queries [B, window, H, D] over slots, averaged over the queries that there are and over
    the query heads of a group. A query sees up to its own slot."""
    weights = weights_of(slots.noted["queries"], slots, reaching(slots))
    total = grouped(weights, slots.keys.shape[1]).mean(axis=3).sum(axis=1)
    return total / num_queries(slots)[:, None, None]


def num_queries(slots: Slots) -> Float[Array, "B"]:
    """How many of the last queries there are, as a divisor: at least 1."""
    return jnp.maximum(slots.noted["count"][:, 0], 1).astype(jnp.float32)


def reaching(slots: Slots) -> Bool[Array, "B W N"]:
    """Which slots each of the last queries sees: up to its own, which is as far from the last slot as the query from
    the last query. A query that there never was sees none."""
    window, count = slots.noted["queries"].shape[1], slots.noted["count"]
    back = jnp.arange(window, dtype=jnp.int32)[None, :] - window + 1  # 0: the newest
    own = slots.stored[:, None] - 1 + back
    places = jnp.arange(slots.keys.shape[2], dtype=jnp.int32)[None, None, :]
    return (places <= own[:, :, None]) & (back > -count)[:, :, None]


def before_window(slots: Slots) -> Bool[Array, "B N"]:
    """The slots of tokens before the last queries' own, whose weights say nothing of their neighbours'."""
    places = jnp.arange(slots.keys.shape[2], dtype=jnp.int32)[None, :]
    return places < slots.stored[:, None] - slots.noted["count"]
