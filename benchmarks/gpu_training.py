"""MQAR training on one device: seeds and learning rates in one program beside one after the other."""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.answers import about, kernels, limits_of, say, spread
from kvlab.compose import compose
from kvlab.lab.flops import flops_of
from kvlab.lab.laboratory import Laboratory
from kvlab.random import named_key
from kvlab.training.step import TrainState, TrainStep, init_state
from pallas_kernels.selection import recording


class Amount(NamedTuple):
    """How much is trained: members are seeds times rates; a call is `num_steps` steps; `num_calls` are timed."""

    num_seeds: int
    rates: tuple[float, ...]
    batch_size: int
    length: int
    pairs: int
    num_steps: int
    num_calls: int


AMOUNTS = {
    "full": Amount(8, (0.03, 0.01, 0.003, 0.001), 64, 128, 32, 10, 8),
    "tiny": Amount(2, (0.01, 0.003), 4, 16, 2, 2, 3),
}
SLACK = {"float32": 2e-3, "bfloat16": 5e-2}
"""In nats: how far the losses of one training may be apart that is computed in two ways."""


def laboratory(size: str, seed: int = 0) -> Laboratory:
    """The recall model of `train_step.py`, without its MLP; of the type that this device's kernels read."""
    amount = AMOUNTS[size]
    fields = ["model.num_layers=2", f"task.train=[{amount.length}:{amount.pairs}]", "task.train_weights=[1]"]
    return Laboratory.of(compose([*fields, f"train.batch_size={amount.batch_size}", f"seed={seed}"]))


def stacked(states: list[TrainState]) -> TrainState:
    """Many states as one, with an axis of members in front."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def train(name: str, size: str, scratch: Path) -> None:
    """Steps a second of all members in one program, and of a single one; and whether their losses are the same."""
    amount = AMOUNTS[size]
    labs = [laboratory(size, seed) for seed in range(amount.num_seeds)]
    step_fn, data = labs[0].train_step(), labs[0].task.train_data()
    knobs = jnp.full(amount.num_steps, amount.pairs, jnp.int32)
    members = [(lab, rate) for lab in labs for rate in amount.rates]
    keys = [named_key(lab.config.seed, "train") for lab, _ in members]

    def fresh(index: int) -> TrainState:
        lab, rate = members[index]
        return init_state(jax.tree.map(jnp.copy, lab.model.params), step_fn.optimizer, rate)

    with recording() as taken:
        many = stacked([fresh(index) for index in range(len(members))])
        given = data, jnp.stack(keys), knobs, amount.length, jnp.ones(len(members), jnp.bool_)
        flops = flops_of(type(step_fn).together.trace(step_fn, many, *given).jaxpr) / amount.num_steps
        samples, losses, many = _timed(lambda state: step_fn.together(state, *given), many, amount)
    said = about(
        model=name,
        what=f"MQAR, {len(members)} members of {labs[0].model.num_params} parameters, "
        f"{amount.batch_size} x {amount.length} tokens",
        dtype=labs[0].config.model.dtype,
        **kernels(taken),
    )
    step = statistics.median(samples)
    product = limits_of(scratch).get("product_flops_per_s")
    floor = flops / product if product and flops else None
    vmapped = {
        "step_ms": spread(samples, 1e3),
        "member_steps_per_s": len(members) / step,
        "floor_ms": floor and floor * 1e3,
        "of_floor": floor and floor / step,
    }
    say(**said, vmapped=vmapped)

    alone = [0, len(members) - 1]
    apart, times = 0.0, list[float]()
    for index in alone:
        member_call = partial(_one_call, step_fn, data, keys[index], knobs, amount.length)
        seconds, own, _ = _timed(member_call, fresh(index), amount)
        times += seconds
        apart = max(apart, float(np.abs(own - losses[:, index]).max()))
    each = statistics.median(times)
    one_by_one = {"step_ms": spread(times, 1e3), "member_steps_per_s": 1 / each}
    compared = {"largest_difference_of_losses": apart, "same": apart <= SLACK[labs[0].config.model.dtype]}
    say(**said, vmapped=vmapped, one_by_one=one_by_one, speedup=len(members) * each / step, **compared)


def _one_call(step_fn: TrainStep, data: Any, key: Array, knobs: Array, length: int, state: TrainState) -> Any:
    return step_fn(state, data, key, knobs, length)


def _timed(call: Any, state: TrainState, amount: Amount) -> tuple[list[float], np.ndarray, TrainState]:
    """Seconds a step of every call but the first, which compiles; losses [calls, ..., steps]; and the last state."""
    seconds, losses = [], []
    for _ in range(amount.num_calls + 1):
        began = time.perf_counter()
        state, metrics = call(state)
        losses.append(np.asarray(metrics["loss"]))
        seconds.append((time.perf_counter() - began) / amount.num_steps)
    return seconds[1:], np.stack(losses), state
