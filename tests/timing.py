"""Writes down what tests take: `pytest -p tests.timing --seconds-to FILE`, and FILE is made or added to.

Seconds are of the processor, children's among them, so that a busy machine hardly changes them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LEAST = 0.2
"""Seconds of a test that is written down: of what takes less nobody asks."""


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
    """What the tests of a run took, by id."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, dict[str, float]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps what a worker, or this process, says."""
        if report.when == "teardown":
            self.seconds[report.nodeid] = dict(report.user_properties)["seconds"]

    def pytest_sessionfinish(self) -> None:
        """Adds this run to the file."""
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        for name, seconds in self.seconds.items():
            known.pop(name, None)
            if seconds >= LEAST:
                known[name] = round(seconds, 1)
        self.path.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Only where it is asked for, and once for all workers."""
    path = config.getoption("--seconds-to")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(path))
