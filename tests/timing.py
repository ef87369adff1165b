"""Writes down what tests take: `pytest -p tests.timing --seconds-to FILE`, and FILE is made or added to.

Seconds are of the processor, children's among them, so that a busy machine hardly changes them."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LEAST = 0.2
"""Seconds of a test that is written down: of what takes less nobody asks."""
KEPT_EVERY_S = 10.0
"""How often the file is written: a run that is cut keeps what it knew."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to."""
    parser.addoption("--seconds-to", type=Path, help="write what each test takes into this file, JSON")


def spent() -> float:
    """Processor seconds of this process and of the children that it waited for."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Times a test with its fixtures, and gives it along as a property, which workers send to whoever started them."""
    began = spent()
    item.stash[BEGAN] = began
    return (yield)


BEGAN = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[pytest.TestReport]:
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


def pytest_configure(config: pytest.Config) -> None:
    """Only where it is asked for, and once for all workers."""
    path = config.getoption("--seconds-to")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(path))
