"""What is noted of pages, from the keys that they store: always of a page as a whole, so that a page that is begun
anew, copied, rolled back or packed has what its keys say, and nothing of what was there before."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from kvlab.memory.pools import Pool, stored
from kvlab.memory.rotation import turned_back
from kvlab.selection import Selection
from pallas_kernels.formats import each_array, tile_values


def noted_anew(
    method: Selection, state: Any, pool: Pool, pages: Int32[Array, "B W"], num_slots: Int32[Array, "B W"]
) -> Pool:
    """A pool with the index of these pages, of which the first `num_slots` slots hold a key. Pages without any, and
    those out of range, are passed over."""
    if not state.index:
        return pool
    keys = page_keys(state, pool, pages)
    used = jnp.arange(keys.shape[3], dtype=jnp.int32)[None, None, :] < num_slots[:, :, None]
    keys = jnp.where(used[:, :, None, :, None], keys, 0)
    noted = method.note(keys, used, jnp.dtype(state.index[0].dtype))
    places = jnp.where(num_slots > 0, pages, len(pool["keys"]))
    return pool | {name: pool[name].at[places].set(array, mode="drop") for name, array in noted.items()}


def page_keys(state: Any, pool: Pool, pages: Int32[Array, "B W"]) -> Float[Array, "B W K S D"]:
    """The keys of pages as they are read: float32, whatever they are stored as."""
    tiles = each_array(stored(state, pool, "keys"), lambda array: array.at[pages].get(mode="clip"))
    return turned_back(state, tile_values(tiles).astype(jnp.float32))
