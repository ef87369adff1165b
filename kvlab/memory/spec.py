"""What a layer must remember. A state is defined by what must stay live; everything else is derived from that.

`live(n)` is the set of token positions that must be readable to compute token n, as disjoint ascending ranges. Which pages
a step needs, which may be freed after it and how large a pool must be follow from it, here and nowhere else.
Plain Python, no JAX.
"""

import abc
import math
from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ArraySpec:
    """Name, shape (of one token, or of one sequence) and dtype of one stored array."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of one such array."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StateSpec(abc.ABC):
    """The state of one layer, as integers and dtypes. Abstract: a mixer that does not state its bytes cannot be built."""

    @property
    @abc.abstractmethod
    def arrays(self) -> tuple[ArraySpec, ...]:
        """What is stored: per token for token states, per sequence for recurrent ones."""

    @property
    @abc.abstractmethod
    def per_token(self) -> bool:
        """Whether `arrays` is per token (paged) or per sequence (one slot)."""

    @abc.abstractmethod
    def live(self, n: int) -> tuple[range, ...]:
        """Token positions that must be readable to compute token n; empty for states that are not addressed by token."""

    @property
    def unit_bytes(self) -> int:
        """Bytes of one token (token states) or of one sequence (recurrent states)."""
        return sum(array.num_bytes for array in self.arrays)

    def live_len(self, n: int) -> int:
        """How many tokens are live when token n is to be computed."""
        return sum(len(positions) for positions in self.live(n))

    def logical_bytes(self, n: int) -> int:
        """Bytes that must be held for one sequence of n tokens: what the published formulas count."""
        return self.unit_bytes * (self.live_len(n) if self.per_token else 1)


@dataclass(frozen=True)
class TokenState(StateSpec):
    """Keys and values of every live token: full attention, or a sliding window with sinks.

    live(n) = [0, n), or with a window w (which counts the current token) and s sinks: [0, s) and [max(s, n - w + 1), n).
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str = "float32"
    window: int | None = None
    num_sinks: int = 0

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        return (
            ArraySpec("keys", (self.num_kv_heads, self.key_dim), self.dtype),
            ArraySpec("values", (self.num_kv_heads, self.value_dim), self.dtype),
        )

    @property
    def per_token(self) -> bool:
        return True

    def live(self, n: int) -> tuple[range, ...]:
        if self.window is None:
            return (range(n),) if n else ()
        sinks = range(min(self.num_sinks, n))
        recent = range(max(self.num_sinks, n - self.window + 1), n)
        return tuple(positions for positions in (sinks, recent) if positions)


@dataclass(frozen=True)
class RecurrentState(StateSpec):
    """One state of constant size a sequence: a state-space layer, the history of a short convolution."""

    stored: tuple[ArraySpec, ...]

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        return self.stored

    @property
    def per_token(self) -> bool:
        return False

    def live(self, n: int) -> tuple[range, ...]:
        return ()


def pages_for_step(spec: StateSpec, start: int, num_new: int, page_size: int) -> tuple[int, ...]:
    """Logical pages that must be resident to compute and store tokens [start, start + num_new), ascending.

    The union of live(n) over the step's tokens is live(start) joined with the new tokens themselves: as n grows, live(n)
    forgets old tokens and never recalls one.
    """
    pages: set[int] = set()
    for positions in (*spec.live(start), range(start, start + num_new)):
        if positions:
            pages.update(range(positions.start // page_size, (positions.stop - 1) // page_size + 1))
    return tuple(sorted(pages))


def max_pages_for_step(spec: StateSpec, max_len: int, chunk_len: int, page_size: int) -> int:
    """The most pages one sequence of up to max_len tokens ever holds in steps of up to chunk_len tokens."""
    everything = -(-max_len // page_size)
    if not isinstance(spec, TokenState) or spec.window is None:
        return everything
    band = min(spec.window - 1 + chunk_len, max_len)  # a band of this length, at the worst alignment
    pages = (band + page_size - 2) // page_size + 1
    return min(everything, pages + -(-spec.num_sinks // page_size))
