"""The trials of a training, one for each learning rate; and those of other trainings of a sweep, where several are one
program (`train.vmap`)."""

import itertools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import jax

from kvlab.config import Config, training_label_of
from kvlab.evaluation.score import Scorer
from kvlab.interrupt import Interrupted, StopRequest
from kvlab.lab.kernels import summary
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.plan import explain_failure
from kvlab.lab.record import TrainingReport
from kvlab.lab.runs import Run
from kvlab.lab.trained import Trained, Training, TrainingFailed
from kvlab.random import named_key
from kvlab.training.checkpoint import tree_sha256
from kvlab.training.loop import train, train_together
from kvlab.training.stack import Programs, room_bytes
from kvlab.training.step import TrainStep
from kvlab.training.trial import Member, NotFinite, Outcome, TrialResult, unfollowed
from kvlab.typing import Params
from kvlab.units import UNTIMED
from pallas_kernels.selection import Taken

MOST_TOGETHER = 64
"""Trials in one program, however many would fit."""


@dataclass
class Trials:
    """The trials of a training that this process holds; `outcomes` are of those that have ended, by their number, and
    `follow` is told each row that they write."""

    lab: Laboratory
    scorer: Scorer
    training: Training
    attempt: int
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    num_together: int = 1
    follow: Callable[[Mapping[str, Any]], None] = unfollowed

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rate of each."""
        config = self.lab.config
        return config.tune.learning_rate or (config.optimizer.learning_rate,)

    def validate(self, params: Params) -> float:
        """The metric on the validation slices."""
        return self.lab.task.metric.mean(self.scorer.parallel(params, "validation"))

    def member(self, index: int) -> Member:
        """A trial from its beginning, with parameters of its own: the step takes them away."""
        params, (directory, rows) = jax.tree.map(lambda x: x.copy(), self.lab.model.params), self.training.trial(index)
        return Member(params, self.rates[index], self.lab.config.seed, self.validate, directory, rows, self.follow)

    def label(self, index: int) -> str:
        """How people call a trial."""
        return f"{training_label_of(self.lab.config.as_dict())} lr {self.rates[index]:g}"

    def train_alone(self, index: int, step_fn: TrainStep, stop: StopRequest) -> None:
        """A trial as a program of its own; raises what stops it."""
        member = self.member(index)
        self.outcomes[index] = train(
            step_fn,
            member.params,
            self.lab.config.train,
            learning_rate=member.learning_rate,
            seed=member.seed,
            validate=member.validate,
            directory=member.directory,
            metrics_path=member.metrics_path,
            label=self.label(index),
            stop=stop,
            follow=member.follow,
        )

    def finish_if_ended(self, taken: Taken) -> None:
        """Finishes a training of another run once all of its trials have ended; says so where it has failed."""
        if len(self.outcomes) == len(self.rates):
            with suppress(TrainingFailed), failures_are_said(self.training, self.attempt):
                self.finish(taken)

    def finish(self, taken: Taken) -> tuple[Params, Trained]:
        """Keeps the best trial by validation; ties go to the first. A rate that diverged is noted where another did
        not. Raises the error of the first that has failed otherwise, or of the first of all."""
        done: list[tuple[TrialResult, float]] = []
        diverged: dict[float, NotFinite] = {}
        for index, rate in enumerate(self.rates):
            outcome = self.outcomes[index]
            if isinstance(outcome, NotFinite):
                diverged[rate] = outcome
            elif isinstance(outcome, Exception):
                raise outcome
            else:
                done.append((outcome, rate))
        if not done:
            raise next(iter(diverged.values()))
        for rate, error in diverged.items():
            warnings.warn(f"learning rate {rate:g} diverged: {error}", RuntimeWarning, stacklevel=2)
        best, learning_rate = done[0]
        for outcome, rate in done[1:]:
            if self.lab.task.metric.is_better(outcome.validation, best.validation):
                best, learning_rate = outcome, rate
        trials = [
            {"learning_rate": rate, "validation": outcome.validation, "num_steps": outcome.num_steps}
            for outcome, rate in done
            if self.lab.config.train.num_steps
        ]
        noted = {f"{rate:g}": str(error) for rate, error in diverged.items()}
        return self._kept(best, learning_rate, trials, noted, taken)

    def _kept(
        self,
        best: TrialResult,
        learning_rate: float,
        trials: list[dict[str, float]],
        diverged: dict[str, str],
        taken: Taken,
    ) -> tuple[Params, Trained]:
        kernels = summary(taken)
        report = TrainingReport(
            learning_rate=learning_rate,
            trials=trials,
            diverged=diverged,
            num_steps=best.num_steps,
            num_tokens=best.num_tokens,
            params_sha256=tree_sha256(best.params),
            data_sha256=self.lab.task.fingerprint(),
            training_id=self.lab.config.training_id,
            trained_by=self.lab.config.run_id,
            num_together=self.num_together,
            implementations={op: chosen.taken for op, chosen in kernels.items()},
            passed_over={op: chosen.reason for op, chosen in kernels.items() if chosen.reason},
        )
        trained = Trained(report, best.validation, best.train_step_ms.median, best.train_step_ms)
        num_trials = len(self.rates) if self.lab.config.train.num_steps else 0
        self.training.finish(trained, best.params, self.attempt, num_trials)
        return best.params, trained


def train_all(own: Trials, beside: Sequence[Config], stop: StopRequest, taken: Taken) -> tuple[Params, Trained]:
    """Trains a run's own training, and those `beside` it that are the same program. Those that fail say so in their
    folders; the run's own raises its error. Where trials cannot be one program, a warning says why, and the run's own
    follow one another, as they do without `train.vmap`."""
    config = own.lab.config
    if config.train.num_steps == 0:
        own.outcomes[0] = TrialResult(own.lab.model.params, own.validate(own.lab.model.params), 0, 0, UNTIMED)
        return own.finish(taken)
    if varied := config.train.varied(jax.default_backend()):
        with _joined(own, beside, varied) as others:
            try:
                _train_groups([own, *others], varied, stop)
            except (Interrupted, KeyboardInterrupt):
                raise
            except Exception as error:
                reason = f"trials cannot be one program: {error!r:.300}; they follow one another"
                warnings.warn(reason, RuntimeWarning, stacklevel=2)
            for trials in others:
                trials.finish_if_ended(taken)
    step_fn = own.lab.train_step()
    for index in range(len(own.rates)):
        if index not in own.outcomes:
            try:
                own.train_alone(index, step_fn, stop)
            except NotFinite as error:
                own.outcomes[index] = error
    return own.finish(taken)


@contextmanager
def _joined(own: Trials, beside: Sequence[Config], varied: Collection[str]) -> Iterator[list[Trials]]:
    """The other trainings of a sweep that are one program with a run's own, and that nobody works on, each held."""
    shared, seen, others = shared_half(own.lab.config, varied), {own.lab.config.training_id}, list[Trials]()
    with ExitStack() as stack:
        for config in beside:
            if config.training_id in seen or shared_half(config, varied) != shared:
                continue
            seen.add(config.training_id)
            training = Training(config)
            if training.is_done or not stack.enter_context(training.locked_now()) or training.is_done:
                continue  # done, or held by another process, or done by it meanwhile
            try:
                attempt = training.begin(Run(config).known_attempt)
            except TrainingFailed:  # it stands in its folder, for the run to say
                continue
            scorer = own.scorer.with_key(named_key(config.seed, "eval"))
            others.append(Trials(Laboratory.of(config), scorer, training, attempt))
        try:
            yield others
        finally:
            for trials in others:
                if trials.training.status.status == "running":
                    trials.training.say("interrupted", trials.attempt)


