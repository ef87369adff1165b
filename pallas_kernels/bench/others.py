"""Problems beside attention over pages: writing into them, and two launches in one step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.bench import inputs, paged
from pallas_kernels.bench.clock import Work
from pallas_kernels.bench.goals import NONE, Goals
from pallas_kernels.formats import quantised
from pallas_kernels.kv_write import kv_write
from pallas_kernels.ops import OPS
from pallas_kernels.pages import Pages
from pallas_kernels.selection import Asked

SETS = 4
"""Of tokens to write, one after the other in a turn: more than a second-level cache holds."""


@dataclass(frozen=True)
class Write:
    """Whole pages of new tokens, in random order, into pools eight times as large. The floor is to read the tokens in
    16 bits, and to write what they become."""

    name: str
    num_tokens: int = 8192
    num_kv_heads: int = 8
    dim: int = 128
    page_size: int = 64
    format: str = "bfloat16"
    goals: Goals = NONE

    @property
    def ops(self) -> tuple[str, ...]:
        """Those of ours that it asks."""
        return ("kv_write",)

    def floor_us(self, limits: dict[str, float]) -> float:
        """Microseconds."""
        a_token = 2 * self.dim * 2 + inputs.bytes_of(2 * self.dim, self.format)
        return 1e6 * self.num_tokens * self.num_kv_heads * a_token / limits["copy_bytes_per_s"]

    def works(self) -> dict[str, Callable[[], Work]]:
        """Every implementation that can write such pages."""
        pages, _, _ = self._inputs()
        names = OPS["kv_write"].available(Asked.of(pages, 1, jnp.bfloat16))
        return {name: partial(self._work, name) for name in names}

    def wanted(self) -> Any:
        """What XLA's scatter leaves."""
        work = self._work("reference")
        return jax.jit(work.answer)(work.arrays)

    def _inputs(self) -> tuple[Pages, Array, list[tuple[Array, Array]]]:
        num_pages, size = 8 * self.num_tokens // self.page_size + 1, self.page_size
        order = np.random.default_rng(0).permutation(np.arange(1, num_pages))[: self.num_tokens // size]
        slots = jnp.asarray((order[:, None] * size + np.arange(size)[None]).reshape(1, -1), jnp.int32)
        shape = 1, self.num_tokens, self.num_kv_heads, self.dim
        keys = jax.random.split(jax.random.key(0), 2 * SETS)
        tokens = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
        empty = jnp.zeros((num_pages, self.num_kv_heads, size, self.dim), jnp.bfloat16)
        keys_stored, values_stored = (
            empty if self.format == "bfloat16" else quantised(empty, self.format) for _ in range(2)
        )
        return Pages(keys_stored, values_stored), slots, list(zip(tokens[::2], tokens[1::2], strict=True))

    def _work(self, implementation: str) -> Work:
        pages, slots, sets = self._inputs()
        size, num_slots = self.page_size, pages.num_pages * self.page_size

        def turn(number: Array, pages: Pages, arrays: Any) -> Pages:
            slots, sets = arrays
            for which, (keys, values) in enumerate(sets):
                moved = (slots - size + (SETS * number + which) * self.num_tokens) % (num_slots - size) + size
                pages = kv_write(pages, keys, values, moved, implementation=implementation)
            return pages

        def answer(arrays: Any) -> Array:
            empty = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), pages)
            return _joined(*jax.tree.leaves(turn(jnp.int32(0), empty, arrays)))

        return Work(turn, pages, (slots, sets), answer, num_calls=SETS)


@dataclass(frozen=True)
class Mixed:
    """A chunk and decodes in one program, two launches: beside both of them alone, which are problems of their own."""

    name: str
    chunk: paged.Problem
    decodes: paged.Problem
    goals: Goals = NONE

    @property
    def ops(self) -> tuple[str, ...]:
        """Those of ours that it asks."""
        return self.chunk.ops + self.decodes.ops

    def floor_us(self, limits: dict[str, float]) -> float:
        """Microseconds, one after the other."""
        return self.chunk.floor_us(limits) + self.decodes.floor_us(limits)

    def wanted(self) -> Any:
        """The answers of both, one behind the other."""
        return _joined(self.chunk.wanted(), self.decodes.wanted())

    def works(self) -> dict[str, Callable[[], Work]]:
        """By what `None` takes."""

        def make() -> Work:
            made = inputs.make_inputs(self.chunk), inputs.make_inputs(self.decodes)
            chunk, decodes = (
                paged.work_of(paged.ours(problem, mine, None), mine)
                for problem, mine in zip((self.chunk, self.decodes), made, strict=True)
            )

            def turn(number: Array, state: tuple[Array, Array], arrays: Any) -> tuple[Array, Array]:
                return chunk.turn(number, state[0], arrays[0]), decodes.turn(number, state[1], arrays[1])

            def answer(arrays: Any) -> Array:
                return _joined(chunk.answer(arrays[0]), decodes.answer(arrays[1]))

            return Work(turn, (chunk.state, decodes.state), (chunk.arrays, decodes.arrays), answer)

        return {"None": make}


def _joined(*answers: Array) -> Array:
    return jnp.concatenate([answer.astype(jnp.float32).reshape(-1) for answer in answers])
