"""What the host knows of one training: rows, validation, early stop and checkpoints. Its arrays lie with the loop,
alone or in a stack of several trainings."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import jax.numpy as jnp
import numpy as np

from kvlab.random import named_key
from kvlab.tasks.metrics import Metric
from kvlab.training.checkpoint import CheckpointError, Checkpoints, truncate_jsonl
from kvlab.training.config import TrainConfig
from kvlab.training.step import TrainState, TrainStep, init_state
from kvlab.typing import Params, PyTree
from kvlab.units import Spread


class NotFinite(RuntimeError):
    """A loss, gradient or parameter stopped being finite; names the step and the first bad leaf."""


@dataclass(frozen=True)
class TrialResult:
    """One finished trial: final parameters, the validation metric, and milliseconds a step (compilation aside): the
    median, and the quartiles over calls. Of several in one program that is a step's time divided by the trials that it
    moved."""

    params: Params
    validation: float
    num_steps: int
    num_tokens: int
    train_step_ms: Spread


type Outcome = TrialResult | NotFinite | CheckpointError
"""How a trial ended."""


def unfollowed(row: Mapping[str, Any]) -> None:
    """What rows are told where nobody listens."""


@dataclass(frozen=True)
class Member:
    """What a trial has of its own, among those that share a step. `directory` is of its checkpoints, `metrics_path` of
    its rows and of nobody else's, and `follow` is told each row once it is written. The first call takes `params`
    away."""

    params: Params
    learning_rate: float
    seed: int
    validate: Callable[[Params], float]
    directory: Path
    metrics_path: Path
    follow: Callable[[Mapping[str, Any]], None] = unfollowed


@dataclass
class Progress:
    """Host state that a checkpoint carries beside the arrays: everything the loop branches on."""

    call: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    best: float | None = None
    num_bad: int = 0
    validation: float | None = None
    train_step_ms: float = 0.0
    train_step_low_ms: float = 0.0
    train_step_high_ms: float = 0.0
    num_timed: int = 0
    finished: bool = False

    @property
    def step_ms(self) -> Spread:
        """Milliseconds of a step, as far as they are known."""
        return Spread(self.train_step_ms, self.train_step_low_ms, self.train_step_high_ms, self.num_timed)

    @step_ms.setter
    def step_ms(self, known: Spread) -> None:
        self.train_step_ms, self.train_step_low_ms, self.train_step_high_ms, self.num_timed = known


@dataclass
class Trial:
    """One trial while it is trained. `state` gives its arrays as they are now; `outcome` is there once it is over."""

    member: Member
    step_fn: TrainStep
    config: TrainConfig
    checkpoints: Checkpoints
    metrics_file: TextIO
    at: Progress
    state: Callable[[], TrainState]
    call_ms: dict[int, list[float]] = field(default_factory=dict)
    outcome: Outcome | None = None

    def save(self) -> None:
        """A checkpoint of where it is; nothing where that is saved."""
        if self.call_ms:
            self.at.step_ms = _step_ms(self.call_ms)
        self.checkpoints.save(self.at.call * self.config.steps_per_call, self.state(), vars(self.at))

    def account(self, metrics: dict[str, np.ndarray], seq_len: int, call_ms: float, *, saves: bool) -> dict[str, Any]:
        """A call that went well: validation and a checkpoint where they are due, the outcome at the end. Returns the
        row, which stands in the metrics. With `saves` it is saved in any case."""
        at, config, metric = self.at, self.config, self.step_fn.task.metric
        self.call_ms.setdefault(seq_len, []).append(call_ms / config.steps_per_call)
        at.call += 1
        at.num_tokens += config.batch_size * seq_len * config.steps_per_call
        done = at.call * config.steps_per_call
        row = {"step": done, "loss": float(metrics["loss"].mean()), "grad_norm": float(metrics["grad_norm"][-1])}
        if beside := float(metrics["beside"].mean()):
            row["loss_beside"] = beside
        if done % config.eval_every == 0 or done == config.num_steps:
            at.validation = self.member.validate(self.state().params)
            row["validation"] = at.validation
            at.finished = _judge(at, metric, config) or done == config.num_steps
        row["tokens"] = at.num_tokens
        written = {"learning_rate": self.member.learning_rate, **row}
        self.metrics_file.write(json.dumps(written) + "\n")
        at.num_rows += 1
        self.member.follow(written)
        if done % config.checkpoint_every == 0 or at.finished or saves:
            self.save()
        if at.finished:
            self.outcome = self.result()
        return row

    def blame(self, data: PyTree, knobs: list[int], seq_len: int) -> None:
        """The end of a trial whose last call met something that is not finite."""
        state = self.state()
        bad = int(state.step)
        knob = jnp.asarray(knobs[bad % self.config.steps_per_call], jnp.int32)
        leaf = self.step_fn.first_bad_leaf(state, data, named_key(self.member.seed, "train"), knob, seq_len)
        self.outcome = NotFinite(f"step {bad}: {leaf} is not finite")

    def result(self) -> TrialResult:
        """What a finished trial has come to."""
        at, state = self.at, self.state()
        assert at.validation is not None
        return TrialResult(state.params, at.validation, int(state.step), at.num_tokens, at.step_ms)


@contextmanager
def opened(step_fn: TrainStep, config: TrainConfig, member: Member) -> Iterator[Trial]:
    """A trial where its newest checkpoint left it, or at its beginning, which is then saved. Raises `CheckpointError`
    when none of its checkpoints can be read."""
    placement = step_fn.placement
    checkpoints = Checkpoints(member.directory, config.keep_checkpoints, placement)
    try:
        state, at = placement.put(init_state(member.params, step_fn.optimizer, member.learning_rate), ""), Progress()
        restored = checkpoints.restore(state)
        if restored is not None:
            step, tree, note = restored
            state, at = cast(TrainState, tree), _progress(note, member.directory / str(step))
        truncate_jsonl(member.metrics_path, at.num_rows)  # rows after the checkpoint are written again
        with member.metrics_path.open("a", buffering=1) as metrics_file:
            trial = Trial(member, step_fn, config, checkpoints, metrics_file, at, lambda: state)
            if restored is None:
                trial.save()  # so that its rows have a place to be truncated to
            if at.finished:
                trial.outcome = trial.result()
            yield trial
    finally:
        checkpoints.close()


def _progress(note: dict[str, Any], path: Path) -> Progress:
    """What a checkpoint's note says. Raises `CheckpointError` for one whose fields are others."""
    if unknown := note.keys() - vars(Progress()).keys():
        raise CheckpointError(f"{path}: its note has {', '.join(sorted(unknown))}, which this kvlab does not know")
    return Progress(**note)


def _judge(at: Progress, metric: Metric, config: TrainConfig) -> bool:
    """Whether the last validation ends training; keeps count of validations without improvement."""
    assert at.validation is not None
    improved = at.best is None or metric.is_better(at.validation, at.best)
    at.best, at.num_bad = (at.validation, 0) if improved else (at.best, at.num_bad + 1)
    reached = config.stop_at is not None and metric.has_reached(at.validation, config.stop_at)
    return reached or (config.patience is not None and at.num_bad >= config.patience)


def _step_ms(call_ms: dict[int, list[float]]) -> Spread:
    """Median and quartiles of a step's time over sequence lengths, each weighted by its calls; a shape's first call
    compiled."""
    spreads = [Spread.of(calls[1:] or calls) for calls in call_ms.values()]
    weights = [len(calls) for calls in call_ms.values()]
    median, low, high = (float(np.average([each[part] for each in spreads], weights=weights)) for part in range(3))
    return Spread(median, low, high, sum(each.num_samples for each in spreads))
