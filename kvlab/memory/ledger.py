"""Who holds which page. Integers on the host, no JAX; the only way to the device is a `Plan`.

    plan = ledger.reserve("request 7", num_new=16)      # Plan | Wait | Never, nothing changed unless a Plan
    ... the device step runs with the plan ...
    ledger.commit("request 7", num_accepted=16)         # pages that left live(n) are free again
    ledger.release("request 7")

A sequence's state of each class is a map from logical page (tokens [i * page_size, (i + 1) * page_size)) to the physical
page of the pool that holds it. Recurrent states are the degenerate case: one page a sequence, no positions.
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvlab.memory.spec import StateSpec, max_pages_for_step, pages_for_step

NOWHERE = 2**30
"""First position of an unused table entry: later than any query, so nothing of it is ever visible."""

type Ints = npt.NDArray[np.int32]


class ClassPlan(NamedTuple):
    """One state class of a step, for B sequences."""

    pages: Ints
    """[B, table_len] physical pages a step reads; unused entries are 0 (token states) or out of range (recurrent)."""
    page_starts: Ints
    """[B, table_len] token position of each page's first slot; `NOWHERE` where unused."""
    write_slots: Ints
    """[B, T] flat slot (page * page_size + offset) of each new token; out of range for padding, so the write is dropped."""


class Plan(NamedTuple):
    """What the host decided for one step: a pytree of int32 arrays. A saved list of plans replays a run."""

    starts: Ints
    """[B] tokens already stored of each sequence."""
    counts: Ints
    """[B] new tokens of each sequence in this step, at most T; the rest of a row is padding."""
    classes: tuple[ClassPlan, ...]


@dataclass(frozen=True)
class Wait:
    """Not now: pages are missing that running sequences will free."""

    reason: str


@dataclass(frozen=True)
class Never:
    """Not ever: the request does not fit an empty pool; says why, with the arithmetic."""

    reason: str


@dataclass(frozen=True)
class StateClass:
    """A pool's description: layers whose states have equal specs share page ids and one page table.

    `page_size` is token slots a page (1 for recurrent states); `num_pages` counts the null page where there is one;
    `page_bytes` is one page of all the class's layers. `contiguous` means that one page holds a whole sequence up to its
    maximum length, as caches did before paging: then nothing leaves it and its unused slots count as reserved.
    """

    name: str
    spec: StateSpec
    page_size: int
    num_pages: int
    table_len: int
    num_layers: int
    contiguous: bool = False

    @property
    def has_null_page(self) -> bool:
        """Page 0 of a paged pool is never written, so that padded table entries are safe to read."""
        return self.spec.per_token and not self.contiguous

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers of the class."""
        return self.spec.unit_bytes * self.page_size * self.num_layers

    @property
    def pool_bytes(self) -> int:
        """Bytes of the class's arrays, the null page included."""
        return self.page_bytes * self.num_pages

    def pages_for_step(self, start: int, num_new: int) -> tuple[int, ...]:
        """Logical pages resident during a step; recurrent and contiguous states have one."""
        if self.contiguous or not self.spec.per_token:
            return (0,)
        return pages_for_step(self.spec, start, num_new, self.page_size)


@dataclass(frozen=True)
class Account:
    """Where every byte of one class's pool is; the parts sum to `pool` exactly, after every step.

    `tail` is unused slots of last pages, `dead` slots held outside every live(n), `reserved` the unused rest of contiguous
    reservations. This ledger neither shares, speculates nor quantises, so cached, duplicate, lookahead, scale and padding bytes are
    identically zero and left out.
    """

    name: str
    pool: int
    free: int
    null: int
    live: int
    tail: int
    dead: int
    reserved: int

    @property
    def allocated(self) -> int:
        """Bytes of pages that some sequence holds."""
        return self.live + self.tail + self.dead + self.reserved

    def as_dict(self) -> dict[str, int | str]:
        """One row of a table."""
        return {**asdict(self), "allocated": self.allocated}


@dataclass
class _Sequence:
    length: int = 0
    reserved_len: int = 0  # tokens of the step in flight; 0 between steps
    pages: list[dict[int, int]] = field(default_factory=list)  # per class: logical page -> physical page


