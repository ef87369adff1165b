"""A stopwatch for one call of anything, inside a program of many; and what the device could do at best."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LOOP_SECONDS = 0.01
"""Least time of the loop that `device_us` is taken from, so that starting it does not count."""


@dataclass(frozen=True)
class Work:
    """What somebody does in one call. `turn(number, state)` is call `number`, and needs the state that the call before left, so that
    none begins before it; `answer()` is what a first call says, to be compared. With a runtime of its own it is not jax's."""

    turn: Callable[[Any, Any], Any]
    state: Any
    answer: Callable[[], Any]
    own_runtime: bool = False


class Clock:
    """Times one piece of work: compiled first, then asked for a sample at a time, in turns with others."""

    def __init__(self, work: Work):
        self.own_runtime, self.turn = work.own_runtime, work.turn
        self.device_us, self.wall_us, self.count = list[float](), list[float](), 1
        self.state = work.state
        if self.own_runtime:
            self.once = work.turn
        else:
            self.state = jax.tree.map(
                jnp.copy, work.state
            )  # given away, call by call: a pool is not copied to be written
            self.once = jax.jit(work.turn, donate_argnums=1)
            self.many = jax.jit(lambda count, state: lax.fori_loop(0, count, work.turn, state), donate_argnums=1)
            while self._loop() < LOOP_SECONDS and self.count < 1024:
                self.count *= 2
        self.sample()  # the first of each kind compiles, or finds what was compiled
        self.device_us.clear()
        self.wall_us.clear()

    @property
    def median_us(self) -> float:
        """Microseconds of a call inside a program of many."""
        return statistics.median(self.device_us)

    def _timed(self, run: Callable[..., Any], number: int) -> float:
        given = number if self.own_runtime else jax.block_until_ready(jnp.int32(number))
        began = time.perf_counter()
        found = run(given, self.state)
        jax.block_until_ready(found)
        taken = time.perf_counter() - began
        self.state = self.state if self.own_runtime else found
        return taken

    def _loop(self) -> float:
        return self._timed(self.many, self.count)

    def sample(self) -> None:
        """One measurement of each kind."""
        self.wall_us.append(self._timed(self.once, 1) * 1e6)
        self.device_us.append(self.wall_us[-1] if self.own_runtime else self._loop() / self.count * 1e6)


def is_accelerated() -> bool:
    """Whether the process' first device is none of the host's."""
    return jax.devices()[0].platform != "cpu"


def ceilings(size: str) -> dict[str, float]:
    """Bytes a second of copying and of reading, and FLOP/s of a product in bfloat16, as this device does them."""
    length, side = (1 << 29, 8192) if size == "full" else (1 << 20, 256)
    big = jnp.ones(length, jnp.bfloat16)
    square = jnp.ones((side, side), jnp.bfloat16)
    copy, read = jax.jit(lambda x: x + 1), jax.jit(lambda x: x.astype(jnp.float32).sum())
    product = jax.jit(lambda x: x @ x)
    works = {
        "copy_bytes_per_s": (partial(copy, big), 2 * big.nbytes),
        "read_bytes_per_s": (partial(read, big), big.nbytes),
        "product_flops_per_s": (partial(product, square), 2 * side**3),
    }

    def seconds(run: Callable[[], Any]) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - began

    return {
        name: work / statistics.median([seconds(run) for _ in range(12)][2:]) for name, (run, work) in works.items()
    }
