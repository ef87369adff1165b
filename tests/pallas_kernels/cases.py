"""How many of the generated cases run when, and a ledger of what kernels fetch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

NUM_CASES = 200


def numbers(num_fast: int) -> list:
    """Of all generated cases, the first few with the named ones and the rest marked `generated`."""
    cases = range(NUM_CASES)
    return [pytest.param(number, marks=() if number < num_fast else pytest.mark.generated) for number in cases]


def named(cases: dict[str, Any], *slow: str) -> Any:
    """A parametrisation over named cases, of which those named here are slow."""
    assert not set(slow) - set(cases), "no such cases"
    marks = {name: pytest.mark.slow if name in slow else () for name in cases}
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=name, marks=marks[name]) for name, case in cases.items()]
    )


LEDGER_CASES = {
    "ragged": ({"lengths": [320, 64, 16, 0]}, 320 + 64 + 16),
    "a window of 128 with sinks": ({"lengths": [320, 64], "window": 128, "sinks": 4}, 128 + 16 + 64),
    "chunks of 320": ({"lengths": [640, 321, 320], "chunk": 320}, 320 + 16 + 320),
    "lists of each head": ({"lengths": [320, 256], "lists": "heads"}, None),
    "int8": ({"lengths": [640, 64, 32, 0], "format": "int8", "page_size": 32}, 640 + 64 + 32),
    "int4 by channel": ({"lengths": [960, 64], "format": "int4", "per": "channel", "page_size": 32}, 960 + 64),
    "KIVI": ({"lengths": [960, 64], "schemes": ("int4", "int2"), "page_size": 64}, 960 + 64),
}
"""Cases in pages of 16, where they name no other, and the tokens of the pages that somebody sees."""


CHUNK_CASES = {
    "one tile": {"lengths": [640, 256], "num_queries": 32, "group": 2},
    "several tiles": {"lengths": [320, 130], "num_queries": 128, "group": 2},
    "a window": {"lengths": [640, 70], "num_queries": 128, "group": 2, "window": 100},
    "int8": {"lengths": [640, 64], "num_queries": 64, "group": 1, "format": "int8", "page_size": 32},
}
"""Chunks over pages of 16, where they name no other: 2 KV heads of 64 dims."""


def pages_of_tiles(case: dict[str, Any], tile_len: int) -> int:
    """The pages in which some query of a tile of `tile_len` sees something, over all tiles and both KV heads, by brute
    force."""
    page_size, window, found = case.get("page_size", 16), case.get("window"), 0
    for length in case["lengths"]:
        first = max(length - case["num_queries"], 0)
        for begin in range(first, length, tile_len):
            tile = range(begin, min(begin + tile_len, length))
            seen = {p // page_size for q in tile for p in range(0 if window is None else max(0, q - window + 1), q + 1)}
            found += len(seen)
    return 2 * found


class Fetched:
    """Counts the bytes of copies as the simulator runs them."""

    num_bytes = 0

    def count(self, target: Any) -> None:
        """To be called in the kernel where a copy into `target` starts."""
        size = int(jnp.dtype(target.dtype).itemsize)
        for dim in target.shape:
            size *= dim
        jax.debug.callback(self._add, size)

    def count_copies(self, monkeypatch: Any) -> None:
        """Counts the copies that TPU kernels start."""
        real, count = pltpu.make_async_copy, self.count

        class Counted:
            def __init__(self, source: Any, target: Any, semaphore: Any):
                self.copy, self.target = real(source, target, semaphore), target
                self.wait = self.copy.wait

            def start(self) -> None:
                count(self.target)
                self.copy.start()

        monkeypatch.setattr(pltpu, "make_async_copy", Counted)

    def count_loads(self, monkeypatch: Any) -> None:
        """Counts the copies into shared memory that GPU kernels start."""
        real = plgpu.copy_gmem_to_smem

        def counted(source: Any, target: Any, barrier: Any) -> None:
            self.count(target)
            real(source, target, barrier)

        monkeypatch.setattr(plgpu, "copy_gmem_to_smem", counted)

    def count_stores(self, monkeypatch: Any) -> None:
        """Counts the copies out of shared memory that GPU kernels start."""
        real = plgpu.copy_smem_to_gmem

        def counted(source: Any, target: Any) -> None:
            self.count(target)
            real(source, target)

        monkeypatch.setattr(plgpu, "copy_smem_to_gmem", counted)

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

    def of_chunk(self, check: Callable, kernel: Callable, case: dict[str, Any], tile_len: int) -> int:
        """The bytes that a chunk fetches beside the live pages of every tile of its queries once."""
        case = {"page_size": 16, **case}
        check(kernel, **case, prefill=True, dims=(64, 64), dtype="bfloat16", with_mass=False)
        jax.effects_barrier()
        a_token = 2 * (64 + 4) if "format" in case else 2 * 64 * 2
        return self.num_bytes - pages_of_tiles(case, tile_len) * case["page_size"] * a_token

    def of(self, check: Callable, kernel: Callable, case: str) -> float:
        """The bytes that a case fetches, over those of its live pages once."""
        asked, live = LEDGER_CASES[case]
        asked = {"page_size": 16, **asked}
        page_size, kv_heads, dim, listed, of_tile = asked["page_size"], 2, 64, [], []

        def listening(*arrays: Any, **options: Any) -> Any:
            _, pages, lists, *_ = arrays
            jax.debug.callback(lambda starts: listed.append(int((starts < 2**30).sum())), lists.starts)
            of_tile.append(pages.num_bytes // (pages.num_pages * pages.num_kv_heads))
            return kernel(*arrays, **options)

        sizes = {"num_queries": 1, "group": 4, "kv_heads": kv_heads, "dims": (dim, dim)}
        check(listening, **asked, **sizes, dtype="bfloat16", with_mass=False)
        jax.effects_barrier()
        tiles = listed[0] if live is None else live // page_size * kv_heads
        return self.num_bytes / (tiles * of_tile[0])


def on_tpu(mode: str = "eager") -> pltpu.InterpretParams:
    """The simulator of TPUs, with all that it can see; of `mode` "on_wait" copies arrive when they are waited for."""
    return pltpu.InterpretParams(
        detect_races=True, dma_execution_mode=mode, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
