"""What a view is: the memory of one layer's state during one step, as a mixer reads and writes it.

A view joins a pool with the step's plan. It is a value that exists only while the step is traced: writing returns a
new view, whose `pool` the step returns. `Planned` is what the views over pools share, `TokenView` and `StateView` are
what mixers see.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, runtime_checkable

import jax.numpy as jnp
from jax import Array

from kvlab.ledger.classes import StateClass
from kvlab.ledger.plan import ClassPlan
from kvlab.ledger.states import State
from kvlab.memory.pools import Pool, allocate_pages, write_tokens
from kvlab.typing import Counts, HeadOutputs, Positions, Queries, SinkLogits


@runtime_checkable
class View(Protocol):
    """What every kind of memory offers to the layout. One kind of state in one kind of memory is one class in `VIEWS`.
    A view's `pool` are the arrays after all that was written."""

    @classmethod
    def check(cls, state: State) -> None:
        """Raises ValueError, with the reason, for a state in a format that this kind of memory cannot hold."""
        ...

    @classmethod
    def allocate(cls, state: State, num_pages: int, page_size: int) -> Pool:
        """One layer's arrays, zero."""
        ...

    @classmethod
    def share(cls, state: StateClass, plan: ClassPlan, starts: Counts, counts: Counts) -> Any:
        """What the layers of a class have in common in a step, made once; None: nothing."""
        ...

    @classmethod
    def of(cls, state: Any, pool: Pool, plan: Any, starts: Counts, counts: Counts, shared: Any = None) -> Self:
        """The view of a step in which each sequence has `counts` [B] new tokens behind `starts` [B]."""
        ...


@runtime_checkable
class TokenView(Protocol):
    """The memory of a state that is addressed by token."""

    def append(self, **tokens: Array) -> Self:
        """With the step's tokens written: [B, T, K, D] for every array of the state, by name. Padding is dropped."""
        ...

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        """Attention of the step's queries, at token positions [B, T], over what is stored; `state.visible` is the mask.
        And the memory afterwards, which may have noted who was attended to.

        The state's `readers` say how scores are scaled and capped. A head's sink logit takes part in its softmax, and
        belongs to no token."""
        ...


@runtime_checkable
class StateView(Protocol):
    """The memory of a state of which each sequence has one."""

    counts: Any
    """[B] new tokens of the step."""

    def read(self) -> dict[str, Array]:
        """The states [B, ...] before the step; zero for a sequence that begins."""
        ...

    def write(self, states: dict[str, Array]) -> Self:
        """With the states [B, ...] after the step; padded rows are dropped."""
        ...

    def valid(self, num_tokens: int) -> Array:
        """[B, T] whether each token of the step is real rather than padding."""
        ...


@dataclass(frozen=True)
class Planned:
    """A pool joined with the step's plan. Kinds of memory derive from it, each registered as a pytree."""

    state: Any = field(metadata={"static": True})
    pool: Any
    plan: Any  # ClassPlan; pytrees are rebuilt with placeholders, so fields are not checked at run time
    starts: Any  # [B] slots that the sequence stores in this class before the step
    counts: Any  # [B] new tokens in this step
    shared: Any = None

    @classmethod
    def check(cls, state: State) -> None:
        if any(array.per_page and array.is_scale for array in state.arrays):
            raise ValueError("a channel's scale is that of a whole page, and pages are filled in steps")

    @classmethod
    def share(cls, state: StateClass, plan: ClassPlan, starts: Counts, counts: Counts) -> Any:
        return None

    @classmethod
    def of(cls, state: Any, pool: Pool, plan: Any, starts: Counts, counts: Counts, shared: Any = None) -> Self:
        return cls(state, pool, plan, starts, counts, shared)


@dataclass(frozen=True)
class PlannedTokens(Planned):
    """Token arrays in pages. Kernels address slots, which are token positions as long as every token is kept."""

    @classmethod
    def allocate(cls, state: State, num_pages: int, page_size: int) -> Pool:
        return allocate_pages(state, num_pages, page_size)

    def append(self, **tokens: Array) -> Self:
        slots = jnp.asarray(self.plan.write_slots)
        return replace(self, pool=write_tokens(self.state, self.pool, slots, tokens))

    @property
    def slot_lens(self) -> Array:
        """[B] slots stored after it."""
        return self.starts + self.counts

    def query_slots(self, num_tokens: int) -> Positions:
        """[B, T] the slot of each of the step's own tokens, which its query may see as the last."""
        return self.starts[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None, :]


class OverTokens:
    """What a view over another view of tokens, its field `tokens`, passes on: where tokens lie, and how many."""

    tokens: Any

    @property
    def state(self) -> Any:
        """What is stored."""
        return self.tokens.state

    @property
    def pool(self) -> Pool:
        """The arrays of the tokens after all that was written."""
        return self.tokens.pool

    @property
    def plan(self) -> Any:
        """The class's part of the step's plan."""
        return self.tokens.plan

    @property
    def slot_lens(self) -> Array:
        """[B] slots stored after the step, as the host counts them."""
        return self.tokens.slot_lens

    def query_slots(self, num_tokens: int) -> Positions:
        """[B, T] the slot of each of the step's own tokens, as the host counts them."""
        return self.tokens.query_slots(num_tokens)
