"""Problems beside attention over pages: writing into them, two launches in one step, and recurrences."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.bench import paged
from pallas_kernels.bench.clock import Work
from pallas_kernels.bench.goals import NONE, Goals
from pallas_kernels.formats import Pages, arrays_of, quantised
from pallas_kernels.kv_write import api as write_api
from pallas_kernels.kv_write import kv_write
from pallas_kernels.selection import Asked
from pallas_kernels.ssd import api as ssd_api
from pallas_kernels.ssd import ssd, ssd_step


@dataclass(frozen=True)
class Write:
    """Whole pages of new tokens, in random order, into pools eight times as large. The floor is to read the tokens in 16 bits, and to
    write what they become."""

    name: str
    num_tokens: int = 8192
    num_kv_heads: int = 8
    dim: int = 128
    page_size: int = 64
    format: str = "bfloat16"
    goals: Goals = NONE

    oracle = "reference"

    def floor_us(self, limits: dict[str, float]) -> float:
        """Microseconds."""
        a_token = 2 * self.dim * 2 + paged.bytes_of(2 * self.dim, self.format)
        return 1e6 * self.num_tokens * self.num_kv_heads * a_token / limits["copy_bytes_per_s"]

    def works(self, *, alone: bool = False) -> dict[str, Callable[[], Work]]:
        """Every implementation that can write such pages."""
        refused = write_api.refusals(Asked(self.format, self.page_size, (self.dim, self.dim)))
        names = [name for name in write_api.IMPLEMENTATIONS if name not in refused]
        return {name: partial(self._work, name) for name in (names[:1] if alone else names)}

    def _work(self, implementation: str) -> Work:
        num_pages, size = 8 * self.num_tokens // self.page_size + 1, self.page_size
        order = np.random.default_rng(0).permutation(np.arange(1, num_pages))[: self.num_tokens // size]
        slots = jnp.asarray((order[:, None] * size + np.arange(size)[None]).reshape(1, -1), jnp.int32)
        shape = 1, self.num_tokens, self.num_kv_heads, self.dim
        tokens = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        empty = jnp.zeros((num_pages, self.num_kv_heads, size, self.dim), jnp.bfloat16)
        pool = empty if self.format == "bfloat16" else quantised(empty, self.format)

        def turn(number: Array, pools: tuple[Pages, Pages]) -> tuple[Pages, Pages]:
            moved = (slots - size + number * self.num_tokens) % ((num_pages - 1) * size) + size
            return kv_write(*pools, tokens, tokens, moved, implementation=implementation)

        def first() -> Array:
            found = arrays_of(jax.jit(turn)(jnp.int32(0), (pool, pool))[0])[0][order]
            return jax.lax.bitcast_convert_type(found, jnp.uint8) if self.format == "fp8" else found

        return Work(turn, (pool, pool), first)


@dataclass(frozen=True)
class Mixed:
    """A chunk and decodes in one program, two launches: beside both of them alone, which are problems of their own."""

    name: str
    chunk: paged.Problem
    decodes: paged.Problem
    goals: Goals = NONE

    oracle = "None"  # both parts were compared before

    def floor_us(self, limits: dict[str, float]) -> float:
        """Microseconds, one after the other."""
        return self.chunk.floor_us(limits) + self.decodes.floor_us(limits)

    def works(self, *, alone: bool = False) -> dict[str, Callable[[], Work]]:
        """By what `None` takes."""
        del alone

        def make() -> Work:
            (chunk, of_chunk), (decodes, of_decodes) = (
                (paged.ours(one, inputs, None), inputs)
                for one in (self.chunk, self.decodes)
                for inputs in (paged.make_inputs(one),)
            )

            def both(queries: Array, table: Array, starts: Array) -> Array:
                # Other queries in every call, or the compiler would decode once for all of them.
                others = of_decodes.queries + (queries.sum() * 1e-30).astype(queries.dtype)
                decoded = decodes(others, of_decodes.tables[0], of_decodes.starts[0])
                return chunk(queries, table, starts) + (decoded.sum() * 1e-30).astype(queries.dtype)

            return paged.work_of(lambda: both, of_chunk)

        return {"None": make}


@dataclass(frozen=True)
class Scan:
    """The recurrence of Mamba-2 over whole sequences (arXiv 2405.21060). The floor is to read inputs, b, c and dt, and to write outputs,
    as they would be in 16 bits."""

    name: str
    batch: int = 4
    num_tokens: int = 4096
    num_heads: int = 128
    head_dim: int = 64
    state_dim: int = 128
    goals: Goals = NONE

    oracle = "reference"

    def floor_us(self, limits: dict[str, float]) -> float:
        """Microseconds."""
        a_token = 2 * (2 * self.num_heads * self.head_dim + 2 * self.state_dim + self.num_heads)
        return 1e6 * self.batch * self.num_tokens * a_token / limits["copy_bytes_per_s"]

    def works(self, *, alone: bool = False) -> dict[str, Callable[[], Work]]:
        """Every implementation of `ssd`."""
        del alone
        return {name: partial(self._work, name) for name in ssd_api.IMPLEMENTATIONS}

    def _work(self, implementation: str) -> Work:
        x, dt, rate, b, c = _recurrence((self.batch, self.num_tokens), self.num_heads, self.head_dim, self.state_dim)
        run = partial(ssd, decay_rate=rate, b=b, c=c, implementation=implementation)

        def turn(number: Array, dt: Array) -> Array:
            del number
            return dt + run(x, dt)[0].sum(axis=-1) * 1e-30

        return Work(turn, dt, lambda: jax.jit(run)(x, dt)[0])


@dataclass(frozen=True)
class Step:
    """One token of that recurrence for each sequence: the floor is to read and to write the states."""

    name: str
    batch: int = 64
    num_heads: int = 128
    head_dim: int = 64
    state_dim: int = 128
    goals: Goals = NONE

    oracle = "reference"

    def floor_us(self, limits: dict[str, float]) -> float:
        """Microseconds."""
        state = self.batch * self.num_heads * self.head_dim * self.state_dim * 4
        return 1e6 * 2 * state / limits["copy_bytes_per_s"]

    def works(self, *, alone: bool = False) -> dict[str, Callable[[], Work]]:
        """Every implementation of `ssd_step`."""
        del alone
        return {name: partial(self._work, name) for name in ssd_api.STEP_IMPLEMENTATIONS}

    def _work(self, implementation: str) -> Work:
        x, dt, rate, b, c = _recurrence((self.batch,), self.num_heads, self.head_dim, self.state_dim)
        state = jnp.ones((self.batch, self.num_heads, self.head_dim, self.state_dim))

        def turn(number: Array, state_and_input: tuple[Array, Array]) -> tuple[Array, Array]:
            del number
            state, x = state_and_input
            outputs, state = ssd_step(x, dt, rate, b, c, state, implementation=implementation)
            return state, x + outputs * 1e-30  # outputs are asked for as well

        return Work(turn, (state, x), lambda: jax.jit(turn)(0, (state, x))[0])


def _recurrence(leading: tuple[int, ...], num_heads: int, head_dim: int, state_dim: int) -> tuple[Array, ...]:
    """Inputs, dt, decay rates, b and c, in float32 as `ssd` takes them."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (*leading, num_heads, head_dim))
    dt = jax.nn.softplus(jax.random.normal(keys[1], (*leading, num_heads)) - 3)
    b, c = (jax.random.normal(key, (*leading, 1, state_dim)) for key in keys[2:])
    return x, dt, -jnp.linspace(1.0, 16.0, num_heads), b, c
