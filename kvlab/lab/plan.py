"""The dry run: what a config would train, hold and cost, before anything is trained."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from kvlab.config import Config
from kvlab.engine.step import MemoryStep
from kvlab.evaluation.measure import Observed, read_bytes_per_token
from kvlab.lab.flops import flops_of
from kvlab.lab.kernels import Chosen, chosen_kernels
from kvlab.lab.laboratory import Laboratory
from kvlab.ledger.classes import Lengths
from kvlab.ledger.growth import shorten
from kvlab.ledger.ledger import Ledger
from kvlab.memory.budgets import Context
from kvlab.memory.formats import skipped
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.pools import num_bytes
from kvlab.training.step import init_state
from kvlab.units import UNTIMED, human_bytes

MAX_REASON = 1500
"""Characters of an error that a record tells."""


@dataclass(frozen=True)
class Plan:
    """Predicted bytes by component, and FLOPs of the whole training.

    activations: temporaries of the compiled training call; state: the pools of the measured memory; temporaries: those
    of a compiled decode step. All are the compiler's figures on this machine's backend, not a formula. train_flops:
    every step of every loop, as this machine would run them (`flops_of`). kernels: what
    each op takes on the named hardware.

    held_bytes: pages that a sequence holds at the measured context; peak_bytes: the most that the batch holds on the
    way, divided by its sequences, prompts coming one after the other where they are compressed; read_bytes_per_token:
    what decoding one more token of a sequence reads of its memory. They are the ledger's, run without a device, and
    what a record of the run will say.
    skipped: states that format or compression leave as they are, by "layer.name", with the reason.
    """

    num_params: int
    weights_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    state_bytes: int
    temporaries_bytes: int
    train_flops: float
    hardware: str
    hardware_bytes: int
    kernels: dict[str, Chosen]
    held_bytes: int
    peak_bytes: float
    read_bytes_per_token: int
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def train_bytes(self) -> int:
        """What training needs at once."""
        return self.weights_bytes + self.optimizer_bytes + self.activations_bytes

    @property
    def decode_bytes(self) -> int:
        """What decoding needs at once."""
        return self.weights_bytes + self.state_bytes + self.temporaries_bytes

    @property
    def fits(self) -> bool:
        """Whether both fit the named hardware."""
        return max(self.train_bytes, self.decode_bytes) <= self.hardware_bytes


def predict(lab: Laboratory) -> Plan:
    """Compiles the training call (every sequence length) and the decode step of a config, and reads off their bytes."""
    config = lab.config
    step_fn = lab.train_step()
    state = jax.eval_shape(lambda params: init_state(params, step_fn.optimizer, 1.0), lab.model.params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    data = jax.eval_shape(lab.task.train_data)
    num_steps = config.train.steps_per_call
    knobs = jax.ShapeDtypeStruct((num_steps,), jnp.int32)
    activations, call_flops = 0, {}
    for seq_len in lab.task.train_shapes():
        traced = type(step_fn).__call__.trace(step_fn, state, data, key, knobs, seq_len)
        activations = max(activations, _temp_bytes(traced.lower().compile()))
        call_flops[seq_len] = flops_of(traced.jaxpr)
    num_calls = config.train.num_steps // num_steps
    flops = sum(call_flops[lab.task.train_call(call, num_steps)[0]] for call in range(num_calls))
    context, batch_size = config.context, config.measure.batch_size
    layout = lab.layout(context.context_len, batch_size, prompt_len=context.prompt_len)
    ledger, peak_bytes = filled(layout, context)
    seen = Observed(layout, ledger.audit(), None, UNTIMED, UNTIMED, ledger, None)
    step = MemoryStep.of(lab.model.structure, layout)
    decode = step.compiled(lab.model.params, jax.eval_shape(layout.allocate), 1)
    weights = num_bytes(lab.model.params)
    return Plan(
        num_params=lab.model.num_params,
        weights_bytes=weights,
        optimizer_bytes=num_bytes(state) - weights,
        activations_bytes=activations,
        state_bytes=layout.pool_bytes,
        temporaries_bytes=_temp_bytes(decode),
        train_flops=flops * max(1, len(config.tune.learning_rate)),
        hardware=config.hardware.label,
        hardware_bytes=config.hardware.memory_bytes(),
        kernels=chosen_kernels(lab, config.hardware.device),
        held_bytes=sum(account.allocated for account in seen.accounts) // batch_size,
        peak_bytes=peak_bytes / batch_size,
        read_bytes_per_token=read_bytes_per_token(seen),
        skipped=skipped(lab.model.states, config.memory),
    )


def filled(layout: MemoryLayout, context: Context) -> tuple[Ledger, int]:
    """A ledger whose sequences are filled as a measurement fills them, without a device, and the most bytes held."""
    ledger, rows = layout.ledger(), range(layout.max_sequences)
    for group in [[row] for row in rows] if layout.compresses else [list(rows)]:
        for start in range(0, context.prompt_len, layout.chunk_len):
            _advance(ledger, group, min(layout.chunk_len, context.prompt_len - start), start, context)
    for place in range(context.prompt_len, context.context_len):
        _advance(ledger, rows, 1, place, context)
    return ledger, ledger.counters.peak_bytes


def _advance(ledger: Ledger, rows: Iterable[int], count: int, start: int, context: Context) -> None:
    """One step of these sequences, and whatever is due after it."""
    lengths = None if start else Lengths(context.prompt_len, context.prompt_len)
    if not all(ledger.reserve(row, count, lengths=lengths).ready for row in rows):
        raise AssertionError("a layout holds what it is laid out for")
    for row in rows:
        ledger.commit(row, count)
    if not all(shorten(ledger, row) for row in rows):
        raise AssertionError("a layout has room for what its sequences are shortened to")


def _temp_bytes(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def explain_out_of_memory(config: Config) -> str:
    """Names the largest component by bytes and one change with its saving."""
    plan = predict(Laboratory.of(config, abstract=True))
    parts = {
        f"activations (train.batch_size = {config.train.batch_size})": (plan.activations_bytes, "train.accumulation"),
        f"state (measure.batch_size = {config.measure.batch_size})": (plan.state_bytes, "measure.batch_size"),
        f"optimizer ({plan.num_params:,} parameters)": (plan.optimizer_bytes, "model.model_dim"),
    }
    name, (size, field) = max(parts.items(), key=lambda item: item[1][0])
    change = {
        "train.accumulation": f"train.accumulation={2 * config.train.accumulation}",
        "measure.batch_size": f"measure.batch_size={max(1, config.measure.batch_size // 2)}",
        "model.model_dim": f"model.model_dim={max(1, config.model.model_dim // 2)}",
    }[field]
    return f"the largest part is {name}, {human_bytes(size)}; {change} would save about {human_bytes(size / 2)}"


def explain_failure(config: Config, error: Exception) -> str:
    """The reason that a record gives for an error; for exhausted memory also the culprit and a remedy."""
    reason = f"{type(error).__name__}: {error}".removesuffix(": ")
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        try:
            culprit = explain_out_of_memory(config)
        except Exception as second:  # there may be no memory for the answer either
            culprit = f"the largest part could not be found ({type(second).__name__})"
        reason = f"out of memory: {culprit} ({reason.splitlines()[0]})"
    return reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}... (all of it: traceback.txt)"
