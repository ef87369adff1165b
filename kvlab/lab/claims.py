"""Claims of an experiment against published values, exact formulas or bounds: a table that passes or fails."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from kvlab import terminal
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
