"""What a layer must remember. A state is defined by what must stay live; everything else is derived from that.

A state says what is stored (`arrays`) and what a token sees (`visible`, the mask that kernels apply). From the mask
follows live(n): the token positions that must be readable to compute token n. From live(n) follow which pages a step
needs, which are free after it, when a prefix hit is valid and how large a pool must be. Plain Python, no JAX.

    state              live(n)                                        bytes
    full, latent       [0, n)                                         per token
    window w, s sinks  [0, s) and [max(s, n - w + 1), n)              per token
    chunked local c    [floor(n / c) * c, n)                          per token
    retrieval          [0, n); a step reads the index and what it selects
    recurrent          one state at n                                 per sequence
"""

import abc
import math
from dataclasses import dataclass, field, replace
from typing import Self

from kvlab.ledger.readers import Readers
from kvlab.ledger.reading import Reading
from pallas_kernels.visible import Visible

ITEM_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int32": 32, "fp8": 8, "int8": 8, "int4": 4, "int2": 2}
QUANTISED = ("int8", "fp8", "int4", "int2")
"""The formats of `pallas_kernels.formats`: numbers that stand beside scales."""
ROTATED = {"rotated8": "int8", "rotated4": "int4"}
"""Formats of keys and values that are turned before they are quantised (`kvlab.memory.rotation`), and what to."""
BY_CHANNEL = ".channel"
FORMATS = ("model", *QUANTISED, *(name + BY_CHANNEL for name in QUANTISED))
"""How a memory can store a state: as declared, or quantised with a scale for each token, or for each channel of a
page."""

EVERYTHING = Visible()
"""The mask of full attention: [0, n]."""


@dataclass(frozen=True)
class ArraySpec:
    """Name, shape and dtype of one stored array. The shape is of one token, of one sequence, or, with `per_page`, of
    one page whatever its size. `is_scale` marks quantisation scales, `is_statistics` what a memory notes of its pages,
    to choose which are read. An axis of int4 or int2 counts numbers, two or four of which share a byte."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_scale: bool = False
    per_page: bool = False
    is_statistics: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BITS:
            raise ValueError(f"dtype = {self.dtype!r}: must be one of {', '.join(ITEM_BITS)}")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"{self.name}: shape = {self.shape}: every axis must be at least 1")
        if ITEM_BITS[self.dtype] < 8 and self.shape[-1] * ITEM_BITS[self.dtype] % 8:
            raise ValueError(f"{self.name}: {self.shape} of {self.dtype} does not fill whole bytes")

    @property
    def num_bytes(self) -> int:
        """Bytes of one such array."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8

    def quantised(self, format: str, scale_dtype: str) -> tuple["ArraySpec", "ArraySpec"]:
        """This array [K, D] in a quantised format of `FORMATS`, and its scales: [K] a token, or [K, D] a page."""
        number, by_channel = format.removesuffix(BY_CHANNEL), format.endswith(BY_CHANNEL)
        shape = self.shape if by_channel else self.shape[:1]
        scales = ArraySpec(f"{self.name}_scale", shape, scale_dtype, is_scale=True, per_page=by_channel)
        return replace(self, dtype=number), scales


