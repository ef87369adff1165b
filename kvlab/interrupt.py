"""Ctrl-C, SIGTERM, a scheduler's warning and the end of a sweep as a request: the loop finishes its device call, saves,
and leaves.

A scheduler warns by SIGUSR1 or SIGUSR2 before it ends a job. Where somebody has installed a handler for it, as submitit
does, that handler has its turn after all is saved: submitit's requeues the job and ends the process. SIGTERM under
Slurm and submitit is a job that is preempted or cancelled. Slurm itself decides then what becomes of it, and kills it:
the run saves and goes on until that happens, since a process that ends by itself may count as a job that has ended.
"""

import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_FILE = "KVLAB_STOP_FILE"
"""Environment variable: the file whose presence asks every job of a sweep to stop, wherever it runs."""
SWEEP_PROCESS = "KVLAB_SWEEP_PROCESS"
"""Environment variable: the process that leads a sweep; its own workers stop when it is gone."""
STOPS = (signal.SIGINT, signal.SIGTERM)
"""Asking twice does not wait for the end of a call."""
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send ahead, as often as they like: a second one changes nothing."""
_OWED: list[int] = []
"""Warnings that a run has answered, and that somebody else's handler has still to see."""


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved; the same command resumes it."""

    def __init__(self, reason: str):
        super().__init__(f"stopped by {reason}; the same command resumes")


class StopRequest:
    """Whether somebody asked to stop, and how: a signal, the sweep's stop file, or the death of the sweep's process."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.asks_to_save = False
        self._file = os.environ.get(STOP_FILE)
        parent = os.getppid()
        self._parent = parent if str(parent) == os.environ.get(SWEEP_PROCESS) else None

    @property
    def reason(self) -> str | None:
        """What asked, or None."""
        if self.signal_name:
            return self.signal_name
        if self._file and Path(self._file).exists():
            return "the sweep"
        if self._parent is not None and os.getppid() != self._parent:
            return "the end of the sweep's process"
        return None

    def check(self) -> None:
        """Raises `Interrupted` if a stop was requested; call it only where everything is saved."""
        if reason := self.reason:
            raise Interrupted(reason)

    def takes_save(self) -> bool:
        """Whether all is to be saved though the run goes on; true once for each time that somebody asked."""
        asked, self.asks_to_save = self.asks_to_save, False
        return asked


def _is_ended_by_slurm() -> bool:
    """Whether this is a job that submitit has handed to Slurm."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


@contextmanager
def _handling(handler: Callable[[int], bool]) -> Iterator[None]:
    """Signals go to the handler. Once it has said of one of `STOPS` that it stops, a second one acts as before. Nothing
    happens outside the main thread, where signals cannot be caught."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (*STOPS, *WARNINGS)}

    def handle(number: int, frame: FrameType | None) -> None:
        if handler(number) and number in STOPS:
            for other in STOPS:
                signal.signal(other, previous[other])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A run's own request; SIGINT, SIGTERM and `WARNINGS` set it instead of killing. Behind it, `hand_over` gives a
    warning that stopped the run to whoever else handles it."""
    request = StopRequest()
    _OWED.clear()

    def ask(number: int) -> bool:
        if number == signal.SIGTERM and _is_ended_by_slurm():
            request.asks_to_save = True
            return False
        request.signal_name = request.signal_name or signal.Signals(number).name
        if number in WARNINGS:
            _OWED.append(number)
        return True

    with _handling(ask):
        yield request


def hand_over() -> bool:
    """Gives a warning that stopped the last run to the handler that was there before, such as submitit's, which ends
    the process; false where there is none. Raises whatever the handler does."""
    for number in dict.fromkeys(_OWED):
        if callable(signal.getsignal(number)):
            _OWED.clear()
            signal.raise_signal(number)
            return True
    return False


@contextmanager
def sweep_stops_together(folder: Path) -> Iterator[StopRequest]:
    """For the process that leads a sweep: signals create a stop file in a folder, on which every job saves and leaves.
    Its name is of this sweep alone: what another one left, perhaps under this process id, stops nobody."""
    stop_file = folder.absolute() / f".stop-{os.getpid()}-{secrets.token_hex(4)}"
    os.environ |= {STOP_FILE: str(stop_file), SWEEP_PROCESS: str(os.getpid())}
    stop_file.parent.mkdir(parents=True, exist_ok=True)

    def ask(number: int) -> bool:
        stop_file.touch()
        return True

    try:
        with _handling(ask):
            yield StopRequest()
    finally:
        stop_file.unlink(missing_ok=True)
        del os.environ[STOP_FILE], os.environ[SWEEP_PROCESS]


def stop_sweep() -> None:
    """Asks the other jobs of this job's sweep to stop too; nothing outside a sweep."""
    if stop_file := os.environ.get(STOP_FILE):
        Path(stop_file).touch()
