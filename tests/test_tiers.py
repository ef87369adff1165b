"""The table of tiers is true of the tests there are."""

import pytest

from tests.tiers import MARKERS, TIER_OF, UNUSED_ROWS, mark


class Collected:
    """A test as pytest collects it, by its id and its own markers."""

    def __init__(self, nodeid: str, *markers: str):
        self.nodeid, self.markers = nodeid, list(markers)

    def add_marker(self, name: str) -> None:
        self.markers.append(name)

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.markers else None


def test_every_row_stands_for_a_test(pytestconfig: pytest.Config):
    assert not pytestconfig.stash[UNUSED_ROWS], "where a test has another name now, so must its row in tests/tiers.py"
    assert set(TIER_OF.values()) <= {"fast", *MARKERS}


def test_the_longest_row_counts_and_a_tests_own_marker_before_it():
    rows = {"a.py": "slow", "a.py::test_x": "ci", "a.py::test_x[*-8]": "fast", "gone.py": "ci"}
    plain, other, eight = Collected("a.py::test_y"), Collected("a.py::test_x[mha-4]"), Collected("a.py::test_x[mha-8]")
    own, unnamed = Collected("a.py::test_x[9]", "generated"), Collected("b.py::test_z")
    assert mark([plain, other, eight, own, unnamed], rows) == ["gone.py"]
    assert [test.markers for test in (plain, other, eight, own, unnamed)] == [["slow"], ["ci"], [], ["generated"], []]
