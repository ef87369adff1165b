"""Train once, evaluate many: the training that all runs of one training half share, in a folder of its own.

results/<experiment>/trained/<training id>/
  lock  training.yaml  provenance.json   written first
  status.json  metrics.jsonl  trials/    while it trains; failed trainings say why in status.json. Trials behind the
                                         first have their rows in trials/
  params/                                the final parameters, the only copy
  trained.json                           last, by atomic rename: the training is done, and trials/ goes

One process trains. Others that need the same parameters wait for the lock; the kernel opens it when its holder dies,
and the next one resumes from the last checkpoint.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from kvlab.config import Config
from kvlab.files import LockHeld, locked, write_atomic, write_json
from kvlab.interrupt import StopRequest
from kvlab.lab.foreign import plain, read_json
from kvlab.lab.provenance import provenance
from kvlab.lab.record import Done, TrainingReport, first_error, read_record
from kvlab.training.checkpoint import CheckpointError, Checkpoints
from kvlab.typing import Params
from kvlab.units import Spread

POINTER = "trained.json"
"""In a run's folder: where its parameters are. In the folder of a training: the training is done."""
METRICS = "metrics.jsonl"
DIGEST = "sha256"
"""In a statement: the digest of all the rest of it."""
POLL_S = 0.2


class TrainingFailed(RuntimeError):
    """The training that a run needs has failed, in this run or another; `attempt` counts its failures."""

    def __init__(self, reason: str, attempt: int):
        super().__init__(reason)
        self.attempt = attempt


@dataclass(frozen=True)
class Trained:
    """A finished training: what its runs report of it, the validation metric, and milliseconds of a step, with the
    spread of its samples (null: it is from before that was kept)."""

    report: TrainingReport
    validation: float
    train_step_ms: float
    spread: Spread | None = None

    @property
    def step_ms(self) -> Spread:
        """Milliseconds of a step; of no samples where the spread is not known."""
        return self.spread or Spread(self.train_step_ms, self.train_step_ms, self.train_step_ms, 0)


@dataclass(frozen=True)
class TrainingStatus:
    """Where a training is: `status`, its `attempt`, and the `reason` of a failed one."""

    status: str = "new"
    attempt: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Pointer:
    """What a run's folder says of its training: its id, and the folder where it was when the run was made."""

    training_id: str
    directory: str


class Training:
    """One training's folder. Everything but locks, `is_done` and `directory` is for the process that holds the lock."""

    def __init__(self, config: Config):
        self.config = config
        self.directory = config.training_dir

    @contextmanager
    def locked(self, stop: StopRequest, waiting: Callable[[str], None]) -> Iterator[None]:
        """Holds the training; while another process does, says so once by `waiting(its pid)` and waits.

        Raises `Interrupted` when asked to stop meanwhile.
        """
        with ExitStack() as stack:
            is_said = False
            while True:
                try:
                    stack.enter_context(locked(self.directory / "lock"))
                    break
                except LockHeld as held:
                    if not is_said:
                        waiting(held.owner)
                    is_said = True
                stop.check()
                time.sleep(POLL_S)
            yield

    @contextmanager
    def locked_now(self) -> Iterator[bool]:
        """Holds the training if no other process does; gives whether it is held."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.directory / "lock"))
            except LockHeld:
                yield False
                return
            yield True

    def trial(self, index: int) -> tuple[Path, Path]:
        """Where a trial has its checkpoints, and its rows: those of the first are what `metrics.jsonl` begins with."""
        trials = self.directory / "trials"
        rows = self.directory / METRICS if index == 0 else trials / f"{index}.jsonl"
        return trials / str(index), rows

    @property
    def is_done(self) -> bool:
        """Whether it says that it is finished; for any process."""
        return (self.directory / POINTER).exists()

    @property
    def done(self) -> Trained | None:
        """The finished training; None while there is none. Raises `CheckpointError` when its statement is damaged."""
        return _read(Trained, self.directory / POINTER)

    @property
    def status(self) -> TrainingStatus:
        """Where the training is; a status that cannot be read is warned of, and is that of a new one."""
        try:
            return _read(TrainingStatus, self.directory / "status.json") or TrainingStatus()
        except CheckpointError as error:
            warnings.warn(f"{error}; taken as new", RuntimeWarning, stacklevel=2)
            return TrainingStatus()

    def begin(self, known_attempt: int) -> int:
        """Starts or resumes; returns the number of the attempt.

        A failed training is tried again by a run that recorded this failure as `known_attempt`: its command was given
        again. A run that learns of the failure only now raises `TrainingFailed`, so that a sweep does not repeat it.
        Unreadable checkpoints are thrown away, since nothing can be resumed from them.
        """
        status = self.status
        attempt = max(1, status.attempt)
        if status.status == "failed":
            if status.attempt > known_attempt:
                again = "the same command tries again"
                raise TrainingFailed(f"{status.reason} (in the shared training {self.directory}; {again})", attempt)
            attempt += 1
            if status.reason.startswith("CheckpointError"):
                self.discard()
        half = {"run_id": self.config.run_id, **self.config.training_half}
        write_atomic(self.directory / "training.yaml", yaml.safe_dump(half, sort_keys=False))
        write_json(self.directory / "provenance.json", asdict(provenance(self.config)))
        self.say("running", attempt)
        return attempt

    def discard(self) -> None:
        """Removes all that was trained."""
        for name in (POINTER, METRICS):
            (self.directory / name).unlink(missing_ok=True)
        for name in ("params", "trials"):
            shutil.rmtree(self.directory / name, ignore_errors=True)

    def say(self, status: str, attempt: int, **details: Any) -> None:
        """Where the training is, for those who look from outside and for the next process."""
        write_json(
            self.directory / "status.json", {"status": status, "attempt": attempt, "pid": os.getpid(), **details}
        )

    def finish(self, trained: Trained, params: Params, attempt: int, num_trials: int) -> None:
        """The parameters, then the statement that they are there; checkpoints of the trials are of no use any more.
        Raises `CheckpointError` where somebody has removed the rows of a trial meanwhile."""
        save_params(self.directory / "params", params)
        self._join_metrics(num_trials)
        self.say("done", attempt)
        _state(self.directory / POINTER, trained)
        shutil.rmtree(self.directory / "trials", ignore_errors=True)

    def _join_metrics(self, num_trials: int) -> None:
        """The rows of all trials in one file. Repeated where a process died over it, since the first trial's own rows
        are then cut back to those of its checkpoint."""
        files = [self.trial(index)[1] for index in range(num_trials)]
        if gone := [path for path in files if not path.exists()]:
            raise CheckpointError(f"{gone[0]}: was removed while the training wrote it")
        if len(files) > 1:
            write_atomic(files[0], b"".join(path.read_bytes() for path in files))

    def restore(self, like: Params, trained: Trained) -> Params:
        """The parameters of a finished training. Raises `CheckpointError` when they are not the ones that were
        trained."""
        shutil.rmtree(self.directory / "trials", ignore_errors=True)  # left where a process died before it removed them
        params = restore_params(self.directory / "params", like, trained.report.params_sha256)
        if params is None:
            raise CheckpointError(f"{self.directory / 'params'}: no such folder")
        return params


def point_to(training: Training, run_directory: Path) -> None:
    """Writes into a run's folder where its parameters, metrics and checkpoints are."""
    where = Pointer(training.config.training_id, str(training.directory.absolute()))
    _state(run_directory / POINTER, where)


