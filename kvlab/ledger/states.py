"""What a layer must remember. A state is defined by what must stay live; everything else is derived from that.

`live(n)` is the set of token positions that must be readable to compute token n, as disjoint ascending ranges. Which pages
a step needs, which are free after it, when a prefix hit is valid and how large a pool must be follow from it, here and
nowhere else. Plain Python, no JAX.

    state              live(n)                                        bytes
    full, latent       [0, n)                                         per token
    window w, s sinks  [0, s) and [max(s, n - w + 1), n)              per token
    chunked local c    [floor(n / c) * c, n)                          per token
    retrieval          [0, n); a step reads the index and what it selects
    recurrent          one state at n                                 per sequence
"""

import abc
import math
from dataclasses import dataclass

ITEM_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class ArraySpec:
    """Name, shape (of one token, or of one sequence) and dtype of one stored array; `is_scale` marks quantisation scales."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_scale: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BITS:
            raise ValueError(f"dtype = {self.dtype!r}: must be one of {', '.join(ITEM_BITS)}")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"{self.name}: shape = {self.shape}: every axis must be at least 1")
        if math.prod(self.shape) * ITEM_BITS[self.dtype] % 8:
            raise ValueError(f"{self.name}: {self.shape} of {self.dtype} does not fill whole bytes")

    @property
    def num_bytes(self) -> int:
        """Bytes of one such array."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


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

    def forgotten_at(self, position: int) -> int | None:
        """The first n with `position` outside live(n), or None: never. As n grows, live(n) recalls nothing it forgot."""
        return None

    @property
    def span(self) -> int | None:
        """The most tokens of live(n) that are no sinks; None: all of them."""
        return None

    @property
    def num_pinned(self) -> int:
        """Leading tokens that are never forgotten by a state that forgets: its sinks."""
        return 0

    @property
    def unit_bytes(self) -> int:
        """Bytes of one token (token states) or of one sequence (recurrent states)."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def scale_bytes(self) -> int:
        """How many of `unit_bytes` are quantisation scales."""
        return sum(array.num_bytes for array in self.arrays if array.is_scale)

    def live_len(self, n: int) -> int:
        """How many tokens are live when token n is to be computed."""
        return sum(len(positions) for positions in self.live(n))

    def logical_bytes(self, n: int) -> int:
        """Bytes that must be held for one sequence of n tokens: what the published formulas count."""
        return self.unit_bytes * (self.live_len(n) if self.per_token else 1)

    def read_bytes(self, n: int) -> int:
        """Bytes that computing token n reads: all that is live, unless the state selects."""
        return self.logical_bytes(n)


def _positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")


@dataclass(frozen=True)
class TokenState(StateSpec):
    """Keys and values of every live token: full attention, a sliding window with sinks, or chunked local attention.

    `window` counts the current token. With `chunk` c a token sees its own chunk only, so live(n) = [floor(n / c) * c, n).
    `scale_dtype` adds one scale a token and head to keys and to values, as 8 and 4 bit formats need.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str = "float32"
    window: int | None = None
    num_sinks: int = 0
    chunk: int | None = None
    scale_dtype: str | None = None

    def __post_init__(self) -> None:
        _positive(num_kv_heads=self.num_kv_heads, key_dim=self.key_dim, value_dim=self.value_dim)
        _positive(window=self.window, chunk=self.chunk)
        if self.num_sinks < 0 or (self.num_sinks and self.window is None):
            raise ValueError(f"num_sinks = {self.num_sinks}: must be at least 0, and 0 without a window")
        if self.window is not None and self.chunk is not None:
            raise ValueError(f"chunk = {self.chunk}: must be null beside window = {self.window}")

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        stored = (
            ArraySpec("keys", (self.num_kv_heads, self.key_dim), self.dtype),
            ArraySpec("values", (self.num_kv_heads, self.value_dim), self.dtype),
        )
        if self.scale_dtype is None:
            return stored
        scales = (ArraySpec(f"{one.name}_scale", (self.num_kv_heads,), self.scale_dtype, True) for one in stored)
        return (*stored, *scales)

    @property
    def per_token(self) -> bool:
        return True

    def live(self, n: int) -> tuple[range, ...]:
        if self.window is not None:
            sinks, recent = range(min(self.num_sinks, n)), range(max(self.num_sinks, n - self.window + 1), n)
            return tuple(positions for positions in (sinks, recent) if positions)
        first = n // self.chunk * self.chunk if self.chunk is not None else 0
        return (range(first, n),) if n > first else ()

    def forgotten_at(self, position: int) -> int | None:
        if self.window is not None:
            return None if position < self.num_sinks else position + self.window
        return None if self.chunk is None else (position // self.chunk + 1) * self.chunk

    @property
    def span(self) -> int | None:
        longest = self.chunk if self.window is None else self.window
        return None if longest is None else longest - 1

    @property
    def num_pinned(self) -> int:
        return self.num_sinks


@dataclass(frozen=True)
class LatentState(StateSpec):
    """One compressed vector and one rotary key a token, shared by all heads (MLA, arXiv 2405.04434)."""

    rank: int
    rope_dim: int
    dtype: str = "bfloat16"

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        return (ArraySpec("latents", (self.rank,), self.dtype), ArraySpec("rope_keys", (self.rope_dim,), self.dtype))

    @property
    def per_token(self) -> bool:
        return True

    def live(self, n: int) -> tuple[range, ...]:
        return (range(n),) if n else ()


@dataclass(frozen=True)
class RetrievalState(StateSpec):
    """Keys, values and an index entry of every token; a step reads the whole index and `num_selected` tokens of the rest."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    index_dim: int
    num_selected: int
    dtype: str = "bfloat16"

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        return (
            ArraySpec("keys", (self.num_kv_heads, self.key_dim), self.dtype),
            ArraySpec("values", (self.num_kv_heads, self.value_dim), self.dtype),
            ArraySpec("index", (self.index_dim,), self.dtype),
        )

    @property
    def per_token(self) -> bool:
        return True

    def live(self, n: int) -> tuple[range, ...]:
        return (range(n),) if n else ()

    def read_bytes(self, n: int) -> int:
        index_bytes = self.arrays[-1].num_bytes
        return n * index_bytes + min(n, self.num_selected) * (self.unit_bytes - index_bytes)


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


def live_pages(spec: StateSpec, n: int, page_size: int) -> tuple[range, ...]:
    """Logical pages with a token of live(n), as disjoint ascending ranges: what stays after a step, and what a prefix hit
    of n tokens must find resident."""
    pages: list[range] = []
    for positions in spec.live(n):
        one = range(positions.start // page_size, (positions.stop - 1) // page_size + 1)
        if pages and one.start < pages[-1].stop:
            pages[-1] = range(pages[-1].start, max(pages[-1].stop, one.stop))
        else:
            pages.append(one)
    return tuple(pages)


def page_forgotten_at(spec: StateSpec, page: int, page_size: int) -> int | None:
    """The first length n at which no slot of a full logical page is in live(n), so that the page is free; None: never."""
    if page * page_size < spec.num_pinned:
        return None
    return spec.forgotten_at((page + 1) * page_size - 1)


def max_pages_for_step(spec: StateSpec, max_len: int, chunk_len: int, page_size: int) -> int:
    """The most pages one sequence of up to max_len tokens ever holds in steps of up to chunk_len tokens: what admission
    tests, what sizes a pool, and the width of a page table. One definition, so that they cannot disagree."""
    everything = -(-max_len // page_size)
    if spec.span is None:
        return everything
    band = min(spec.span + chunk_len, max_len)  # a band of this length, at the worst alignment
    pages = (band + page_size - 2) // page_size + 1
    return min(everything, pages + -(-spec.num_pinned // page_size))
