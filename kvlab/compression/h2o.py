"""What has been attended to so far (H2O, arXiv 2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Attended, Compression, Noted, Shape, Slots, as_noted, as_scored, grouped
from kvlab.ledger.states import ArraySpec, PerToken
from kvlab.schema import flag


@dataclass(frozen=True)
class H2O(Compression):
    """Keeps the tokens with the largest sum of attention over all queries so far, averaged over the query heads of a
    group. With `by_readers` the sum is divided by the number of queries that could see the slot: without, early tokens
    win by having been there longer. Costs another product of queries and keys in every step."""

    name: ClassVar[str] = "h2o"
    uses_readers: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    by_slot: ClassVar[tuple[str, ...]] = ("mass", "readers")

    by_readers: bool = flag(True)

    def statistics(self, state: PerToken, shape: Shape) -> tuple[ArraySpec, ...]:
        size = (shape.num_slots, state.arrays[0].shape[0])
        return ArraySpec("mass", size, "float32"), ArraySpec("readers", size, "float32")

    def observe(self, noted: Noted, seen: Attended) -> Noted:
        num_kv_heads, num_slots = noted["mass"].shape[2], noted["mass"].shape[1]
        weights = jnp.where(seen.real[:, :, None, None], seen.weigh(), 0)
        mass = as_noted(grouped(weights, num_kv_heads).mean(axis=3).sum(axis=1), num_slots)
        places = jnp.arange(num_slots, dtype=jnp.int32)[None, None, :]
        readers = ((places <= seen.slots[:, :, None]) & seen.real[:, :, None]).sum(axis=1)
        return {"mass": noted["mass"] + mass, "readers": noted["readers"] + readers[:, :, None].astype(jnp.float32)}

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        mass, readers = (as_scored(slots.noted[name], slots.keys.shape[2]) for name in self.by_slot)
        return mass / jnp.maximum(readers, 1) if self.by_readers else mass
