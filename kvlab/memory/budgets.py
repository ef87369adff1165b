"""Equal budgets: bytes a sequence, turned into the integer that a variant has to turn, its knob. Bytes are those of
real layouts, statistics, scales, sealed pages and recurrent states included; what is solved is rounded down."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvlab.compression.budget import LEGAL, Budget
from kvlab.ledger.growth import bytes_at
from kvlab.memory.config import MemoryConfig
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.views import LayerStates
from kvlab.schema import ConfigError, Schema, integer, plain, text

LEAST_SHARE = 0.9
"""Of a budget that must be held, unless `memory.allow_underfill`: variants that hold less are not compared at it."""


@dataclass(frozen=True)
class EqualBudget(Schema):
    """What a run was asked to hold, and what became of it: `knob`, the field that was solved, its value, and the bytes
    that a sequence then holds at the measured context. Without a knob the run is as it would be without a budget: the
    ceiling of the others. It is no part of a run's identity: runs that come out equal are one run."""

    asked: int | float | str | None = plain(None, LEGAL)
    knob: str | None = text(None, optional=True)
    solved: int | None = integer(None, 1, optional=True)
    held_bytes: int | None = integer(None, 0, 1 << 62, optional=True)

    @property
    def is_ceiling(self) -> bool:
        """Whether nothing was there to be solved."""
        return self.knob is None

    @property
    def words(self) -> str:
        """What became of what was asked."""
        if self.is_ceiling:
            return f"budget = {self.asked} has nothing to solve here: the run holds everything, a ceiling"
        held = f"which holds {self.held_bytes:,} bytes a sequence"
        return f"budget = {self.asked} is {self.knob} = {self.solved}, {held}"


class Context(NamedTuple):
    """Where bytes are counted: a sequence of `context_len` tokens, of which `prompt_len` are its prompt."""

    context_len: int
    prompt_len: int


def held_bytes(layers: Sequence[LayerStates], memory: MemoryConfig, context: Context) -> int:
    """Bytes of pages that a sequence holds there, whatever was due done. Raises as `MemoryLayout.of` does."""
    sizes = {"max_len": context.context_len, "prompt_len": context.prompt_len}
    layout = MemoryLayout.of(layers, memory, max_sequences=1, **sizes)
    return bytes_at(layout.classes, context.prompt_len, context.context_len)


def solve(
    memory: MemoryConfig, knob: str, values: Sequence[int], size: Callable[[int], int | None], context: Context
) -> EqualBudget:
    """The largest of ascending values whose size, which must not fall, is within `memory.budget`; None: the value is
    too small to be one. Raises ConfigError where even the least is too large, and where less than `LEAST_SHARE` of the
    budget would be held."""
    num_bytes = Budget.of(memory.budget).num_bytes
    assert num_bytes is not None
    above = bisect.bisect_right(values, num_bytes, key=lambda value: size(value) or 0)
    held = size(values[above - 1]) if above else None
    at = f"at {context.context_len:,} tokens"
    if above == 0 or held is None:
        first = bisect.bisect_right(values, 0, key=lambda value: size(value) or 0)
        if first == len(values):
            raise ConfigError("memory.budget", memory.budget, f"{knob} has no value that this memory can hold {at}")
        least = f"{size(values[first]):,} bytes, what a sequence holds {at} with {knob} = {values[first]}"
        raise ConfigError("memory.budget", memory.budget, f"must be at least {least}, the least that is possible")
    value = values[above - 1]
    if held < LEAST_SHARE * num_bytes and not memory.allow_underfill:
        share = f"is held to {held / num_bytes:.0%} only: {held:,} of {num_bytes:,} bytes {at} with {knob} = {value}"
        more = "which is all that there is"
        if above < len(values):
            more = f"and the next value, {values[above]}, would hold {size(values[above]):,}"
        legal = f"at least {LEAST_SHARE:.0%} are needed to compare at equal bytes, or memory.allow_underfill=true"
        raise ConfigError("memory.budget", memory.budget, f"{share}, {more}; {legal}")
    return EqualBudget(memory.budget, knob, value, held)


def solve_slots(layers: Sequence[LayerStates], memory: MemoryConfig, context: Context) -> EqualBudget:
    """The slots, whole pages of them, that a compression may keep within a budget of bytes. Raises as `solve` does."""
    size = unless_protected(lambda slots: held_bytes(layers, with_slots(memory, slots), context))
    return solve(memory, "memory.budget", whole_pages(memory, context), size, context)


def unless_protected(size: Callable[[int], int]) -> Callable[[int], int | None]:
    """A size in bytes by slots; None for fewer slots than what is protected."""

    def found(slots: int) -> int | None:
        try:
            return size(slots)
        except ConfigError as error:
            if error.name != "memory.budget":
                raise
            return None

    return found


def whole_pages(memory: MemoryConfig, context: Context) -> range:
    """Slots that fill whole pages, up to what a sequence of this context fills."""
    page_size = memory.page_size
    return range(page_size, context.context_len + page_size, page_size)


def with_slots(memory: MemoryConfig, slots: int) -> MemoryConfig:
    """The memory with a budget that was solved."""
    return replace(memory, budget=slots, allow_underfill=False)


def in_slots(layers: Sequence[LayerStates], memory: MemoryConfig, max_len: int) -> MemoryConfig:
    """A memory whose budget, if that is bytes, is what a compaction leaves of a prompt of `max_len` tokens, whatever is
    decoded behind it: for prompts that nobody knows yet. Raises as `solve` does."""
    if memory.compression is None or memory.budget is None or Budget.of(memory.budget).num_bytes is None:
        return memory
    found = solve_slots(layers, memory, Context(max_len, max_len))
    assert found.solved is not None
    return with_slots(memory, found.solved)
