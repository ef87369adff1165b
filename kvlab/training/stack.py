"""Where the arrays of trials lie while they are trained: those of one as they are, those of several stacked, with an
axis of trials in front, and moved by one program."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvlab.random import named_key
from kvlab.training.config import TrainConfig
from kvlab.training.step import TrainState, TrainStep, init_state
from kvlab.typing import Params, PyTree

ROOM = 0.8
"""Of a device's memory, what a stack and its program may take."""


class Alone:
    """The arrays of a single trial, as a stack has those of several."""

    def __init__(self, step_fn: TrainStep, data: PyTree, seed: int, state: TrainState):
        self.step_fn, self.data, self.key, self._state = step_fn, data, named_key(seed, "train"), state

    def call(self, moving: Sequence[int], knobs: list[int], seq_len: int) -> list[dict[str, np.ndarray]]:
        """A device call; the metrics of the trial."""
        traced = jnp.asarray(knobs, jnp.int32)
        self._state, metrics = self.step_fn(self._state, self.data, self.key, traced, seq_len)
        return [jax.device_get(metrics)]

    def state(self, place: int) -> TrainState:
        """The arrays, until the next call."""
        return self._state

    def keep(self, places: Sequence[int]) -> None:
        """Nothing: there is but one."""


class Programs:
    """The compiled calls of stacks by number of trials and sequence length, each compiled once."""

    def __init__(self, step_fn: TrainStep, data: PyTree, num_steps: int):
        self.step_fn, self.data, self.num_steps = step_fn, data, num_steps
        self._compiled: dict[tuple[int, int], Any] = {}

    @classmethod
    def of_task(cls, step_fn: TrainStep, config: TrainConfig) -> "Programs":
        """Those of a step, on the data of its task."""
        return cls(step_fn, step_fn.placement.put(step_fn.task.train_data(), ""), config.steps_per_call)

    def of(self, like: TrainState, num_trials: int, seq_len: int) -> Any:
        """The call `(states, data, keys, knobs, moves)` of `num_trials` trials, each with arrays `like` these. It gives
        the states away."""
        if (num_trials, seq_len) not in self._compiled:
            add_axis = partial(_with_axis, num_trials)
            states = jax.tree.map(add_axis, like)
            keys = add_axis(jax.eval_shape(lambda: jax.random.key(0)))
            knobs = jax.ShapeDtypeStruct((self.num_steps,), jnp.int32)
            moves = jax.ShapeDtypeStruct((num_trials,), jnp.bool_)
            together = type(self.step_fn).together
            lowered = together.lower(self.step_fn, states, self.data, keys, knobs, seq_len, moves)
            self._compiled[num_trials, seq_len] = lowered.compile()
        return self._compiled[num_trials, seq_len]

    def num_fitting(self, params: Params, wanted: int, room_bytes: int) -> int:
        """How many trials with such parameters, at most `wanted`, fit: the program of the longest sequences, by the
        compiler's account, and the states once more, as they are stacked."""
        like = jax.eval_shape(lambda: init_state(params, self.step_fn.optimizer, 1.0))
        seq_len, num_trials = max(self.step_fn.task.train_shapes()), wanted
        while num_trials > 1:
            analysis = self.of(like, num_trials, seq_len).memory_analysis()
            needed = 2 * analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
            if needed <= room_bytes:
                break
            num_trials = max(1, min(num_trials - 1, int(num_trials * room_bytes / needed)))
        return num_trials


class Stack:
    """The arrays of several trials, which are given to it. Once at most half of them move, the others are dropped, and
    a smaller program is compiled."""

    def __init__(self, programs: Programs, seeds: Sequence[int], states: Sequence[TrainState]):
        self.programs = programs
        self._rows = {place: place for place in range(len(states))}
        self._keys = jnp.stack([named_key(seed, "train") for seed in seeds])
        self._like = jax.eval_shape(lambda: states[0])
        self._states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        for leaf in jax.tree.leaves(list(states)):  # given away, as to a call
            leaf.delete()

    def call(self, moving: Sequence[int], knobs: list[int], seq_len: int) -> list[dict[str, np.ndarray]]:
        """A device call of the trials at these places, the others stay as they are; the metrics of each."""
        moves = np.zeros(len(self._rows), np.bool_)
        moves[[self._rows[place] for place in moving]] = True
        program = self.programs.of(self._like, len(self._rows), seq_len)
        given = self.programs.data, self._keys, jnp.asarray(knobs, jnp.int32), jnp.asarray(moves)
        self._states, metrics = program(self._states, *given)
        found = jax.device_get(metrics)
        return [{name: values[self._rows[place]] for name, values in found.items()} for place in moving]

    def state(self, place: int) -> TrainState:
        """A copy of the arrays of one of them."""
        row = self._rows[place]
        return jax.tree.map(lambda leaf: leaf[row], self._states)

    def keep(self, places: Sequence[int]) -> None:
        """Only these will move from now on."""
        if places and 2 * len(places) <= len(self._rows):
            rows = jnp.asarray([self._rows[place] for place in places])
            self._states, self._keys = jax.tree.map(lambda leaf: leaf[rows], (self._states, self._keys))
            self._rows = {place: row for row, place in enumerate(places)}


def _with_axis(num_trials: int, leaf: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num_trials, *leaf.shape), leaf.dtype)


def room_bytes() -> int:
    """Memory of this process' device that a stack may take."""
    stats = jax.devices()[0].memory_stats() or {}
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(ROOM * stats.get("bytes_limit", whole))
