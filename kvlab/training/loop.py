"""The training loop of one trial: device calls, validation, early stop, checkpoints, metrics. Resumes bit for bit."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvlab.interrupt import StopRequest
from kvlab.memory.pools import num_bytes
from kvlab.random import named_key
from kvlab.schema import ConfigError, Schema, integer, real
from kvlab.tasks.metrics import Metric
from kvlab.training.checkpoint import Checkpoints, truncate_jsonl
from kvlab.training.progress import TrainingProgress
from kvlab.training.step import TrainState, TrainStep, init_state
from kvlab.typing import Params, PyTree


@dataclass(frozen=True)
class TrainConfig(Schema):
    """How long and how often; `num_steps` 0 evaluates the parameters as they are. `eval_every` and `checkpoint_every`
    are in steps and multiples of `steps_per_call`.

    Training stops early when the validation metric reaches `stop_at`, or has not improved for `patience` validations.
    """

    num_steps: int = integer(1000, 0)
    batch_size: int = integer(64, 1, 1 << 20)
    accumulation: int = integer(1, 1, 1 << 20)
    steps_per_call: int = integer(4, 1, 10_000)
    eval_every: int = integer(200, 1)
    checkpoint_every: int = integer(500, 1)
    keep_checkpoints: int = integer(2, 1, 1000)
    stop_at: float | None = real(None, 0.0, 1e6, optional=True)
    patience: int | None = integer(None, 1, optional=True)

    def cross_check(self) -> None:
        if self.batch_size % self.accumulation:
            raise ConfigError("accumulation", self.accumulation, f"must divide batch_size = {self.batch_size}")
        for name in ("num_steps", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value % self.steps_per_call:
                raise ConfigError(name, value, f"must be a multiple of steps_per_call = {self.steps_per_call}")


class NotFinite(RuntimeError):
    """A loss, gradient or parameter stopped being finite; names the step and the first bad leaf."""


@dataclass(frozen=True)
class TrialResult:
    """One finished trial: final parameters, the validation metric, and median milliseconds a step (compilation
    aside)."""

    params: Params
    validation: float
    num_steps: int
    num_tokens: int
    train_step_ms: float


@dataclass
class _Progress:
    """Host state that a checkpoint carries beside the arrays: everything the loop branches on."""

    call: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    best: float | None = None
    num_bad: int = 0
    validation: float | None = None
    train_step_ms: float = 0.0
    finished: bool = False


def train(
    step_fn: TrainStep,
    params: Params,
    config: TrainConfig,
    *,
    learning_rate: float,
    seed: int,
    validate: Callable[[Params], float],
    directory: Path,
    metrics_path: Path,
    label: str,
    stop: StopRequest,
) -> TrialResult:
    """Trains to the end, resuming from `directory` if it holds checkpoints; metrics go to `metrics_path` as JSONL rows.

    Raises `NotFinite` on a NaN, `Interrupted` when asked to stop (after saving). The result depends on the arguments
    alone, not on how often the process was killed in between.
    """
    placement = step_fn.placement
    checkpoints = Checkpoints(directory, config.keep_checkpoints, placement)
    trial = _Trial(
        step_fn=step_fn,
        config=config,
        key=named_key(seed, "train"),
        data=placement.put(step_fn.task.train_data(), ""),
        checkpoints=checkpoints,
        state=placement.put(init_state(params, step_fn.optimizer, learning_rate), ""),
        at=_Progress(num_rows=_num_rows(metrics_path)),
    )
    try:
        is_resumed = trial.resume()
        if not trial.at.finished:  # rows after a finished trial belong to the next one
            truncate_jsonl(metrics_path, trial.at.num_rows)
        with (
            metrics_path.open("a", buffering=1) as metrics_file,
            TrainingProgress(label, config.num_steps, num_bytes(trial.state)) as progress,
        ):
            if not is_resumed:
                trial.save()  # so that the rows of this trial have a place to be truncated to
            progress.resumed(int(trial.state.step))
            earlier_tokens = trial.at.num_tokens
            while not trial.at.finished:
                row = trial.call(validate)
                metrics_file.write(json.dumps({"learning_rate": learning_rate, **row}) + "\n")
                trial.at.num_rows += 1
                progress.update(row["step"], row["loss"], trial.at.num_tokens - earlier_tokens)
                if row["step"] % config.checkpoint_every == 0 or trial.at.finished or stop.reason:
                    trial.save()
                stop.check()
    finally:
        checkpoints.close()
    return trial.result()


@dataclass
class _Trial:
    """What one trial holds while it trains."""

    step_fn: TrainStep
    config: TrainConfig
    key: Array
    data: PyTree
    checkpoints: Checkpoints
    state: TrainState
    at: _Progress
    call_ms: dict[int, list[float]] = field(default_factory=dict)

    def resume(self) -> bool:
        """Takes over the newest checkpoint; returns whether there is one."""
        restored = self.checkpoints.restore(self.state)
        if restored is not None:
            _, tree, note = restored
            self.state, self.at = cast(TrainState, tree), _Progress(**note)
        return restored is not None

    def save(self) -> None:
        if self.call_ms:
            self.at.train_step_ms = _median_ms(self.call_ms)
        self.checkpoints.save(int(self.state.step), self.state, vars(self.at))

    def call(self, validate: Callable[[Params], float]) -> dict[str, Any]:
        """One device call, and validation where it is due; returns the row for the metrics."""
        at, config, task = self.at, self.config, self.step_fn.task
        began = time.perf_counter()
        seq_len, knobs = task.train_call(at.call, config.steps_per_call)
        self.state, metrics = self.step_fn(self.state, self.data, self.key, jnp.asarray(knobs, jnp.int32), seq_len)
        loss = np.asarray(metrics["loss"])
        if not bool(metrics["ok"]):
            self._blame(knobs, seq_len)
        self.call_ms.setdefault(seq_len, []).append((time.perf_counter() - began) * 1e3 / config.steps_per_call)
        at.call += 1
        at.num_tokens += config.batch_size * seq_len * config.steps_per_call
        done = at.call * config.steps_per_call
        row = {"step": done, "loss": float(loss.mean()), "grad_norm": float(metrics["grad_norm"][-1])}
        if beside := float(np.asarray(metrics["beside"]).mean()):
            row["loss_beside"] = beside
        if done % config.eval_every == 0 or done == config.num_steps:
            at.validation = validate(self.state.params)
            row["validation"] = at.validation
            at.finished = _judge(at, task.metric, config) or done == config.num_steps
        return {**row, "tokens": at.num_tokens}

    def _blame(self, knobs: list[int], seq_len: int) -> None:
        bad = int(self.state.step)
        knob = jnp.asarray(knobs[bad % self.config.steps_per_call], jnp.int32)
        leaf = self.step_fn.first_bad_leaf(self.state, self.data, self.key, knob, seq_len)
        raise NotFinite(f"step {bad}: {leaf} is not finite")

    def result(self) -> TrialResult:
        at = self.at
        assert at.validation is not None
        return TrialResult(self.state.params, at.validation, int(self.state.step), at.num_tokens, at.train_step_ms)


def _judge(at: _Progress, metric: Metric, config: TrainConfig) -> bool:
    """Whether the last validation ends training; keeps count of validations without improvement."""
    assert at.validation is not None
    improved = at.best is None or metric.is_better(at.validation, at.best)
    at.best, at.num_bad = (at.validation, 0) if improved else (at.best, at.num_bad + 1)
    reached = config.stop_at is not None and metric.has_reached(at.validation, config.stop_at)
    return reached or (config.patience is not None and at.num_bad >= config.patience)


def _median_ms(call_ms: dict[int, list[float]]) -> float:
    """Median step time over sequence lengths, each weighted by its calls; a shape's first call compiled."""
    medians = [float(np.median(calls[1:] or calls)) for calls in call_ms.values()]
    return float(np.average(medians, weights=[len(calls) for calls in call_ms.values()]))


def _num_rows(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def params_digest(params: Params) -> str:
    """SHA-256 over names and bytes of every parameter: two runs are equal iff their digests are."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
