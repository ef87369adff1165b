"""Ctrl-C, SIGTERM and the end of a sweep as a request: the loop finishes its device call, saves, and leaves."""

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


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved; the same command resumes it."""

    def __init__(self, reason: str):
        super().__init__(f"stopped by {reason}; the same command resumes")


class StopRequest:
    """Whether somebody asked to stop, and how: a signal, the sweep's stop file, or the death of the sweep's process."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
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


@contextmanager
def _handling(handler: Callable[[int], object]) -> Iterator[None]:
    """SIGINT and SIGTERM go to the handler once; a second one acts as before. Nothing happens outside the main thread,
    where signals cannot be caught."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def once(number: int, frame: FrameType | None) -> None:
        for other, old in previous.items():
            signal.signal(other, old)
        handler(number)

    for number in previous:
        signal.signal(number, once)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A run's own request; SIGINT and SIGTERM set it instead of killing."""
    request = StopRequest()

    def ask(number: int) -> None:
        request.signal_name = signal.Signals(number).name

    with _handling(ask):
        yield request


@contextmanager
def sweep_stops_together(folder: Path) -> Iterator[StopRequest]:
    """For the process that leads a sweep: SIGINT and SIGTERM create a stop file in a folder, on which every job saves
    and leaves. Its name is of this sweep alone: what another one left, perhaps under this process id, stops nobody."""
    stop_file = folder.absolute() / f".stop-{os.getpid()}-{secrets.token_hex(4)}"
    os.environ |= {STOP_FILE: str(stop_file), SWEEP_PROCESS: str(os.getpid())}
    stop_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _handling(lambda number: stop_file.touch()):
            yield StopRequest()
    finally:
        stop_file.unlink(missing_ok=True)
        del os.environ[STOP_FILE], os.environ[SWEEP_PROCESS]


def stop_sweep() -> None:
    """Asks the other jobs of this job's sweep to stop too; nothing outside a sweep."""
    if stop_file := os.environ.get(STOP_FILE):
        Path(stop_file).touch()
