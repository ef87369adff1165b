"""The training loop: device calls of one trial, or of several as one program. Resumes bit for bit."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvlab.interrupt import StopRequest
from kvlab.memory.pools import num_bytes
from kvlab.training.checkpoint import CheckpointError
from kvlab.training.config import TrainConfig
from kvlab.training.progress import TrainingProgress
from kvlab.training.stack import Alone, Programs, Stack
from kvlab.training.step import TrainStep
from kvlab.training.trial import Member, Outcome, Trial, TrialResult, opened, unfollowed
from kvlab.typing import Params


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
    follow: Callable[[Mapping[str, Any]], None] = unfollowed,
) -> TrialResult:
    """Trains to the end, resuming from `directory` if it holds checkpoints; metrics go to `metrics_path` as JSONL rows,
    each of which `follow` is told then.

    Raises `NotFinite` on a NaN, `Interrupted` when asked to stop (after saving). The result depends on the arguments
    alone, not on how often the process was killed in between.
    """
    member = Member(params, learning_rate, seed, validate, directory, metrics_path, follow)
    (outcome,) = train_together(Programs.of_task(step_fn, config), config, [member], label=label, stop=stop)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def train_together(
    programs: Programs, config: TrainConfig, members: Sequence[Member], *, label: str, stop: StopRequest
) -> list[Outcome]:
    """Trains all members to their ends, several as one program, and returns how each ended, in their order.

    What a member writes is what `train` would: it may be resumed in another company, or alone. Those that are behind
    catch up first, and one that has ended, or met a NaN, stays as it is. Raises `Interrupted` when asked to stop, after
    saving all. Numbers are those of `train` up to rounding.
    """
    with ExitStack() as stack:
        trials: dict[int, Trial] = {}
        outcomes: dict[int, Outcome] = {}
        for place, member in enumerate(members):
            try:
                trials[place] = stack.enter_context(opened(programs.step_fn, config, member))
            except CheckpointError as error:
                outcomes[place] = error
        if going := {place: trial for place, trial in trials.items() if trial.outcome is None}:
            _train(programs, list(going.values()), label, stop)
        outcomes |= {place: trial.outcome for place, trial in trials.items() if trial.outcome is not None}
    return [outcomes[place] for place in range(len(members))]


def _train(programs: Programs, trials: list[Trial], label: str, stop: StopRequest) -> None:
    """All of them to their ends."""
    config, task = trials[0].config, programs.step_fn.task
    arrays, held_bytes = _laid_out(programs, trials)
    with TrainingProgress(label, config.num_steps, held_bytes) as progress:
        progress.resumed(min(trial.at.call for trial in trials) * config.steps_per_call)
        num_tokens = 0
        while going := [place for place, trial in enumerate(trials) if trial.outcome is None]:
            arrays.keep(going)
            call = min(trials[place].at.call for place in going)
            moving = [place for place in going if trials[place].at.call == call]
            began = time.perf_counter()
            seq_len, knobs = task.train_call(call, config.steps_per_call)
            metrics = arrays.call(moving, knobs, seq_len)
            call_ms = (time.perf_counter() - began) * 1e3 / len(moving)
            rows = []
            is_last = stop.reason is not None
            saves = stop.takes_save() or is_last
            for place, found in zip(moving, metrics, strict=True):
                if bool(found["ok"]):
                    rows.append(trials[place].account(found, seq_len, call_ms, saves=saves))
                else:
                    trials[place].blame(programs.data, knobs, seq_len)
            num_tokens += len(moving) * config.batch_size * seq_len * config.steps_per_call
            if rows:
                progress.update(rows[0]["step"], sum(row["loss"] for row in rows) / len(rows), num_tokens)
            if saves:
                for trial in trials:
                    if trial.outcome is None:
                        trial.save()
            if is_last:
                stop.check()


def _laid_out(programs: Programs, trials: list[Trial]) -> tuple[Alone | Stack, int]:
    """The arrays of the trials, which ask for their own there from now on, and their bytes."""
    states = [trial.state() for trial in trials]
    held_bytes = sum(num_bytes(state) for state in states)
    seeds = [trial.member.seed for trial in trials]
    if len(trials) == 1:
        arrays = Alone(programs.step_fn, programs.data, seeds[0], states[0])
    else:
        arrays = Stack(programs, seeds, states)
    for place, trial in enumerate(trials):
        trial.state = lambda place=place: arrays.state(place)
    return arrays, held_bytes
