"""Numbers with their units and nouns, as people read them; and the sizes that they are rounded up to."""

from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """A number that was sampled: its median and quartiles over `num_samples`."""

    median: float
    low: float
    high: float
    num_samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Quartiles are interpolated linearly."""
        ordered = sorted(samples)

        def at(share: float) -> float:
            place = share * (len(ordered) - 1)
            below = int(place)
            above = min(below + 1, len(ordered) - 1)
            return ordered[below] + (place - below) * (ordered[above] - ordered[below])

        return cls(at(0.5), at(0.25), at(0.75), len(ordered))


UNTIMED = Spread(0.0, 0.0, 0.0, 0)
"""Of what nobody timed."""


def human_bytes(count: int | float) -> str:
    """1536 as "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def readable(value: int | float) -> str:
    """A number as a table shows it: 12345 as "12,345", 0.00097 as "0.0010", 4.5351 as "4.535", 1234.5 as "1,234"; what
    four decimals do not tell from zero as "2.1e-06"."""
    size = abs(value)
    if isinstance(value, int) or size >= 1000 or value == 0:
        return f"{value:,.0f}"
    if size < 5e-5:
        return f"{value:.1e}"
    decimals = 4 if size < 1 else 3 if size < 10 else 2 if size < 100 else 1
    return f"{value:,.{decimals}f}"


def counted(count: int | float, noun: str, plural: str | None = None) -> str:
    """1 as "1 page", 2 as "2 pages", 1024 as "1,024 pages"; `plural` is for nouns that take more than an s."""
    return f"{count:,.0f} {noun if count == 1 else plural or f'{noun}s'}"


def power_of_two(least: int) -> int:
    """The least power of two that is not below `least`, and at least 1: what sizes are padded to, so that few shapes
    are compiled."""
    return 1 << max(0, least - 1).bit_length()