@dataclass(frozen=True, kw_only=True)
class State(abc.ABC):
    """The state of one layer, as integers and dtypes. Abstract: a mixer that does not state its bytes cannot be built.

    `visible` is what a token sees; None: there is one state a sequence, and it is not addressed by token. `reading`
    says how many pages of it a step reads; None: all that are live. A memory sets it, no mixer does.
    """

    visible: Visible | None
    reading: Reading | None = None

    @property
    @abc.abstractmethod
    def arrays(self) -> tuple[ArraySpec, ...]:
        """What is stored: per token for token states, per sequence for recurrent ones."""

    @abc.abstractmethod
    def stored(self, format: str) -> Self:
        """The same state as a memory of this format stores it. Raises ValueError for what is no format of `FORMATS`."""

    @property
    def per_token(self) -> bool:
        """Whether `arrays` is per token (paged) or per sequence (one slot)."""
        return self.visible is not None

    def live(self, n: int) -> tuple[range, ...]:
        """Token positions that must be readable to compute token n; empty for states that are not addressed by
        token."""
        return self.visible.live(n) if self.visible is not None else ()

    def forgotten_at(self, position: int) -> int | None:
        """The first n with `position` outside live(n), or None: never. As n grows, live(n) recalls nothing it
        forgot."""
        return self.visible.forgotten_at(position) if self.visible is not None else None

    @property
    def span(self) -> int | None:
        """The most tokens of live(n) that are no sinks; None: all of them."""
        return self.visible.span if self.visible is not None else None

    @property
    def num_pinned(self) -> int:
        """Leading tokens that are never forgotten by a state that forgets: its sinks."""
        return self.visible.num_sinks if self.visible is not None else 0

    @property
    def num_readers(self) -> int:
        """Layers that read it."""
        return 1

    @property
    def unit_bytes(self) -> int:
        """Bytes of one token (token states) or of one sequence (recurrent states); what a page has once is not in
        it."""
        return sum(array.num_bytes for array in self.arrays if not array.per_page)

    @property
    def scale_bytes(self) -> int:
        """How many of `unit_bytes` are quantisation scales."""
        return sum(array.num_bytes for array in self.arrays if array.is_scale and not array.per_page)

    @property
    def per_page_bytes(self) -> int:
        """Bytes that a page has once, whatever its size: scales by channel, and what is noted of it."""
        return sum(array.num_bytes for array in self.arrays if array.per_page)

    @property
    def index_bytes(self) -> int:
        """How many of `per_page_bytes` are statistics, from which a step chooses what it reads."""
        return sum(array.num_bytes for array in self.arrays if array.is_statistics)

    def page_bytes(self, page_size: int) -> int:
        """Bytes of one page."""
        return self.unit_bytes * page_size + self.per_page_bytes

    def live_len(self, n: int) -> int:
        """How many tokens are live when token n is to be computed."""
        return sum(len(positions) for positions in self.live(n))

    def logical_bytes(self, n: int, page_size: int | None = None) -> int:
        """Bytes that must be held for one sequence of n tokens: what the published formulas count. Raises ValueError
        without a page size where every page has bytes of its own."""
        return self.unit_bytes * (self.live_len(n) if self.per_token else 1) + self._bytes_of_pages(n, page_size)

    def read_bytes(self, n: int, page_size: int | None = None) -> int:
        """Bytes that computing token n reads, once for each layer that does: all that is live, unless the state
        selects."""
        return self.logical_bytes(n, page_size)

    def _bytes_of_pages(self, n: int, page_size: int | None) -> int:
        """What the pages with a token of live(n) have once each."""
        if not self.per_page_bytes:
            return 0
        if page_size is None and self.reading is not None:
            page_size = self.reading.page_size
        if page_size is None:
            legal = f"must be given, since a page has {self.per_page_bytes} bytes of its own"
            raise ValueError(f"page_size = None: {legal}")
        return self.per_page_bytes * sum(len(pages) for pages in live_pages(self, n, page_size))


def _positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format = {format!r}: must be one of {', '.join(FORMATS)}")


