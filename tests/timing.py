"""Writes down what tests take: `pytest --seconds-to FILE`, and FILE is made or added to.

Seconds are of the processor, children's among them, so that a busy machine hardly changes them."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LEAST = 0.2
"""Seconds of a test that is written down: of what takes less nobody asks."""
KEPT_EVERY_S = 10.0
"""How often the file is written: a run that is cut keeps what it knew."""
BEGAN = pytest.StashKey[float]()


def register(config: pytest.Config, path: Path) -> None:
    """Times the tests of this process, and where it is the one that workers report to, writes the file."""
    config.pluginmanager.register(Clock())
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(path))


def spent() -> float:
    """Processor seconds of this process and of the children that it waited for."""
    return sum(os.times()[:4])


class Clock:
    """Times each test with its fixtures, and gives it along as a property, which workers send to whoever started
    them."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Begins to count."""
        item.stash[BEGAN] = spent()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """The last report of a test says what it took."""
        report = yield
        if report.when == "teardown":
            report.user_properties.append(("seconds", spent() - item.stash[BEGAN]))
        return report


class Table:
    """What tests took, by id: what was known, and what this run adds as it goes."""

    def __init__(self, path: Path) -> None:
        self.path, self.kept_at = path, time.monotonic()
        self.known: dict[str, float | None] = json.loads(path.read_text()) if path.exists() else {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes what a worker, or this process, says; keeps it where the last time was a while ago."""
        if report.when == "teardown":
            seconds = dict(report.user_properties)["seconds"]
            self.known.pop(report.nodeid, None)
            if seconds >= LEAST:
                self.known[report.nodeid] = round(seconds, 1)
            if time.monotonic() - self.kept_at > KEPT_EVERY_S:
                self.pytest_sessionfinish()

    def pytest_sessionfinish(self) -> None:
        """Writes the file."""
        self.path.write_text(json.dumps(self.known, indent=0, sort_keys=True) + "\n")
        self.kept_at = time.monotonic()