def shared_half(config: Config, varied: Collection[str]) -> dict[str, Any]:
    """What trainings have in common that are one program, with what they may differ in left out."""
    half = dict(config.training_half)
    if "seed" in varied:
        del half["seed"]
    if "learning_rate" in varied:
        for section in ("optimizer", "tune"):
            half[section] = {name: value for name, value in half[section].items() if name != "learning_rate"}
    return half


def _train_groups(everyone: Sequence[Trials], varied: Collection[str], stop: StopRequest) -> None:
    """Trains those trials that are one program with another, as many at a time as fit; single ones are left."""
    groups: dict[tuple[Any, Any], list[tuple[Trials, int]]] = {}
    for trials in everyone:
        for index, rate in enumerate(trials.rates):
            fixed = ("seed" in varied or trials.lab.config.seed, "learning_rate" in varied or rate)
            groups.setdefault(fixed, []).append((trials, index))
    lab, programs = everyone[0].lab, None
    for group in groups.values():
        if len(group) < 2:
            continue
        programs = programs or Programs.of_task(lab.train_step(), lab.config.train)
        for part in _parts(group, programs.num_fitting(lab.model.params, min(len(group), MOST_TOGETHER), room_bytes())):
            first, index = part[0]
            label = f"{first.label(index)} and {len(part) - 1} more"
            members = [trials.member(number) for trials, number in part]
            outcomes = train_together(programs, lab.config.train, members, label=label, stop=stop)
            for (trials, number), outcome in zip(part, outcomes, strict=True):
                trials.outcomes[number] = outcome
                trials.num_together = max(trials.num_together, len(part))


def _parts[Item](items: list[Item], most: int) -> list[list[Item]]:
    """Items in as few parts as possible, about as long as each other; none where each would be alone."""
    num_parts = -(-len(items) // most)
    bounds = [len(items) * part // num_parts for part in range(num_parts + 1)]
    parts = [items[start:end] for start, end in itertools.pairwise(bounds)]
    return [part for part in parts if len(part) > 1]


@contextmanager
def failures_are_said(training: Training, attempt: int) -> Iterator[None]:
    """An error of the training stands in its folder, for every run that needs it."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        training.say("interrupted", attempt)
        raise
    except Exception as error:
        reason = explain_failure(training.config, error)
        with suppress(OSError):  # where the disk is full the run says so
            training.say("failed", attempt, reason=reason)
        raise TrainingFailed(reason, attempt) from error