@dataclass(frozen=True, kw_only=True)
class PerToken(State):
    """A state of which every token has its own; `format`, one of `FORMATS`, is what the memory makes of it. `readers`
    are the queries that read it; None: nobody said, so that a memory cannot weigh tokens by them. `index` is what a
    memory notes of every page, beside the tokens."""

    visible: Visible = EVERYTHING
    format: str = "model"
    readers: Readers | None = None
    index: tuple[ArraySpec, ...] = ()

    def __post_init__(self) -> None:
        _check_format(self.format)
        if not all(array.per_page and array.is_statistics for array in self.index):
            raise ValueError(f"index = {self.index}: must be statistics of pages")
        if self.reading is not None and self.span is not None:
            raise ValueError(f"reading = {self.reading}: must be None for a state that forgets by itself")

    @property
    def soft_cap(self) -> float | None:
        """c, where readers map a scaled score s to c * tanh(s / c)."""
        return None if self.readers is None else self.readers.soft_cap

    def scale(self, query_dim: int) -> float:
        """What readers multiply products of queries and keys with: query_dim ** -0.5, unless they say otherwise."""
        given = None if self.readers is None else self.readers.scale
        return query_dim**-0.5 if given is None else given

    @property
    def num_readers(self) -> int:
        """Layers that read it."""
        return 1 if self.readers is None else self.readers.num_layers

    def stored(self, format: str) -> Self:
        if format in ROTATED:
            raise ValueError(f"{type(self).__name__} is not rotated: only keys and values of attention are")
        return replace(self, format=format)

    def read_bytes(self, n: int, page_size: int | None = None) -> int:
        return self.num_readers * self._read_by_one(n, page_size)

    def _read_by_one(self, n: int, page_size: int | None) -> int:
        """The bytes that one layer reads."""
        reading = self.reading
        if reading is None:
            return self.logical_bytes(n, page_size)
        num_pages, num_slots = -(-n // reading.page_size), reading.slots_read(n)
        keys = [array for array in self.arrays if array.name in ("keys", "keys_scale") and not array.per_page]
        looked_at = (n - num_slots) * sum(array.num_bytes for array in keys) if reading.reads_keys else 0
        of_pages = min(num_pages, -(-num_slots // reading.page_size)) * (self.per_page_bytes - self.index_bytes)
        return num_pages * self.index_bytes + looked_at + num_slots * self.unit_bytes + of_pages


def _in_format(arrays: tuple[ArraySpec, ...], format: str, scale_dtype: str) -> tuple[ArraySpec, ...]:
    """Arrays in a format: all of them, then the scales of all."""
    if format == "model":
        return arrays
    pairs = [array.quantised(format, scale_dtype) for array in arrays]
    return (*(payload for payload, _ in pairs), *(scales for _, scales in pairs))


@dataclass(frozen=True)
class TokenState(PerToken):
    """Keys and values of every visible token: full attention, a sliding window with sinks, or chunked local attention.

    `dtype` is the model's. What is quantised has scales of `scale_dtype`; our kernels take float32. With `is_rotated`
    what is stored are keys and values that were turned (QuaRot, arXiv 2404.00456).
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str = "float32"
    scale_dtype: str = "float32"
    is_rotated: bool = False

    def __post_init__(self) -> None:
        _positive(num_kv_heads=self.num_kv_heads, key_dim=self.key_dim, value_dim=self.value_dim)
        if self.is_rotated and (self.key_dim % 2 or self.value_dim % 2):
            dims = f"key_dim = {self.key_dim}, value_dim = {self.value_dim}"
            raise ValueError(f"{dims}: must be even to be rotated, by blocks of the largest power of two in them")
        super().__post_init__()

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        keys = ArraySpec("keys", (self.num_kv_heads, self.key_dim), self.dtype)
        values = ArraySpec("values", (self.num_kv_heads, self.value_dim), self.dtype)
        return (*_in_format((keys, values), self.format, self.scale_dtype), *self.index)

    def stored(self, format: str) -> Self:
        return replace(self, format=ROTATED.get(format, format), is_rotated=format in ROTATED)

    def of_heads(self, count: int) -> Self:
        """The state of as many of its KV heads, with their share of the query heads."""
        readers = self.readers
        if readers is not None:
            readers = replace(readers, num_heads=readers.num_heads // self.num_kv_heads * count)
        return replace(self, num_kv_heads=count, readers=readers)


@dataclass(frozen=True)
class LatentState(PerToken):
    """One row a token, shared by all heads (MLA, arXiv 2405.04434): a compressed vector of `rank` numbers, which serve
    as values too, and a rotary key of `rope_dim` behind them. It is stored once, as keys of one head."""

    rank: int
    rope_dim: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _positive(rank=self.rank, rope_dim=self.rope_dim)
        super().__post_init__()

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        rows = ArraySpec("keys", (1, self.rank + self.rope_dim), self.dtype)
        return (*_in_format((rows,), self.format, "float32"), *self.index)


@dataclass(frozen=True)
class RetrievalState(PerToken):
    """Keys, values and an index key of every token; a step reads the whole index and `num_selected` tokens of the rest,
    with `index_block` in whole blocks of as many tokens, of which its own block holds no more than there are. The index
    is of the model's type in every format."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    index_dim: int
    num_selected: int
    dtype: str = "bfloat16"
    index_block: int = 0

    def __post_init__(self) -> None:
        _positive(num_kv_heads=self.num_kv_heads, key_dim=self.key_dim, value_dim=self.value_dim)
        _positive(index_dim=self.index_dim, num_selected=self.num_selected)
        if self.index_block and (self.num_selected % self.index_block or self.num_selected < 2 * self.index_block):
            legal = f"must be 0, or go into num_selected = {self.num_selected} twice or more, without a rest"
            raise ValueError(f"index_block = {self.index_block}: {legal}")
        if self.index_block and self.span is not None:
            raise ValueError(f"index_block = {self.index_block}: must be 0 for a state that forgets by itself")
        if self.reading is not None or self.index:
            raise ValueError(f"reading = {self.reading}: must be None for a state that selects by itself")
        super().__post_init__()

    @property
    def _index(self) -> ArraySpec:
        return ArraySpec("index", (1, self.index_dim), self.dtype)

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        keys = ArraySpec("keys", (self.num_kv_heads, self.key_dim), self.dtype)
        values = ArraySpec("values", (self.num_kv_heads, self.value_dim), self.dtype)
        return (*_in_format((keys, values), self.format, "float32"), self._index)

    def _read_by_one(self, n: int, page_size: int | None) -> int:
        num_live = self.live_len(n)
        rest_of_own = self.index_block - n % self.index_block if self.index_block else 0
        selected = min(num_live, self.num_selected - rest_of_own)
        index_bytes = self._index.num_bytes
        selected_bytes = selected * (self.unit_bytes - index_bytes)
        return num_live * index_bytes + selected_bytes + self._bytes_of_pages(n, page_size)


@dataclass(frozen=True)
class RecurrentState(State):
    """One state of constant size a sequence: a state-space layer, the history of a short convolution."""

    parts: tuple[ArraySpec, ...]
    visible: None = field(default=None, init=False)
    reading: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts = (): must be at least one array")

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        return self.parts

    def stored(self, format: str) -> Self:
        """Itself: what every step rewrites stays in the model's type, whatever the format."""
        _check_format(ROTATED.get(format, format))
        return self


def live_pages(spec: State, n: int, page_size: int) -> tuple[range, ...]:
    """Logical pages with a token of live(n), as disjoint ascending ranges: what stays after a step, and what a prefix
    hit of n tokens must find resident."""
    pages: list[range] = []
    for positions in spec.live(n):
        run = range(positions.start // page_size, (positions.stop - 1) // page_size + 1)
        if pages and run.start < pages[-1].stop:
            pages[-1] = range(pages[-1].start, max(pages[-1].stop, run.stop))
        else:
            pages.append(run)
    return tuple(pages)


def page_forgotten_at(spec: State, page: int, page_size: int) -> int | None:
    """The first length n at which no slot of a full logical page is in live(n), so that the page is free; None:
    never."""
    if page * page_size < spec.num_pinned:
        return None
    return spec.forgotten_at((page + 1) * page_size - 1)


def max_pages_for_step(spec: State, max_len: int, chunk_len: int, page_size: int) -> int:
    """The most pages one sequence of up to max_len tokens ever holds in steps of up to chunk_len tokens: what admission
    tests, what sizes a pool, and the width of a page table. One definition, so that they cannot disagree."""
    everything = -(-max_len // page_size)
    if spec.span is None:
        return everything
    band = min(spec.span + chunk_len, max_len)  # a band of this length, at the worst alignment
    pages = (band + page_size - 2) // page_size + 1
    return min(everything, pages + -(-spec.num_pinned // page_size))
