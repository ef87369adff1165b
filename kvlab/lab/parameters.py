"""A run's parameters: found where an earlier run trained them, waited for, or trained here (tuning on validation)."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvlab import terminal
from kvlab.config import Config
from kvlab.evaluation.score import Scorer
from kvlab.interrupt import StopRequest
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.runs import Run
from kvlab.lab.trained import Trained, Training, point_to
from kvlab.lab.trials import Trials, failures_are_said, train_all
from kvlab.training.checkpoint import CheckpointError
from kvlab.training.trial import unfollowed
from kvlab.typing import Params
from pallas_kernels.selection import Taken


def obtain(
    lab: Laboratory,
    scorer: Scorer,
    run: Run,
    stop: StopRequest,
    *,
    known_attempt: int,
    taken: Taken,
    beside: Sequence[Config] = (),
    trains: bool = True,
    follow: Callable[[Mapping[str, Any]], None] = unfollowed,
) -> tuple[Params, Trained]:
    """The parameters of the run's training half. While another process trains them, waits, and takes over if it dies.

    `known_attempt` is the failed attempt that the run has recorded before, `taken` what `recording()` collects. Runs
    `beside` this one that will come have theirs trained as well where `train.vmap` says that they are one program.
    Raises `TrainingFailed`, and `Interrupted` when asked to stop. `follow` is told the rows that are written here.

    With `trains` false, and for a run that is scored on another task than that of its training (`trained_on`), nothing
    is trained and nothing that was is touched: raises FileNotFoundError or `CheckpointError` for parameters that are
    not there, or damaged.
    """
    training = Training(lab.config)

    def waiting(owner: str) -> None:
        run.say("waiting", for_pid=owner, training=str(training.directory))
        line = f"{lab.config.label} [{lab.config.run_id}] waits for process {owner}, which trains {training.directory}"
        terminal.console(stderr=True).print(line, soft_wrap=True)

    with training.locked(stop, waiting):
        run.say("running")
        point_to(training, run.directory)
        if not trains or lab.config.trained_on is not None:
            return _there(training, lab)
        if (found := _found(training, lab)) is not None:
            return found
        attempt = training.begin(known_attempt)
        with failures_are_said(training, attempt):
            return train_all(Trials(lab, scorer, training, attempt, follow=follow), beside, stop, taken)


def _there(training: Training, lab: Laboratory) -> tuple[Params, Trained]:
    """A finished training. Raises FileNotFoundError where there is none, and `CheckpointError` for a damaged one."""
    trained = training.done
    if trained is None:
        raise FileNotFoundError(
            f"{training.directory}: there is no finished training, and none is begun for an evaluation"
        )
    return training.restore(lab.model.params, trained), trained


def _found(training: Training, lab: Laboratory) -> tuple[Params, Trained] | None:
    """A finished training; None where there is none or where it is damaged, which is then removed."""
    try:
        trained = training.done
        return None if trained is None else (training.restore(lab.model.params, trained), trained)
    except CheckpointError as error:
        warnings.warn(f"{error}; trained again", RuntimeWarning, stacklevel=2)
        training.discard()
        return None
