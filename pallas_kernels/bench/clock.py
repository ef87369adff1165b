"""A stopwatch for one call of anything, inside a program of many; and what the device could do at best."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LOOP_SECONDS = 0.02
"""What a program of many calls is to take at least, so that starting it does not count."""
MOST_CALLS = 1024


@dataclass(frozen=True)
class Work:
    """What somebody does in one turn. `turn(number, state, arrays)` is turn `number`, and needs the state that the turn
    before left, so that none begins before it; `answer(arrays)` is what is compared. Both are compiled, and whatever
    they read is in `arrays`: what they closed over would be a constant, which compilers take minutes to copy and
    compute with beforehand."""

    turn: Callable[[Any, Any, Any], Any]
    state: Any
    arrays: Any
    answer: Callable[[Any], Any]
    num_calls: int = 1
    """In a turn."""
    wait: Callable[[], None] | None = None
    """Until all is done, for a runtime that is not jax's: then nothing is compiled here."""


class Clock:
    """Times one piece of work: compiled first, then asked for a sample at a time, in turns with others."""

    def __init__(self, work: Work):
        self.work, self.num_turns = work, 1
        self.device_us, self.wall_us = list[float](), list[float]()
        if work.wait is None:
            self.state = jax.tree.map(jnp.copy, work.state)  # given away turn by turn: no pool is copied to be written
            self._once = jax.jit(work.turn, donate_argnums=1)
            self._one_turn()  # compiles
        seconds = min(self._one_turn() for _ in range(2))
        self.num_turns = max(1, min(MOST_CALLS, 2 ** math.ceil(math.log2(max(LOOP_SECONDS / seconds, 1)))))
        if work.wait is None:
            # Of a known number of turns: else the host asks the device after each whether it was the last.
            many = lambda state, arrays: lax.fori_loop(  # noqa: E731
                0, self.num_turns, lambda number, state: work.turn(number, state, arrays), state
            )
            self._many = jax.jit(many, donate_argnums=0)
            self._all_turns()  # compiles

    @property
    def median_us(self) -> float:
        """Microseconds of a call inside a program of many."""
        return statistics.median(self.device_us)

    def sample(self) -> None:
        """One measurement of each kind."""
        self.wall_us.append(self._one_turn() / self.work.num_calls * 1e6)
        self.device_us.append(self._all_turns() / self.num_turns / self.work.num_calls * 1e6)

    def _one_turn(self) -> float:
        if self.work.wait is not None:
            return self._of_another_runtime(1)
        number = jax.block_until_ready(jnp.int32(1))
        began = time.perf_counter()
        self.state = jax.block_until_ready(self._once(number, self.state, self.work.arrays))
        return time.perf_counter() - began

    def _all_turns(self) -> float:
        if self.work.wait is not None:
            return self._of_another_runtime(self.num_turns)
        began = time.perf_counter()
        self.state = jax.block_until_ready(self._many(self.state, self.work.arrays))
        return time.perf_counter() - began

    def _of_another_runtime(self, num_turns: int) -> float:
        assert self.work.wait is not None
        began = time.perf_counter()
        for number in range(num_turns):
            self.work.turn(number, self.work.state, self.work.arrays)
        self.work.wait()
        return time.perf_counter() - began


def is_accelerated() -> bool:
    """Whether the process' first device is none of the host's."""
    return jax.devices()[0].platform != "cpu"


def ceilings(size: str) -> Iterator[dict[str, float]]:
    """Bytes a second of copying and of reading, and FLOP/s of a product in bfloat16, as this device does them: what is
    known, after each."""
    length, side = (1 << 29, 8192) if size == "full" else (1 << 20, 256)
    big = jnp.ones(length, jnp.bfloat16)
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    factor = (square.astype(jnp.float32) / math.sqrt(side)).astype(jnp.bfloat16)  # products stay of one size

    def read(number: Any, total: Any, big: Any) -> Any:
        del number
        return total + 1e-30 * (big.astype(jnp.float32) + total).sum()

    works = {
        "copy_bytes_per_s": (2 * big.nbytes, lambda number, x, _: x + 1, big, ()),
        "read_bytes_per_s": (big.nbytes, read, jnp.float32(0), big),
        "product_flops_per_s": (2 * side**3, lambda number, x, factor: x @ factor, square, factor),
    }
    found: dict[str, float] = {}
    for name, (amount, turn, state, arrays) in works.items():
        clock = Clock(Work(turn, state, arrays, lambda arrays: None))
        for _ in range(9):
            clock.sample()
        found[name] = amount / clock.median_us * 1e6
        yield found
