"""Interrupts at chosen lines of the code under test."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvlab

HOUSE = str(Path(kvlab.__file__).parent)
TOOL = 4
"""An id of `sys.monitoring` that no debugger or coverage takes."""


class Interrupts:
    """While entered, KeyboardInterrupt is raised before the lines of kvlab that `places` counts, the first being 1. Any
    number of them: unlike a trace function, a monitor goes on when it has raised."""

    def __init__(self, *places: int):
        self.places, self.num_lines = frozenset(places), 0

    def __enter__(self):
        sys.monitoring.use_tool_id(TOOL, "interrupts")
        sys.monitoring.register_callback(TOOL, sys.monitoring.events.LINE, self._line)
        sys.monitoring.restart_events()
        sys.monitoring.set_events(TOOL, sys.monitoring.events.LINE)
        return self

    def __exit__(self, *_):
        sys.monitoring.set_events(TOOL, 0)
        sys.monitoring.register_callback(TOOL, sys.monitoring.events.LINE, None)
        sys.monitoring.free_tool_id(TOOL)

    def _line(self, code, _):
        if not code.co_filename.startswith(HOUSE):
            return sys.monitoring.DISABLE
        self.num_lines += 1
        if self.num_lines in self.places:
            raise KeyboardInterrupt
        return None


def num_lines(call: Callable[[], Any]) -> int:
    """Lines of kvlab that a call runs, and with it the places to interrupt it at."""
    with Interrupts() as counted:
        call()
    return counted.num_lines


def interrupted(call: Callable[[], Any], *places: int) -> bool:
    """Whether the call was cut short by the interrupts at these places; what it answers is let go of."""
    with Interrupts(*places):
        try:
            call()
        except KeyboardInterrupt:
            return True
    return False
