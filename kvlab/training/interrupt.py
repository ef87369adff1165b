"""Ctrl-C and SIGTERM as a request: the loop finishes its device call, saves, and leaves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved; the same command resumes it."""

    def __init__(self, signal_name: str):
        super().__init__(f"stopped by {signal_name}; the same command resumes")
        self.signal_name = signal_name


class StopRequest:
    """Whether somebody asked to stop, and how."""

    signal_name: str | None = None

    def check(self) -> None:
        """Raises `Interrupted` if a stop was requested; call it only where everything is saved."""
        if self.signal_name:
            raise Interrupted(self.signal_name)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM set the request instead of killing; a second one kills as usual. Outside the main thread signals
    cannot be caught, and nothing changes."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        for other in signals:
            signal.signal(other, previous[other])

    for number in signals:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
