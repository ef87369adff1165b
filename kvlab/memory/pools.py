"""The arrays behind the ledger's pages: how they are allocated, written and copied.

Pools are pytrees of plain arrays, one per layer and state, donated to the step and returned by it. Token states lie
head-major, [P, K, page, D], with scales [P, K, page] where they are quantised by token; recurrent states are [slots,
...].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from kvlab.ledger.states import ArraySpec, State
from kvlab.memory.rotation import turned, turned_back
from kvlab.units import power_of_two
from pallas_kernels.formats import FORMATS, SHARED, Quantised, Stored, quantised
from pallas_kernels.kv_write import kv_write
from pallas_kernels.pages import Pages

type Pool = dict[str, Any]
"""Arrays of one layer's state by name."""


def allocate_pages(state: State, num_pages: int, page_size: int) -> Pool:
    """Zeroed arrays of a state that is addressed by token."""
    return {array.name: jnp.zeros(*_layout(array, num_pages, page_size)) for array in state.arrays}


def _layout(array: ArraySpec, num_pages: int, page_size: int) -> tuple[tuple[int, ...], Any]:
    """Shape and type of an array in pages, or of what a page has once: of int4 and int2, several numbers share a byte.
    On a CPU numbers of 8 bits lie as plain bytes: XLA there widens or copies a pool of any other type of that size to
    write into it."""
    heads, *dims = array.shape
    dims[-1:] = [size // SHARED.get(array.dtype, 1) for size in dims[-1:]]
    dtype = FORMATS.get(array.dtype, array.dtype)
    is_byte = array.dtype in FORMATS and jnp.dtype(dtype).itemsize == 1
    as_bytes = is_byte and jax.default_backend() == "cpu"
    slots = () if array.per_page else (page_size,)
    return (num_pages, heads, *slots, *dims), jnp.uint8 if as_bytes else dtype


def allocate_slots(state: State, num_slots: int) -> Pool:
    """Zeroed arrays of a state of which each sequence has one."""
    return {array.name: jnp.zeros((num_slots, *array.shape), array.dtype) for array in state.arrays}


def poisoned(pool: Pool, fill: float, *, has_null_page: bool) -> Pool:
    """A pool filled with what must not be read, for tests: whole numbers take their largest one. The null page stays
    zero."""

    def poison(array: Array) -> Array:
        full = jnp.full_like(array, _unreadable(array, fill))
        return full.at[0].set(0) if has_null_page else full

    return {name: poison(array) for name, array in pool.items()}


def poison_pages(pool: Pool, pages: Array) -> Pool:
    """A pool with what must not be read in these pages; a page out of range is passed over."""
    return {name: array.at[pages].set(_unreadable(array, jnp.nan), mode="drop") for name, array in pool.items()}


def _unreadable(array: Array, fill: float) -> Array:
    """A number of an array's type that spoils what it touches: the fill, or the largest whole number."""
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.asarray(fill if is_float else jnp.iinfo(array.dtype).max, array.dtype)


def stored(state: Any, pool: Pool, name: str) -> Stored:
    """A pool's array as kernels take it: with its scales where it is quantised."""
    scales = pool.get(f"{name}_scale")
    if scales is None:
        return pool[name]
    return Quantised(pool[name], scales, state.format)


def rounded_arrays(state: State) -> list[str]:
    """The arrays of a state in pages that are in its format, each with a scale for every token."""
    scaled = {array.name for array in state.arrays if array.is_scale and not array.per_page}
    return [array.name for array in state.arrays if f"{array.name}_scale" in scaled]


def as_stored(state: Any, name: str, tokens: Array) -> Array:
    """Tokens [B, T, K, D] of an array as they are read once they were stored: rounded to the state's format, where that
    array is in it, in their own type."""
    if name not in rounded_arrays(state):
        return tokens
    rounded = quantised(turned(state, tokens), state.format).values()
    return turned_back(state, rounded).astype(tokens.dtype)


def write_tokens(state: Any, pool: Pool, slots: Array, tokens: Mapping[str, Array]) -> Pool:
    """A pool with tokens [B, T, K, D] of its arrays in their slots [B, T], in the pool's format. A slot is (page,
    offset); an index past the pool drops the write. Keys and values are written together, any other array by
    itself."""
    written = dict(pool)
    tokens = {name: turned(state, array) for name, array in tokens.items()}
    for name in tokens:
        if name == "values":
            continue
        values = tokens.get("values") if name == "keys" else None
        if values is None:
            pages = Pages(stored(state, pool, name), value_dim=tokens[name].shape[-1])
        else:
            pages = Pages(stored(state, pool, "keys"), stored(state, pool, "values"))
        after = kv_write(pages, tokens[name], values, slots)
        for array, held in zip((name, "values"), after.pools, strict=False):
            if isinstance(held, Quantised):
                written |= {array: held.payload, f"{array}_scale": held.scales}
            else:
                written[array] = held
    return written


def padded_pages(pages: npt.NDArray[np.int32], filler: int | Sequence[int]) -> npt.NDArray[np.int32]:
    """Pages [n], or moves of pages [n, 2], padded with `filler` to a power of two; of none there is one."""
    missing = power_of_two(len(pages)) - len(pages)
    return np.concatenate([pages, np.full((missing, *pages.shape[1:]), filler, np.int32)])


def copy_pages(pool: Pool, sources: Array, destinations: Array) -> Pool:
    """A pool with pages copied, bit for bit; a destination past the pool drops the copy. All sources are read first."""
    return {
        name: array.at[destinations].set(array.at[sources].get(mode="clip"), mode="drop")
        for name, array in pool.items()
    }


def num_bytes(pools: Any) -> int:
    """Bytes of every array in a tree: the truth that statements are checked against."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pools))
