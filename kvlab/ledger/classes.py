"""State classes: layers whose states have equal specs share page ids and one page table."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvlab.ledger.memory_states import SealedState, Statistics
from kvlab.ledger.retention import Retention, Sealing
from kvlab.ledger.states import State, max_pages_for_step
from kvlab.schema import nearest
from kvlab.units import power_of_two


class Lengths(NamedTuple):
    """What is known of a sequence when it begins: its prompt, and the length it will reach (the oracle's knowledge)."""

    prompt_len: int
    final_len: int


def _pow2(lengths: Lengths, max_len: int) -> int:
    output_len = lengths.final_len - lengths.prompt_len
    return min(max_len, lengths.prompt_len + power_of_two(output_len))


RESERVATIONS: dict[str, Callable[[Lengths, int], int]] = {
    "max": lambda lengths, max_len: max_len,
    "pow2": _pow2,
    "oracle": lambda lengths, max_len: min(max_len, lengths.final_len),
}
"""Slots that a contiguous sequence reserves: the maximum length; the prompt and the output rounded up to a power of
two; exactly what it will use."""


@dataclass(frozen=True)
class StateClass:
    """A pool's description.

    `page_size` is token slots a page (1 for recurrent states); `num_pages` counts the null page where there is one;
    `page_bytes` is one page of all the class's layers. With a `reservation` ("max", "pow2", "oracle") a sequence holds
    one contiguous run of pages from its first token on, as caches did before paging. `num_host_pages` is room to swap
    to. With a `retention` sequences are compacted: they store fewer slots than they have tokens.
    """

    name: str
    spec: State
    page_size: int
    num_pages: int
    table_len: int
    num_layers: int = 1
    reservation: str | None = None
    num_host_pages: int = 0
    retention: Retention | None = None
    sealing: Sealing | None = None
    sealed_name: str = ""
    """The class that takes the pages which this one seals."""

    def __post_init__(self) -> None:
        for field, low in (("page_size", 1), ("table_len", 1), ("num_layers", 1), ("num_host_pages", 0)):
            value = getattr(self, field)
            if type(value) is not int or value < low:
                raise ValueError(f"{self.name}: {field} = {value}: must be at least {low}")
        if not self.spec.per_token and (self.page_size, self.table_len) != (1, 1):
            sizes = f"page_size = {self.page_size}, table_len = {self.table_len}"
            raise ValueError(f"{self.name}: {sizes}: must be 1 and 1 for a recurrent state")
        if type(self.num_pages) is not int or self.num_pages < 1 + self.has_null_page:
            legal = f"must be at least {1 + self.has_null_page}{', the null page counted' * self.has_null_page}"
            raise ValueError(f"{self.name}: num_pages = {self.num_pages}: {legal}")
        if self.reservation is not None and self.reservation not in RESERVATIONS:
            raise ValueError(
                f"{self.name}: reservation = {self.reservation!r}: {nearest(self.reservation, RESERVATIONS)}"
            )
        if self.reservation is not None and not self.spec.per_token:
            raise ValueError(f"{self.name}: reservation = {self.reservation!r}: recurrent states take none")
        if self.spec.reading is not None and (not self.paged or self.spec.reading.page_size != self.page_size):
            legal = f"must be None, or of pages of {self.page_size} slots that are given on demand"
            raise ValueError(f"{self.name}: reading = {self.spec.reading}: {legal}")
        if self.retention is not None and not self.compactable:
            raise ValueError(f"{self.name}: retention = {self.retention}: must be None for a class that never compacts")

    @functools.cached_property
    def contiguous(self) -> bool:
        """Whether a sequence holds one run of pages up to a length fixed when it began."""
        return self.reservation is not None

    @functools.cached_property
    def paged(self) -> bool:
        """Whether pages are tokens' and given on demand."""
        return self.spec.per_token and not self.contiguous

    @functools.cached_property
    def compactable(self) -> bool:
        """Whether a sequence may store fewer slots than it has tokens: pages are given on demand, and none is
        forgotten."""
        return self.paged and self.spec.span is None and not self.is_sealed

    @functools.cached_property
    def is_sealed(self) -> bool:
        """Whether pages come full from another class, and steps write none."""
        return isinstance(self.spec, SealedState)

    @functools.cached_property
    def has_null_page(self) -> bool:
        """Page 0 of a paged pool is never written, so that padded table entries are safe to read."""
        return self.paged

    @functools.cached_property
    def num_usable(self) -> int:
        """Pages that sequences can hold."""
        return self.num_pages - self.has_null_page

    @functools.cached_property
    def unused_page(self) -> int:
        """What an unused table entry holds: the null page, or a page out of range."""
        return 0 if self.has_null_page else self.num_pages

    @functools.cached_property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers of the class."""
        return self.spec.page_bytes(self.page_size) * self.num_layers

    @property
    def pool_bytes(self) -> int:
        """Bytes of the class's arrays, the null page included."""
        return self.page_bytes * self.num_pages

    @functools.cached_property
    def is_statistics(self) -> bool:
        """Whether the memory itself writes it, beside what it compacts."""
        return isinstance(self.spec, Statistics)

    @functools.cached_property
    def until_compacted(self) -> bool:
        """Whether a sequence lets go of it at the compaction behind its prompt."""
        return isinstance(self.spec, Statistics) and self.spec.until_compacted

    def max_pages(self, max_len: int, chunk_len: int, prompt_len: int | None = None) -> int:
        """The most pages a sequence holds that grows to max_len tokens in steps of chunk_len: the one definition of
        fit. With a retention it is compacted on the way; without a `prompt_len` that is the worst of all prompts."""
        if not self.paged:
            return 1
        if self.is_sealed:
            return max_len // self.page_size
        if self.sealing is not None and prompt_len is not None:
            max_len = self.sealing.most(prompt_len, max_len)
        elif self.sealing is not None:
            max_len = self.sealing.most_of_any(max_len)
        elif self.retention is not None and prompt_len is not None:
            max_len = self.retention.most(prompt_len, max_len, chunk_len)
        elif self.retention is not None:
            max_len = self.retention.most_of_any(max_len, chunk_len)
        return max_pages_for_step(self.spec, max_len, chunk_len, self.page_size)

    def stored_pages(self, max_len: int, chunk_len: int) -> int:
        """The most pages a sequence holds that grows to max_len stored slots and is compacted by nobody on the way."""
        if self.is_sealed:
            return max_len // self.page_size
        return max_pages_for_step(self.spec, max_len, chunk_len, self.page_size) if self.paged else 1

    @functools.cached_property
    def num_pinned_pages(self) -> int:
        """Leading pages that hold sinks and are never freed."""
        return -(-self.spec.num_pinned // self.page_size)

    def table_index(self, page: int) -> int:
        """Where a logical page stands in a sequence's table row: sinks first, the rest in a ring that never
        collides."""
        if page < self.table_len:
            return page
        return self.num_pinned_pages + (page - self.num_pinned_pages) % (self.table_len - self.num_pinned_pages)


def checked(classes: Sequence[StateClass], max_len: int, chunk_len: int, page_size: int) -> int:
    """The page size of a ledger's index: its paged classes', or `page_size` where none is. Raises ValueError for
    classes and bounds that no ledger can have."""
    if not all(type(size) is int and size > 0 for size in (max_len, chunk_len, page_size)):
        sizes = f"max_len = {max_len}, chunk_len = {chunk_len}, page_size = {page_size}"
        raise ValueError(f"{sizes}: all must be integers of at least 1")
    names = [state.name for state in classes]
    if not classes or len(set(names)) < len(classes):
        raise ValueError(f"classes = {names}: must be at least one, each with its own name")
    page_sizes = {state.page_size for state in classes if state.paged} or {page_size}
    if len(page_sizes) > 1:
        raise ValueError(f"page_size = {sorted(page_sizes)}: paged classes of one ledger must share one")
    for state in classes:
        needed = min(state.num_usable, state.max_pages(max_len, chunk_len))
        if state.paged and not (state.retention or state.sealing) and state.table_len < needed:
            legal = f"must be at least {needed} for max_len = {max_len}"
            raise ValueError(f"{state.name}: table_len = {state.table_len}: {legal}")
    return page_sizes.pop()


def sized_class(
    name: str,
    spec: State,
    *,
    num_layers: int,
    page_size: int,
    contiguous: bool,
    max_sequences: int,
    max_len: int,
    chunk_len: int,
    pool_len: int | None = None,
    host_len: int = 0,
    spare_states: int = 0,
    retention: Retention | None = None,
    prompt_len: int | None = None,
    sealing: Sealing | None = None,
) -> StateClass:
    """A class whose pool lets `max_sequences` sequences grow to max_len in steps of chunk_len, whatever their order.

    With `pool_len` the pool is smaller: what as many tokens are of max_sequences * max_len, and never less than one
    sequence needs. `host_len` tokens can be swapped out by the same measure, and `spare_states` recurrent states are
    kept beside one for each sequence.

    With a `retention` and a `prompt_len`, the longest prompt, sequences begin one after the other: while one holds all
    of its prompt, the others hold what is left of theirs.
    """
    if not spec.per_token:
        num_states = max_sequences + spare_states
        if pool_len is not None:
            num_states = max(1 + (spare_states > 0), -(-num_states * pool_len // (max_sequences * max_len)))
        num_host = max_sequences if host_len else 0
        return StateClass(name, spec, 1, num_states, 1, num_layers, num_host_pages=num_host)
    if contiguous:
        return StateClass(name, spec, max_len, max_sequences, 1, num_layers, reservation="max")
    state = StateClass(name, spec, page_size, 2, 1, num_layers, retention=retention, sealing=sealing)
    table_len = max(1, state.max_pages(max_len, chunk_len, prompt_len))

    def share(num_tokens: int) -> int:
        return -(-num_tokens * table_len // max_len)

    num_pages = max(table_len, share(max_sequences * max_len if pool_len is None else pool_len))
    if retention is not None and prompt_len is not None and pool_len is None:
        at_rest = max(retention.stored(prompt_len, n) for n in range(prompt_len, max_len + 1))
        num_pages = table_len + (max_sequences - 1) * -(-at_rest // page_size)
    if sealing is not None and prompt_len is not None and pool_len is None:
        at_rest = min(max_len, sealing.residual + page_size)
        num_pages = table_len + (max_sequences - 1) * (-(-at_rest // page_size) + 1)
    return replace(state, num_pages=1 + num_pages, table_len=table_len, num_host_pages=share(host_len))
