"""How many of the generated cases run when, and a ledger of what kernels fetch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from pallas_kernels.formats import arrays_of

NUM_CASES = 200


def numbers(num_fast: int) -> list:
    """Of all generated cases, the first few in every run and the rest marked slow."""
    return [pytest.param(one, marks=() if one < num_fast else pytest.mark.slow) for one in range(NUM_CASES)]


LEDGER_CASES = {
    "ragged": ({"lengths": [320, 64, 16, 0]}, 320 + 64 + 16),
    "a window of 128 with sinks": ({"lengths": [320, 64], "window": 128, "sinks": 4}, 128 + 16 + 64),
    "lists of each head": ({"lengths": [320, 256], "lists": "heads"}, None),
    "int8": ({"lengths": [640, 64, 32, 0], "format": "int8", "page_size": 32}, 640 + 64 + 32),
    "int4 by channel": ({"lengths": [960, 64], "format": "int4", "per": "channel", "page_size": 32}, 960 + 64),
}
"""Cases in pages of 16, where they name no other, and the tokens of the pages that somebody sees."""


class Fetched:
    """Counts the bytes of copies as the simulator runs them."""

    num_bytes = 0

    def count(self, target: Any) -> None:
        """To be called in the kernel where a copy into `target` starts."""
        size = int(jnp.dtype(target.dtype).itemsize)
        for dim in target.shape:
            size *= dim
        jax.debug.callback(self._add, size)

    def listen(self, monkeypatch: Any) -> None:
        """Counts what the pipeline of a TPU's grid fetches into its blocks."""
        real = interpret_pallas_call.get

        def get(
            token: Any, device: Any, core: Any, space: Any, buffer: Any, transforms: Any, *rest: Any, **options: Any
        ):
            token, found = real(token, device, core, space, buffer, transforms, *rest, **options)
            if rest and rest[0] is not None:  # the indices of a block: what kernels read themselves has none
                self.num_bytes += found.nbytes
            return token, found

        monkeypatch.setattr(interpret_pallas_call, "get", get)

    def _add(self, size: int) -> None:
        self.num_bytes += int(size)

    def of(self, check: Callable, kernel: Callable, case: str) -> float:
        """The bytes that a case fetches, over those of its live pages once."""
        asked, live = LEDGER_CASES[case]
        asked = {"page_size": 16, **asked}
        page_size, kv_heads, dim, listed = asked["page_size"], 2, 64, []

        def listening(*arrays: Any, **options: Any) -> Any:
            listed.append(int((arrays[4] < 2**30).sum()))
            pools = [one for pool in arrays[1:3] for one in arrays_of(pool)]
            listed.append(sum(one.nbytes for one in pools) // (pools[0].shape[0] * pools[0].shape[1]))
            return kernel(*arrays, **options)

        check(listening, **asked, num_queries=1, group=4, kv_heads=kv_heads, dims=(dim, dim), dtype="bfloat16", with_mass=False)  # fmt: skip
        jax.effects_barrier()
        tiles = listed[0] if live is None else live // page_size * kv_heads
        return self.num_bytes / (tiles * listed[1])
