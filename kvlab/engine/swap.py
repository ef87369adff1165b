"""The host tier: where the pages of sequences that were swapped out wait, in plain numpy arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from kvlab.engine.step import Pools
from kvlab.ledger.plan import Swap
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.pools import padded_pages


class HostTier:
    """Host pages of every layer's state, in the layout of the device's; made when they are first used."""

    def __init__(self, layout: MemoryLayout):
        self.layout = layout
        self._arrays: dict[tuple[int, str, str], npt.NDArray[np.generic]] = {}

    def take(self, pools: Pools, swap: Swap) -> None:
        """Copies pages from the device; returns when they are on the host."""
        for layer, states in enumerate(self.layout.states):
            for name, index in states.items():
                moves = swap.classes[index]
                if not len(moves):
                    continue
                for field, array in pools[layer][name].items():
                    pages = np.asarray(_gather(array, padded_pages(moves[:, 0], 0)))[: len(moves)]
                    host = self._arrays.get((layer, name, field))
                    if host is None:
                        num_pages = self.layout.classes[index].num_host_pages
                        host = self._arrays[layer, name, field] = np.zeros((num_pages, *array.shape[1:]), array.dtype)
                    host[moves[:, 1]] = pages

    def give_back(self, pools: Pools, swap: Swap) -> Pools:
        """The pools with pages copied back from the host."""
        layers = []
        for layer, states in enumerate(self.layout.states):
            after = dict(pools[layer])
            for name, index in states.items():
                moves = swap.classes[index]
                if not len(moves):
                    continue
                beyond = self.layout.classes[index].num_pages
                after[name] = {
                    field: _scatter(
                        array,
                        padded_pages(moves[:, 0], beyond),
                        jnp.asarray(self._arrays[layer, name, field][padded_pages(moves[:, 1], 0)]),
                    )
                    for field, array in pools[layer][name].items()
                }
            layers.append(after)
        return tuple(layers)


@jax.jit
def _gather(array: Array, pages: Array) -> Array:
    return array.at[pages].get(mode="clip")


@partial(jax.jit, donate_argnums=0)
def _scatter(array: Array, pages: Array, values: Array) -> Array:
    return array.at[pages].set(values, mode="drop")
