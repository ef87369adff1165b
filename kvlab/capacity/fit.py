"""What does not fit, and how many chips would do."""

from collections.abc import Callable
from dataclasses import replace

from kvlab.capacity.config import CapacityConfig
from kvlab.schema import ConfigError

MAX_CHIPS = 1 << 16


class DoesNotFit(ConfigError):
    """The weights, or one sequence beside them, have no room on these chips. `chips` of the same kind would do (null:
    not so many as can be asked for)."""

    chips: int | None = None

    def answered(self, chips: int | None, word: str) -> "DoesNotFit":
        """The same with what would do, as it is written."""
        said = f"; hardware={word} would do" if chips else f"; {MAX_CHIPS:,} chips would not do"
        found = DoesNotFit(self.name, self.value, self.legal + said)
        found.chips = chips
        return found


def fewest_chips(config: CapacityConfig, try_it: Callable[[CapacityConfig], object]) -> int | None:
    """The fewest chips, of more than there are, for which `try_it` does not raise `DoesNotFit`."""

    def fits(chips: int) -> bool:
        try:
            try_it(replace(config, hardware=config.hardware.with_chips(chips)))
        except DoesNotFit:
            return False
        return True

    low = config.hardware.total_chips
    high = 2 * low
    while high <= MAX_CHIPS and not fits(high):
        low, high = high, 2 * high
    if high > MAX_CHIPS:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
