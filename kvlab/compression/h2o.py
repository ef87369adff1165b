"""What has been attended to so far (H2O, arXiv 2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Attended, Compression, Noted, Shape, Slots, grouped
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
        mass = grouped(weights, num_kv_heads).mean(axis=3).sum(axis=1)[:, :, :num_slots].transpose(0, 2, 1)
        places = jnp.arange(num_slots, dtype=jnp.int32)[None, None, :]
        readers = ((places <= seen.slots[:, :, None]) & seen.real[:, :, None]).sum(axis=1)
        mass = jnp.pad(mass, ((0, 0), (0, num_slots - mass.shape[1]), (0, 0)))
        return {"mass": noted["mass"] + mass, "readers": noted["readers"] + readers[:, :, None].astype(jnp.float32)}

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        num_slots = slots.keys.shape[2]

        def by_head(name: str):
            array = slots.noted[name][:, :num_slots].transpose(0, 2, 1)
            return jnp.pad(array, ((0, 0), (0, 0), (0, num_slots - array.shape[2])))

        mass = by_head("mass")
        return mass / jnp.maximum(by_head("readers"), 1) if self.by_readers else mass
