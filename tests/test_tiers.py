"""The tiers are true of the tests there are."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import CHILDREN, MARKERS, UNUSED_ROWS, mark, seconds_of_tests

BUDGETS = {"fast": 120.0, "ci": 850.0}
"""Processor seconds of a tier's tests that are known: two cores take half as long."""


class Collected:
    """A test as pytest collects it, by its id and its own markers."""

    def __init__(self, nodeid: str, *markers: str):
        self.nodeid, self.markers = nodeid, list(markers)

    def add_marker(self, name: str) -> None:
        self.markers.append(name)

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.markers else None


def test_every_row_and_every_second_is_of_a_test(pytestconfig: pytest.Config):
    assert not pytestconfig.stash[UNUSED_ROWS], "where a test has another name now, so must its row, and its seconds"
    assert set(CHILDREN.values()) <= {"fast", *MARKERS}


def test_a_tier_takes_what_it_is_meant_to():
    """By what was measured: a test that is new counts from the next measurement on."""
    seconds = seconds_of_tests()
    tests = [Collected(name) for name in seconds]
    mark(tests, CHILDREN, seconds)
    for tier, budget in BUDGETS.items():
        mine = [seconds[test.nodeid] for test in tests if test.markers == [tier] * (tier != "fast")]
        assert sum(mine) <= budget, f"{tier}: {sum(mine):.0f} s of the processor"


def test_cases_share_what_a_function_may_take(monkeypatch: pytest.MonkeyPatch):
    """The cheapest first, whatever their order; what is not known costs nothing, what was never measured is slow."""
    monkeypatch.setattr("tests.tiers.SHARES", {"fast": 2.0, "ci": 6.0})
    monkeypatch.setattr("tests.tiers.LONGEST", 15.0)
    seconds = {"a.py::f[1]": 2.5, "a.py::f[2]": 0.4, "a.py::f[3]": 0.6, "a.py::f[4]": 7.0, "a.py::f[5]": 2.0}
    seconds |= {"a.py::g": 12.0, "a.py::h": 40.0, "a.py::k[1]": math.inf, "a.py::k[2]": 4.0, "gone.py::f": 1.0}
    tests = {name: Collected(name) for name in [*seconds, "a.py::f[6]"] if name != "gone.py::f"}
    assert mark(tests.values(), {}, seconds) == ["gone.py::f"]
    assert {name.partition("::")[2]: "".join(test.markers) for name, test in tests.items()} == {
        "f[6]": "", "f[2]": "", "f[3]": "", "f[5]": "ci", "f[1]": "ci", "f[4]": "slow",
        "g": "ci", "h": "slow", "k[2]": "ci", "k[1]": "slow",
    }  # fmt: skip


def test_the_longest_row_counts_and_a_tests_own_marker_before_it():
    rows = {"a.py": "slow", "a.py::test_x": "ci", "a.py::test_x[m": "fast", "gone.py": "ci"}
    plain, other, more = Collected("a.py::test_y"), Collected("a.py::test_x[g]"), Collected("a.py::test_x[mha]")
    own, unnamed = Collected("a.py::test_x[9]", "generated"), Collected("b.py::test_z")
    assert mark([plain, other, more, own, unnamed], rows, {"a.py::test_x[mha]": 50.0}) == ["gone.py"]
    assert [test.markers for test in (plain, other, more, own, unnamed)] == [["slow"], ["ci"], [], ["generated"], []]


BUSY = """
import time
import pytest

@pytest.fixture
def busy():
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass

def test_busy(busy): ...
def test_idle(): time.sleep(0.3)
"""
CONFTEST = """
from pathlib import Path
from tests.timing import register

def pytest_configure(config):
    register(config, Path("seconds.json"))
"""


def test_what_tests_take_is_written_down(tmp_path):
    """Processor seconds, with fixtures; by workers as well. What was known stays, but of tests that ran."""
    (tmp_path / "test_it.py").write_text(BUSY)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    told = tmp_path / "seconds.json"
    told.write_text(json.dumps({"test_it.py::test_idle": 9.0, "test_it.py::test_other": None}))
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        f"--rootdir={tmp_path}",
        "-n",
        "2",
        "test_it.py",
    ]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    seconds = json.loads(told.read_text())
    assert seconds.keys() == {"test_it.py::test_busy", "test_it.py::test_other"}
    assert seconds["test_it.py::test_other"] is None
    assert 0.3 <= seconds["test_it.py::test_busy"] < 0.9
