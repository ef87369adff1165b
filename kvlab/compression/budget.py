"""How much of a sequence a memory may keep: slots, a fraction of the prompt, or bytes."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from kvlab.schema import ConfigError
from kvlab.units import counted

LEGAL = "must be slots (256), a fraction of the prompt in (0, 1] (0.25), or bytes a sequence (64KiB)"
_UNITS = {"B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(B|[KMG]i?B)", re.IGNORECASE)


def slots_of(fraction: float, prompt_len: int) -> int:
    """Slots that a fraction of a prompt is."""
    return math.floor(fraction * prompt_len + 1e-9)


def share_that_fits(fraction: float, prompt_len: int, all_lens: Iterable[int]) -> int:
    """Sinks, and as many recent slots, that leave a method a choice: half of what is kept of such a prompt at most, and
    no more than the fraction keeps of any prompt; 0: there is no such number."""
    lens = list(all_lens)
    for share in range(slots_of(fraction, prompt_len) // 4, 0, -1):
        if not any(slots_of(fraction, each) < 2 * share < each for each in lens):
            return share
    return 0


@dataclass(frozen=True)
class Budget:
    """One of three, the others None: `slots` a (layer, head), a `fraction` of the prompt, `num_bytes` a sequence."""

    slots: int | None = None
    fraction: float | None = None
    num_bytes: int | None = None

    @classmethod
    def of(cls, value: object) -> "Budget":
        """From a config: 256, 0.25 or "64KiB". Raises ConfigError for anything else."""
        if isinstance(value, str):
            try:
                if found := _BYTES.fullmatch(value.strip()):
                    num_bytes = math.floor(float(found[1]) * _UNITS[found[2].upper()])
                    if num_bytes > 0:
                        return cls(num_bytes=num_bytes)
                value = float(value) if "." in value else int(value)
            except (ValueError, OverflowError):
                raise ConfigError("budget", value, LEGAL) from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError("budget", value, LEGAL)
        if isinstance(value, int) and value >= 1:
            return cls(slots=value)
        if isinstance(value, float) and 0 < value <= 1:
            return cls(fraction=value)
        raise ConfigError("budget", value, LEGAL)

    def __str__(self) -> str:
        if self.num_bytes is not None:
            return counted(self.num_bytes, "byte")
        return counted(self.slots, "slot") if self.slots is not None else f"{self.fraction:g} of the prompt"
