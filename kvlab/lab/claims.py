"""Claims of an experiment against published values, exact formulas or bounds: a table that passes or fails; and the
cells of the experiment's own table, of which they speak."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from rich.table import Table

from kvlab import terminal
from kvlab.lab.results import interval_half_width
from kvlab.units import counted


@dataclass(frozen=True)
class Claim:
    """One claim: what, what was published or is exact, what was found, and whether that is close enough."""

    what: str
    expected: str
    found: str
    passed: bool

    @classmethod
    def near(cls, what: str, expected: float, found: float, tolerance: float, unit: str = "") -> "Claim":
        """`found` within `tolerance` of `expected`."""
        passed = abs(found - expected) <= tolerance
        return cls(what, f"{expected:,.4g}{unit} ± {tolerance:.3g}", f"{found:,.4g}{unit}", passed)

    @classmethod
    def exact(cls, what: str, expected: int, found: int, unit: str = "") -> "Claim":
        """Equal integers."""
        return cls(what, f"{expected:,}{unit}", f"{found:,}{unit}", expected == found)


class Cells:
    """Columns of an experiment's table by its `task` and `variant`, in the order of `seed`; empty where nothing was
    run."""

    def __init__(self, frame: pd.DataFrame):
        self.frame = frame

    def __call__(self, task: str, variant: str, column: str = "value") -> list[float]:
        rows = self.frame.sort_values("seed")
        return [float(value) for value in rows[(rows.task == task) & (rows.variant == variant)][column]]

    def above(self, task: str, variant: str, other: str) -> tuple[float, float]:
        """By how much a variant's values are above another's, seed by seed: the mean, and half of its 95% interval.
        Raises ValueError where one has more seeds than the other."""
        both = zip(self(task, variant), self(task, other), strict=True)
        differences = [one - another for one, another in both]
        return statistics.fmean(differences), interval_half_width(differences)


def verdict(claims: Sequence[Claim], title: str = "") -> int:
    """Prints the table; returns the exit status, 1 if any claim failed."""
    table = Table("claim", "expected", "found", "", title=title or None, title_justify="left")
    for claim in claims:
        table.add_row(claim.what, claim.expected, claim.found, "pass" if claim.passed else "FAIL")
    console = terminal.console(width=120)
    console.print(table)
    num_failed = sum(not claim.passed for claim in claims)
    passed = len(claims) - num_failed
    console.print(f"{passed} of {counted(len(claims), 'claim')} {'passes' if passed == 1 else 'pass'}")
    return int(num_failed > 0)
