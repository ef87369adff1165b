"""A run's parameters: found where an earlier run trained them, waited for, or trained here (tuning on validation)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from rich.console import Console

from kvlab.config import training_label_of
from kvlab.evaluation.score import Scorer
from kvlab.interrupt import Interrupted, StopRequest
from kvlab.lab.kernels import summary
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.plan import explain_failure
from kvlab.lab.record import TrainingReport
from kvlab.lab.runs import Run
from kvlab.lab.trained import Trained, Training, TrainingFailed, point_to
from kvlab.training.checkpoint import CheckpointError
from kvlab.training.loop import TrialResult, params_digest, train
from kvlab.typing import Params
from pallas_kernels.selection import Taken


def obtain(
    lab: Laboratory, scorer: Scorer, run: Run, stop: StopRequest, *, known_attempt: int, taken: Taken
) -> tuple[Params, Trained]:
    """The parameters of the run's training half. While another process trains them, waits, and takes over if it dies.

    `known_attempt` is the failed attempt that the run has recorded before, `taken` what `recording()` collects. Raises
    `TrainingFailed`, and `Interrupted` when asked to stop.
    """
    training = Training(lab.config)

    def waiting(owner: str) -> None:
        run.say("waiting", for_pid=owner, training=str(training.directory))
        line = f"{lab.config.label} [{lab.config.run_id}] waits for process {owner}, which trains {training.directory}"
        Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)

    with training.locked(stop, waiting):
        run.say("running")
        point_to(training, run.directory)
        if (found := _found(training, lab)) is not None:
            return found
        attempt = training.begin(known_attempt)
        with _failures_are_said(training, attempt):
            best, learning_rate, trials = _tuned(lab, scorer, training, stop)
            kernels = summary(taken)
            report = TrainingReport(
                learning_rate=learning_rate,
                trials=trials,
                num_steps=best.num_steps,
                num_tokens=best.num_tokens,
                params_sha256=params_digest(best.params),
                data_sha256=lab.task.fingerprint(),
                training_id=lab.config.training_id,
                trained_by=lab.config.run_id,
                implementations={op: chosen.taken for op, chosen in kernels.items()},
                passed_over={op: chosen.reason for op, chosen in kernels.items() if chosen.reason},
            )
            trained = Trained(report, best.validation, best.train_step_ms)
            training.finish(trained, best.params, attempt)
        return best.params, trained


def _found(training: Training, lab: Laboratory) -> tuple[Params, Trained] | None:
    """A finished training; None where there is none or where it is damaged, which is then removed."""
    try:
        trained = training.done
        return None if trained is None else (training.restore(lab.model.params, trained), trained)
    except CheckpointError as error:
        warnings.warn(f"{error}; trained again", RuntimeWarning, stacklevel=2)
        training.discard()
        return None


@contextmanager
def _failures_are_said(training: Training, attempt: int) -> Iterator[None]:
    """An error of the training stands in its folder, for every run that needs it."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        training.say("interrupted", attempt)
        raise
    except Exception as error:
        reason = explain_failure(training.config, error)
        training.say("failed", attempt, reason=reason)
        raise TrainingFailed(reason, attempt) from error


def _tuned(
    lab: Laboratory, scorer: Scorer, training: Training, stop: StopRequest
) -> tuple[TrialResult, float, list[dict[str, float]]]:
    """The best trial by validation over the learning rates of `tune`, or the only one; ties go to the first."""
    config, metric, best = lab.config, lab.task.metric, None
    trials: list[dict[str, float]] = []
    if config.train.num_steps == 0:
        validation = metric.mean(scorer.parallel(lab.model.params, "validation"))
        return TrialResult(lab.model.params, validation, 0, 0, 0.0), config.optimizer.learning_rate, trials
    step_fn = lab.train_step()
    for index, learning_rate in enumerate(config.tune.learning_rate or (config.optimizer.learning_rate,)):
        trial = train(
            step_fn,
            jax.tree.map(lambda x: x.copy(), lab.model.params),  # the step donates its state
            config.train,
            learning_rate=learning_rate,
            seed=config.seed,
            validate=lambda params: metric.mean(scorer.parallel(params, "validation")),
            directory=training.directory / "trials" / str(index),
            metrics_path=training.directory / "metrics.jsonl",
            label=f"{training_label_of(config.as_dict())} lr {learning_rate:g}",
            stop=stop,
        )
        trials.append({"learning_rate": learning_rate, "validation": trial.validation, "num_steps": trial.num_steps})
        if best is None or metric.is_better(trial.validation, best[0].validation):
            best = trial, learning_rate
    assert best is not None
    return *best, trials
