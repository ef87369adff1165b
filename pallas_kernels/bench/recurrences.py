"""Problems of recurrences: whole sequences, and one token of each sequence."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.bench.clock import Work
from pallas_kernels.bench.goals import NONE, Goals
from pallas_kernels.linear_scan import linear_scan, linear_scan_step
from pallas_kernels.ops import OPS
from pallas_kernels.ssd import ssd, ssd_step

FAINT = 1e-30
"""Times an output, added to an input: the output is computed, and the input stays."""


@dataclass(frozen=True)
class Recurrence(abc.ABC):
    """One op on states of value_dim x key_dim numbers a head, which are float32."""

    op: ClassVar[str]
    name: str
    batch: int
    num_heads: int
    value_dim: int
    key_dim: int
    num_tokens: int = 1
    goals: Goals = NONE

    @property
    def ops(self) -> tuple[str, ...]:
        """Those of ours that it asks."""
        return (self.op,)

    def floor_us(self, limits: dict[str, float]) -> float:
        """Microseconds."""
        return 1e6 * self.floor_bytes / limits["copy_bytes_per_s"]

    @property
    @abc.abstractmethod
    def floor_bytes(self) -> int:
        """What must move at least."""

    def works(self) -> dict[str, Callable[[], Work]]:
        """Every implementation of the op."""
        return {name: partial(self._work, name) for name in OPS[self.op].implementations}

    def wanted(self) -> Any:
        """What plain XLA answers."""
        work = self._work("reference")
        return jax.jit(work.answer)(work.arrays)

    @abc.abstractmethod
    def _work(self, implementation: str) -> Work: ...


@dataclass(frozen=True)
class OverTokens(Recurrence):
    """Whole sequences."""

    @abc.abstractmethod
    def arrays(self) -> tuple[Array, ...]:
        """What goes in, first an array [B, T, H], which the outputs change from turn to turn."""

    @abc.abstractmethod
    def run(self, implementation: str, *arrays: Array) -> Array:
        """The op's outputs [B, T, H, value_dim]."""

    def _work(self, implementation: str) -> Work:
        first, *rest = self.arrays()

        def turn(number: Array, first: Array, arrays: Any) -> Array:
            del number
            return first + self.run(implementation, first, *arrays[1:]).sum(axis=-1) * FAINT

        return Work(turn, first, (first, *rest), lambda arrays: self.run(implementation, *arrays))


@dataclass(frozen=True)
class OneToken(Recurrence):
    """One token of each sequence; the floor is to read and to write the states."""

    @property
    def floor_bytes(self) -> int:
        return 2 * 4 * self.batch * self.num_heads * self.value_dim * self.key_dim

    @abc.abstractmethod
    def arrays(self) -> tuple[Array, ...]:
        """The states, the values [B, H, value_dim] that go in, and the op's others."""

    @abc.abstractmethod
    def run(self, implementation: str, *arrays: Array) -> tuple[Array, Array]:
        """Outputs and states."""

    def _work(self, implementation: str) -> Work:
        state, values, *rest = self.arrays()

        def turn(number: Array, moving: tuple[Array, Array], arrays: Any) -> tuple[Array, Array]:
            del number
            outputs, state = self.run(implementation, *moving, *arrays[2:])
            return state, moving[1] + outputs * FAINT

        return Work(turn, (state, values), (state, values, *rest), lambda arrays: self.run(implementation, *arrays)[0])


@dataclass(frozen=True)
class Scan(OverTokens):
    """The recurrence of Mamba-2 (arXiv 2405.21060). The floor is to read inputs, b, c and dt, and to write outputs, as
    they would be in 16 bits."""

    op = "ssd"

    @property
    def floor_bytes(self) -> int:
        a_token = 2 * (2 * self.num_heads * self.value_dim + 2 * self.key_dim + self.num_heads)
        return self.batch * self.num_tokens * a_token

    def arrays(self) -> tuple[Array, ...]:
        x, dt, *rest = _mamba((self.batch, self.num_tokens), self)
        return dt, x, *rest

    def run(self, implementation: str, *arrays: Array) -> Array:
        dt, x, rate, b, c = arrays
        return ssd(x, dt, rate, b, c, implementation=implementation)[0]


@dataclass(frozen=True)
class Step(OneToken):
    """One token of that recurrence."""

    op = "ssd_step"

    def arrays(self) -> tuple[Array, ...]:
        return jnp.ones((self.batch, self.num_heads, self.value_dim, self.key_dim)), *_mamba((self.batch,), self)

    def run(self, implementation: str, *arrays: Array) -> tuple[Array, Array]:
        state, x, dt, rate, b, c = arrays
        return ssd_step(x, dt, rate, b, c, state, implementation=implementation)


@dataclass(frozen=True)
class DeltaScan(OverTokens):
    """The gated delta rule (arXiv 2412.06464), a decay a head. The floor is to read queries, keys, values, beta and
    decays, and to write outputs, as they would be in 16 bits."""

    op = "linear_scan"

    @property
    def floor_bytes(self) -> int:
        a_token = 2 * self.num_heads * (2 * self.key_dim + 2 * self.value_dim + 2)
        return self.batch * self.num_tokens * a_token

    def arrays(self) -> tuple[Array, ...]:
        values, beta, *rest = _delta((self.batch, self.num_tokens), self)
        return beta, values, *rest

    def run(self, implementation: str, *arrays: Array) -> Array:
        beta, values, queries, keys, log_decay = arrays
        return linear_scan(queries, keys, values, beta, log_decay, chunk_len=64, implementation=implementation)[0]


@dataclass(frozen=True)
class DeltaStep(OneToken):
    """One token of that recurrence."""

    op = "linear_scan_step"

    def arrays(self) -> tuple[Array, ...]:
        return jnp.ones((self.batch, self.num_heads, self.key_dim, self.value_dim)), *_delta((self.batch,), self)

    def run(self, implementation: str, *arrays: Array) -> tuple[Array, Array]:
        state, values, beta, queries, keys, log_decay = arrays
        return linear_scan_step(queries, keys, values, beta, log_decay, state, implementation=implementation)


def _mamba(leading: tuple[int, ...], shape: Recurrence) -> tuple[Array, ...]:
    """Inputs, dt, decay rates, b and c, in float32 as `ssd` takes them."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (*leading, shape.num_heads, shape.value_dim))
    dt = jax.nn.softplus(jax.random.normal(keys[1], (*leading, shape.num_heads)) - 3)
    b, c = (jax.random.normal(key, (*leading, 1, shape.key_dim)) for key in keys[2:])
    return x, dt, -jnp.linspace(1.0, 16.0, shape.num_heads), b, c


def _delta(leading: tuple[int, ...], shape: Recurrence) -> tuple[Array, ...]:
    """Values, beta, queries, keys of length 1 and log decays, in float32 as `linear_scan` takes them."""
    drawn = jax.random.split(jax.random.key(0), 5)
    values = jax.random.normal(drawn[0], (*leading, shape.num_heads, shape.value_dim))
    queries, keys = (jax.random.normal(key, (*leading, shape.num_heads, shape.key_dim)) for key in drawn[1:3])
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    beta = jax.nn.sigmoid(jax.random.normal(drawn[3], values.shape[:-1]))
    log_decay = -jax.nn.softplus(jax.random.normal(drawn[4], (*values.shape[:-1], 1)) - 3)
    return values, beta, queries * shape.key_dim**-0.5, keys, log_decay
