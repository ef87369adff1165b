"""Which tokens a token sees: the mask, said once. Plain Python, used by kvlab's ledger and by every kernel.

`live(n)` are the token positions that must be readable to compute token n; `sees` is the same said of one pair, for the
arrays of a kernel.

    Visible()                     [0, n]
    window w, s sinks             [0, s) and (n - w, n]
    chunk c                       [floor(n / c) * c, n]
"""

from dataclasses import dataclass
from typing import Any

NOWHERE = 2**30
"""First position of an unused page-table entry: later than every query, so none of its slots is ever visible. Options
lie below it, so that positions plus options fit in int32."""


@dataclass(frozen=True)
class Visible:
    """Causal visibility. `window` counts visible tokens, the current one included; the first `num_sinks` tokens stay
    visible behind it. With `chunk` c a token sees its own chunk of c tokens only. Static: hashable, and equal if the
    fields are."""

    window: int | None = None
    num_sinks: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_sinks", _whole("num_sinks", self.num_sinks, 0))
        for name in ("window", "chunk"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _whole(name, getattr(self, name), 1))
        if self.num_sinks and self.window is None:
            raise ValueError(f"num_sinks = {self.num_sinks}: must be 0 without a window")
        if self.window is not None and self.chunk is not None:
            raise ValueError(f"chunk = {self.chunk}: must be None beside window = {self.window}")

    def live(self, n: int) -> tuple[range, ...]:
        """Positions before n that token n sees, as disjoint ascending ranges."""
        if self.window is not None:
            sinks, recent = range(min(self.num_sinks, n)), range(max(self.num_sinks, n - self.window + 1), n)
            return tuple(positions for positions in (sinks, recent) if positions)
        first = n // self.chunk * self.chunk if self.chunk is not None else 0
        return (range(first, n),) if n > first else ()

    def sees(self, query: Any, key: Any) -> Any:
        """Whether the token at position `query` sees the one at `key`; elementwise of arrays, which broadcast."""
        seen = key <= query
        if self.span is None:
            return seen
        recent = key >= self.earliest(query)
        return seen & ((recent | (key < self.num_sinks)) if self.num_sinks else recent)

    def earliest(self, query: Any) -> Any:
        """The first position that the token at `query` sees, sinks apart; elementwise. May be negative behind a
        window."""
        if self.window is not None:
            return query - self.window + 1
        return query * 0 if self.chunk is None else query - query % self.chunk

    def forgotten_at(self, position: int) -> int | None:
        """The first n that does not see `position`, or None: never. As n grows, live(n) recalls nothing it forgot."""
        if self.window is not None:
            return None if position < self.num_sinks else position + self.window
        return None if self.chunk is None else (position // self.chunk + 1) * self.chunk

    @property
    def span(self) -> int | None:
        """The most tokens of live(n) that are no sinks; None: all of them."""
        longest = self.chunk if self.window is None else self.window
        return None if longest is None else longest - 1


def _whole(name: str, value: Any, lowest: int) -> int:
    """A field as an int. Raises ValueError where it is none, or out of range."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} = {value!r}: must be a whole number")
    if not lowest <= value < NOWHERE:
        raise ValueError(f"{name} = {value}: must be at least {lowest} and below {NOWHERE}")
    return int(value)


CAUSAL = Visible()
"""Every token sees all before it, and itself."""
