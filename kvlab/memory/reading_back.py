"""What a memory gives back of numbers that it rounded: of the tokens that a step wrote, and of pages that were sealed.

Verification asks for it. Between two numbers of a format lies a tie; whether a number next to it is rounded up or down
hangs on the last bit of what was computed, in which two programs may differ. So the parallel form takes what the memory
stores, and looks whether that is what rounding gives, ties aside.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from kvlab.ledger.memory_states import SealedState
from kvlab.ledger.plan import Plan, Seals
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.pools import Pool, rounded_arrays, stored
from kvlab.memory.rotation import turned_back
from kvlab.memory.views.sealed import pages_of
from pallas_kernels.formats import Quantised

type Given = tuple[dict[str, dict[str, Any]], ...]
"""By layer, state and array: numbers as they are read."""


def read_back(layout: MemoryLayout, pools: Sequence[Mapping[str, Pool]], plan: Plan) -> Given:
    """Of the states that are held in a format: what the tokens that a step wrote are now, [B, T, K, D] by the state
    that holds them. NaN where nothing was written. Traced."""
    found = []
    for layer, states in enumerate(layout.states):
        mine = dict[str, dict[str, Array]]()
        for name, index in states.items():
            state = layout.classes[index]
            if state.is_sealed:  # steps write nothing there
                continue
            slots = jnp.asarray(plan.classes[index].write_slots)
            arrays = {
                array: _at(stored(state.spec, pools[layer][name], array), slots, state.page_size)
                for array in rounded_arrays(state.spec)
            }
            if arrays:
                mine[name] = {array: turned_back(state.spec, values) for array, values in arrays.items()}
        found.append(mine)
    return tuple(found)


def _at(pages: Any, slots: Array, page_size: int) -> Array:
    """What pages [P, K, page, D] hold in slots [B, T]."""
    assert isinstance(pages, Quantised)
    page, offset = slots // page_size, slots % page_size
    values = pages.each(lambda array: array.at[page, :, offset].get(mode="fill", fill_value=0)).values()
    return jnp.where((page < len(pages.payload))[..., None, None], values, jnp.nan)


def read_sealed(layout: MemoryLayout, pools: Sequence[Mapping[str, Pool]], seals: Seals) -> Given:
    """What sealed pages hold after a sealing, [n, K, page, D], by layer and the mixer's state, in the order of the
    moves. Traced."""
    found = []
    for layer, states in enumerate(layout.states):
        mine = dict[str, dict[str, Array]]()
        for name, joined in layout.joined[layer].items():
            names = dict(joined.names)
            if "sealed" in names and len(moves := seals.classes[states[names[""]]]):
                state = layout.classes[states[names["sealed"]]].spec
                assert isinstance(state, SealedState)
                pages = pages_of(state, pools[layer][names["sealed"]])
                arrays = zip(("keys", "values"), pages.pools, strict=True)
                mine[name] = {array: _pages_at(held, jnp.asarray(moves)[:, 1]) for array, held in arrays}
        found.append(mine)
    return tuple(found)


def _pages_at(pages: Any, places: Array) -> Array:
    """What pages hold at places [n]."""
    assert isinstance(pages, Quantised)
    return pages.each(lambda array: array.at[places].get(mode="clip")).values()
