"""The nouns of scheduling: a sequence as the scheduler sees it, and the step that it makes of many."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvlab.ledger.plan import Compaction, Plan, Seals, Swap

type Slots = Mapping[int, int]
"""Where the statistics of a sequence lie: by class, a slot."""


@dataclass(eq=False, slots=True)
class Entry:
    """One sequence as the scheduler sees it. `final_len` bounds the tokens that it will ever store."""

    name: Hashable
    num_known: int
    final_len: int
    priority: int = 0
    ids: list[int] = field(default_factory=list)
    """Its known tokens; a simulator may not have them."""
    indexed: bool = False
    """Whether its ids are looked up in the prefix index, and published there."""
    namespace: str = ""
    num_computed: int = 0
    prefill_len: int = 0
    """Below, it computes a prompt; above, it decodes: all tokens that were known when it was admitted, or its prompt
    alone where that is compressed."""
    told_len: int = 0
    """Tokens whose ids the ledger was told when it was admitted."""
    prompt_len: int = 0
    """Tokens of its prompt: a memory that compresses counts from there; 0: all that were known at first."""
    seed: int = 0
    """What random choices of the memory are drawn from."""
    drafts: int = 0
    """Speculative tokens that may follow the known ones in the next step."""
    hold: int | None = None
    """It computes up to here and then waits for the caller to branch it and to lift this; beyond, it has no effect."""
    paused: bool = False
    """Takes part in nothing: it waits for others of its group."""
    once_computed: int = 0
    """The most tokens that it, or whoever it branched from, had computed when it last had to make room. Below, what it
    computes is computed again, and what it finds in the index is no prefix hit: it was its own."""
    arrival: int = -1
    state: Literal["new", "waiting", "running", "swapped", "gone"] = "new"

    @property
    def target(self) -> int:
        """Tokens to compute for now."""
        if self.hold is not None and self.num_computed < self.hold:
            return self.hold
        return self.num_known

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: the higher priority, then the older."""
        return (-self.priority, self.arrival)

    @property
    def decodes(self) -> bool:
        """Whether its next step computes its last known token behind its prompt, and nothing else."""
        return self.prefill_len <= self.num_computed == self.num_known - 1 and not self.drafts


class Work(NamedTuple):
    """One sequence's part of a step: `num_new` known tokens from `num_computed` on, then `lookahead` drafts."""

    entry: Entry
    num_new: int
    lookahead: int


class Move(NamedTuple):
    """Pages to carry to the host ("out") or back ("in") before the step."""

    direction: Literal["out", "in"]
    swap: Swap


class Planned(NamedTuple):
    """A second pass of one sequence: steps of one row with their tokens, to run in this order, and where its statistics
    lie then. These slots are free already: whatever is reserved next may take them, so that the sequence is to be
    compacted at once, by `MemoryStep.compact`."""

    steps: tuple[tuple[Plan, npt.NDArray[np.int32]], ...]
    slots: Slots


class Heard(NamedTuple):
    """A second pass behind a sequence's prompt, and the compaction of that sequence by what it noted."""

    heard: Planned
    compaction: Compaction


type Before = Move | Compaction | Seals | Heard
"""What the device does before a step. Pages that one of these frees may be filled by the next."""


class Rejection(NamedTuple):
    """A sequence that can never fit, with the ledger's reason."""

    entry: Entry
    reason: str


@dataclass(frozen=True)
class Step:
    """What the scheduler says of the next step: first what comes `before` it, in this order, then the work, which is
    reserved in the ledger."""

    work: list[Work]
    before: list[Before] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


@dataclass
class Counters:
    """What scheduling did so far. Each prompt counts once among `looked_up_tokens`, and among `hit_tokens` what others
    had left of it in the index. What a sequence finds again of its own after a preemption is neither a hit nor computed
    again. (The ledger's counters are of lookups: every admission counts there.)"""

    preempted: int = 0
    recomputed_tokens: int = 0
    looked_up_tokens: int = 0
    hit_tokens: int = 0
    found_again_tokens: int = 0