def training_directory(run_directory: Path) -> Path:
    """The folder with a run's parameters and metrics: beside the run, where results were moved as a whole; else where
    it was when the run was made. A run from before trainings were shared has them in its own folder. Raises
    `CheckpointError` when the run's statement of it is damaged."""
    where = _read(Pointer, run_directory / POINTER)
    if where is None:
        return run_directory
    beside = run_directory.parent / "trained" / where.training_id
    return beside if beside.is_dir() else Path(where.directory)


def trained_params(run_directory: Path, like: Params) -> Params:
    """The parameters of a finished run. Raises FileNotFoundError when it has none, and `CheckpointError` when they
    are not the ones that were trained."""
    directory = training_directory(run_directory)
    digest = _stated_digest(run_directory, directory)
    params = restore_params(directory / "params", like, digest) if digest else None
    if params is None:
        raise FileNotFoundError(f"{directory / 'params'}: there are no final parameters; is the run done?")
    return params


def _stated_digest(run_directory: Path, directory: Path) -> str | None:
    """The digest of a run's parameters: its training's folder states it, or its record, where it has them itself."""
    if directory != run_directory:
        trained = _read(Trained, directory / POINTER)
        return trained.report.params_sha256 if trained else None
    path = run_directory / "record.json"
    try:
        record = read_record(path) if path.exists() else None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {first_error(error)}") from None
    return record.training.params_sha256 if isinstance(record, Done) else None


def _read[Statement](kind: type[Statement], path: Path) -> Statement | None:
    """What a file states; None where there is none. Raises `CheckpointError` when it is damaged; files from before they
    had a digest are taken as they are."""
    try:
        if not path.exists():
            return None
        data = read_json(path)
        stated = data.pop(DIGEST, None) if isinstance(data, dict) else None
        statement = TypeAdapter(kind).validate_python(data)
        if stated is not None and stated != _statement_sha256(data):
            raise ValueError("its SHA-256 differs")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {first_error(error)}") from None
    return statement


def _state(path: Path, statement: Any) -> None:
    """Writes a statement with its digest."""
    data = json.loads(json.dumps(asdict(statement), allow_nan=False))
    write_json(path, {**data, DIGEST: _statement_sha256(plain(data))})


def _statement_sha256(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def save_params(directory: Path, params: Params) -> None:
    """Parameters as a checkpoint of their own, in place of what an earlier attempt may have left."""
    shutil.rmtree(directory, ignore_errors=True)
    checkpoints = Checkpoints(directory, keep=1)
    try:
        checkpoints.save(0, params, {})
    finally:
        checkpoints.close()


def restore_params(directory: Path, like: Params, digest: str) -> Params | None:
    """The parameters that `save_params` wrote; None where there are none. Raises `CheckpointError` when they are not
    those of the `digest`."""
    if not directory.exists():
        return None
    checkpoints = Checkpoints(directory, keep=1)
    try:
        restored = checkpoints.restore(like, digest)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: not the parameters that were trained: {error}") from None
    finally:
        checkpoints.close()
    return None if restored is None else restored[1]
