"""One state a sequence: read at the step's start, written at its end."""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

from kvlab.ledger.states import State
from kvlab.memory.pools import Pool, allocate_slots
from kvlab.memory.views.base import Planned


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StateSlots(Planned):
    """Slots of recurrent states; a sequence without tokens starts from zero, whatever its slot held."""

    @classmethod
    def allocate(cls, state: State, num_pages: int, page_size: int) -> Pool:
        return allocate_slots(state, num_pages)

    def read(self) -> dict[str, Array]:
        slots = jnp.asarray(self.plan.pages)[:, 0]
        fresh = self.starts == 0

        def rows_of(array: Array) -> Array:
            rows = array.at[slots].get(mode="fill", fill_value=0)
            return jnp.where(fresh.reshape(-1, *(1,) * (rows.ndim - 1)), 0, rows)

        return {name: rows_of(array) for name, array in self.pool.items()}

    def write(self, states: dict[str, Array]) -> Self:
        slots = jnp.asarray(self.plan.write_slots)[:, 0]
        pool = {
            name: array.at[slots].set(states[name].astype(array.dtype), mode="drop")
            for name, array in self.pool.items()
        }
        return replace(self, pool=pool)

    @property
    def held(self) -> Array:
        """Which sequences [B] have a slot."""
        num_slots = len(next(iter(self.pool.values())))
        return jnp.asarray(self.plan.pages)[:, 0] < num_slots

    def valid(self, num_tokens: int) -> Array:
        return jnp.arange(num_tokens, dtype=jnp.int32)[None, :] < self.counts[:, None]