class Ledger:
    """Allocates pages of several state classes side by side. Deterministic; every method is transactional."""

    def __init__(self, classes: Sequence[StateClass], max_len: int, chunk_len: int):
        """`max_len` bounds a sequence and `chunk_len` a step, in tokens. Raises ValueError on empty bounds."""
        if max_len < 1 or chunk_len < 1:
            raise ValueError(f"max_len = {max_len}, chunk_len = {chunk_len}: both must be at least 1")
        self.classes = tuple(classes)
        self.max_len, self.chunk_len = max_len, chunk_len
        self._free = [list(range(c.num_pages - 1, 0 if c.has_null_page else -1, -1)) for c in self.classes]
        self._sequences: dict[Hashable, _Sequence] = {}

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """Sequences that hold pages, oldest first."""
        return tuple(self._sequences)

    def length(self, sequence: Hashable) -> int:
        """Committed tokens of a sequence. Raises KeyError if it holds nothing."""
        return self._sequences[sequence].length

    def reserve(self, sequence: Hashable, num_new: int) -> Plan | Wait | Never:
        """Pages for the next `num_new` tokens of a sequence (a new name starts one), as a plan of batch 1.

        Returns `Wait` when pages are short and `Never` when an empty pool would be too small; neither changes anything.
        Raises ValueError when num_new is out of [1, chunk_len] or the sequence's last step was not committed.
        """
        if not 1 <= num_new <= self.chunk_len:
            raise ValueError(f"num_new = {num_new}: must be in [1, {self.chunk_len}]")
        held = self._sequences.get(sequence) or _Sequence(pages=[{} for _ in self.classes])
        if held.reserved_len:
            raise ValueError(f"sequence {sequence!r}: its step of {held.reserved_len} tokens is not committed")
        start, end = held.length, held.length + num_new
        if end > self.max_len:
            return Never(f"{start} + {num_new} = {end} tokens exceed max_len = {self.max_len}")
        missing: list[list[int]] = []
        for state, pages, free in zip(self.classes, held.pages, self._free, strict=True):
            needed = state.pages_for_step(start, num_new)
            usable = state.num_pages - state.has_null_page
            if len(needed) > usable:
                return Never(f"{state.name}: tokens [0, {end}) need {len(needed)} pages, the pool has {usable}")
            missing.append([page for page in needed if page not in pages])
            if len(missing[-1]) > len(free):
                return Wait(f"{state.name}: {len(missing[-1])} pages needed, {len(free)} free")
        for pages, free, new in zip(held.pages, self._free, missing, strict=True):
            pages.update((page, free.pop()) for page in new)
        held.reserved_len = num_new
        self._sequences[sequence] = held
        return self._plan(held, num_new)

    def commit(self, sequence: Hashable, num_accepted: int) -> None:
        """The step ran and its first `num_accepted` tokens count; pages outside live(n) become free.

        Raises ValueError when no step is in flight, when more is accepted than was reserved, and when less is while a
        recurrent state, which has absorbed every token, cannot be rolled back.
        """
        held = self._sequences[sequence]
        if not held.reserved_len or not 0 <= num_accepted <= held.reserved_len:
            raise ValueError(f"num_accepted = {num_accepted}: must be in [0, {held.reserved_len}] reserved tokens")
        recurrent = [state.name for state in self.classes if not state.spec.per_token]
        if num_accepted < held.reserved_len and recurrent:
            legal = f"must be all {held.reserved_len} reserved tokens, since {recurrent[0]} cannot be rolled back"
            raise ValueError(f"num_accepted = {num_accepted}: {legal}")
        self._settle(held, num_accepted)

    def cancel(self, sequence: Hashable) -> None:
        """The reserved step will not run: its pages are free again, and a sequence that holds nothing else is gone.

        Raises ValueError when no step is in flight.
        """
        held = self._sequences[sequence]
        if not held.reserved_len:
            raise ValueError(f"sequence {sequence!r}: no step is in flight")
        if held.length:
            self._settle(held, 0)
        else:
            self.release(sequence)

    def _settle(self, held: _Sequence, num_accepted: int) -> None:
        """Ends a step: the tokens count, and pages that live(n) does not need are free."""
        held.length, held.reserved_len = held.length + num_accepted, 0
        for state, pages, free in zip(self.classes, held.pages, self._free, strict=True):
            keep = set(state.pages_for_step(held.length, 0))
            for page in sorted(pages.keys() - keep):
                free.append(pages.pop(page))

    def release(self, sequence: Hashable) -> None:
        """Frees everything a sequence holds. Raises KeyError if it holds nothing."""
        held = self._sequences.pop(sequence)
        for pages, free in zip(held.pages, self._free, strict=True):
            free.extend(pages[page] for page in sorted(pages))

    def audit(self) -> tuple[Account, ...]:
        """Where every byte is now, one account a class."""
        return tuple(self._account(index) for index in range(len(self.classes)))

    def check(self) -> None:
        """Raises AssertionError on a broken invariant: every page free or held exactly once, accounts sum to pools."""
        for index, (state, free) in enumerate(zip(self.classes, self._free, strict=True)):
            held = [page for sequence in self._sequences.values() for page in sequence.pages[index].values()]
            owned = sorted(free + held)
            assert owned == list(range(int(state.has_null_page), state.num_pages)), f"{state.name}: {owned}"
            account = self._account(index)
            assert account.pool == account.free + account.null + account.allocated, account
            assert min(account.free, account.live, account.tail, account.dead, account.reserved) >= 0, account

    def _plan(self, held: _Sequence, num_new: int) -> Plan:
        positions = np.arange(held.length, held.length + num_new)
        plans = []
        for state, pages in zip(self.classes, held.pages, strict=True):
            table = np.full(state.table_len, 0 if state.has_null_page else state.num_pages, np.int32)
            starts = np.full(state.table_len, NOWHERE, np.int32)
            table[: len(pages)] = list(pages.values())
            starts[: len(pages)] = np.fromiter(pages, np.int32) * state.page_size
            slots = np.zeros(0, np.int32)
            if state.spec.per_token:
                owners = np.array([pages[page] for page in (positions // state.page_size).tolist()])
                slots = (owners * state.page_size + positions % state.page_size).astype(np.int32)
            plans.append(ClassPlan(table[None], starts[None], slots[None]))
        return Plan(np.array([held.length], np.int32), np.array([num_new], np.int32), tuple(plans))

    def _account(self, index: int) -> Account:
        state, free = self.classes[index], self._free[index]
        live = tail = dead = reserved = 0
        slot_bytes = state.page_bytes // state.page_size
        for held in self._sequences.values():
            num_pages = len(held.pages[index])
            if not state.spec.per_token:
                live += num_pages * state.page_bytes
                continue
            live_len = state.spec.live_len(held.length)
            slots = num_pages * state.page_size
            end = (max(held.pages[index], default=-1) + 1) * state.page_size
            unused = max(0, end - held.length)  # slots [length, end) were not written yet
            live += live_len * slot_bytes
            dead += (slots - unused - live_len) * slot_bytes
            if state.contiguous:
                reserved += unused * slot_bytes
            else:
                tail += unused * slot_bytes
        free_bytes, null_bytes = len(free) * state.page_bytes, state.has_null_page * state.page_bytes
        return Account(state.name, state.pool_bytes, free_bytes, null_bytes, live, tail, dead, reserved)


def stack(plans: Sequence[Plan], classes: Sequence[StateClass], batch_size: int, num_tokens: int) -> Plan:
    """One plan of fixed shape [batch_size, num_tokens] from per-sequence plans; the rest is padding that reads the null
    page and writes nowhere. Raises ValueError when the plans do not fit the shape."""
    longest = max((int(plan.counts[0]) for plan in plans), default=0)
    if len(plans) > batch_size or longest > num_tokens:
        raise ValueError(f"{len(plans)} plans of {longest} tokens do not fit a step of [{batch_size}, {num_tokens}]")
    starts, counts = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
    starts[: len(plans)] = [plan.starts[0] for plan in plans]
    counts[: len(plans)] = [plan.counts[0] for plan in plans]
    stacked = []
    for index, state in enumerate(classes):
        unused = 0 if state.has_null_page else state.num_pages
        pages = np.full((batch_size, state.table_len), unused, np.int32)
        page_starts = np.full((batch_size, state.table_len), NOWHERE, np.int32)
        slots = np.full((batch_size, num_tokens), state.num_pages * state.page_size, np.int32)
        for row, plan in enumerate(plans):
            one = plan.classes[index]
            pages[row], page_starts[row] = one.pages[0], one.page_starts[0]
            slots[row, : one.write_slots.shape[1]] = one.write_slots[0]
        stacked.append(ClassPlan(pages, page_starts, slots))
    return Plan(starts, counts, tuple(stacked))


def sized_class(
    name: str,
    spec: StateSpec,
    *,
    num_layers: int,
    page_size: int,
    contiguous: bool,
    max_sequences: int,
    max_len: int,
    chunk_len: int,
) -> StateClass:
    """A class whose pool lets `max_sequences` sequences grow to max_len in steps of chunk_len, whatever their order."""
    if not spec.per_token:
        return StateClass(name, spec, 1, max_sequences, 1, num_layers)
    if contiguous:
        return StateClass(name, spec, max_len, max_sequences, 1, num_layers, contiguous=True)
    table_len = max_pages_for_step(spec, max_len, chunk_len, page_size)
    return StateClass(name, spec, page_size, 1 + max_sequences * table_len, table_len, num_layers)
