"""No memory at all: the sequence is complete and starts at position 0, and nothing outlives the call. Training and
scoring in the parallel form go through these views, so that no mixer has a second branch for them.

A view holds what was appended, as it came. Reading a state gives zeros, writing one forgets it: the compiler sees both.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

from kvlab.ledger.classes import StateClass
from kvlab.ledger.plan import ClassPlan
from kvlab.ledger.states import State
from kvlab.memory.lightning import IndexQueries, WarmUp, divergence, index_scores
from kvlab.memory.pools import Pool, as_stored
from kvlab.memory.views.dense import dense_outputs, dense_weights
from kvlab.memory.views.retrieval import selected_by
from kvlab.typing import Counts, HeadOutputs, Positions, Queries, SinkLogits
from pallas_kernels.flash_attention import flash_attention


@dataclass(frozen=True)
class Whole:
    """What the views of complete sequences share."""

    state: Any = field(metadata={"static": True})
    pool: Any
    counts: Any  # [B] tokens of each sequence
    progress: Any = None  # in training the share of its steps that is done; None: nothing is trained

    @classmethod
    def check(cls, state: State) -> None:
        pass

    @classmethod
    def allocate(cls, state: State, num_pages: int, page_size: int) -> Pool:
        return {}

    @classmethod
    def share(cls, state: StateClass, plan: ClassPlan, starts: Counts, counts: Counts) -> Any:
        return None

    @classmethod
    def of(cls, state: Any, pool: Pool, plan: Any, starts: Counts, counts: Counts, shared: Any = None) -> Self:
        return cls(state, pool, counts, shared)


@dataclass(frozen=True)
class Appended(Whole):
    """Token arrays as they were appended; of a state in a format, as a memory in that format would give them back.

    `given` are what a memory did give back, by array [B, T, K, D], in the place of that; `excess` says afterwards how
    much further from what was appended any of it is than rounding goes (see `taken`)."""

    given: Any = None
    excess: Any = None

    def append(self, **tokens: Array) -> Self:
        held = {name: as_stored(self.state, name, array) for name, array in tokens.items()}
        if self.given is None:
            return replace(self, pool=held)
        excess = jnp.zeros(())
        for name, array in self.given.items():
            held[name], further = taken(tokens[name], held[name], array)
            excess = jnp.maximum(excess, further)
        return replace(self, pool=held, excess=excess)


def taken(exact: Array, rounded: Array, given: Array, axis: int = -1) -> tuple[Array, Array]:
    """What a memory gave back in the place of `rounded`, which stays where there is none (NaN). And by how much it lies
    further from the exact numbers than `rounded` does, at most: a share of the largest one along `axis`. Another choice
    at a tie costs nothing; a wrong number costs a step of its format."""
    is_given, exact = ~jnp.isnan(given), exact.astype(jnp.float32)
    further = jnp.abs(given - exact) - jnp.abs(rounded.astype(jnp.float32) - exact)
    further = jnp.where(is_given, further, 0) / jnp.maximum(jnp.abs(exact).max(axis=axis, keepdims=True), 1e-30)
    return jnp.where(is_given, given, rounded).astype(rounded.dtype), further.max()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WholeTokens(Appended):
    """Keys and values of the call's own tokens."""

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        state, dim = self.state, queries.shape[-1]
        options: dict[str, Any] = {"visible": state.visible, "scale": state.scale(dim), "soft_cap": state.soft_cap}
        return flash_attention(queries, self.pool["keys"], self.values, sink_logits=sink_logits, **options), self

    @property
    def values(self) -> Array:
        """[B, T, K, Dv]"""
        return self.pool["values"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WholeLatents(WholeTokens):
    """Rows of the call's own tokens; values are their first `rank` numbers."""

    @property
    def values(self) -> Array:
        return self.pool["keys"][..., : self.state.rank]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WholeRetrieval(Appended):
    """Keys, values and index keys of the call's own tokens: every query selects as it does in pages.

    In training with a `warm_up`, queries of the first steps attend to all that they see; `loss`, a number, is then by
    how much the index is wrong about attention, times its weight."""

    loss: Any = None

    def attend(
        self,
        queries: Queries,
        positions: Positions,
        *,
        index_queries: IndexQueries,
        warm_up: WarmUp | None = None,
        sink_logits: SinkLogits | None = None,
    ) -> tuple[HeadOutputs, Self]:
        index = self.pool["index"][:, :, 0]
        slots = jnp.arange(index.shape[1], dtype=jnp.int32)
        seen = self.state.visible.sees(slots[None, :, None], slots[None, None, :])
        seen = jnp.broadcast_to(seen, (len(index), *seen.shape[1:]))
        scores = index_scores(index_queries, index)
        if self.progress is None or warm_up is None:
            return self._over(selected_by(self.state, scores, seen), queries, sink_logits)[0], self
        selected = jax.lax.cond(
            self.progress < warm_up.dense_share, lambda: seen, lambda: selected_by(self.state, scores, seen)
        )
        outputs, weights = self._over(selected, queries, sink_logits)
        return outputs, replace(self, loss=warm_up.weight * divergence(weights, scores, selected))

    def _over(self, selected: Array, queries: Queries, sink_logits: SinkLogits | None) -> tuple[HeadOutputs, Array]:
        """Attention over what each query selects [B, T, T], and its weights [B, K, G, T, T]."""
        keys, values = (self.pool[name].transpose(0, 2, 1, 3) for name in ("keys", "values"))
        weights = dense_weights(self.state, queries, keys, selected, sink_logits)
        return dense_outputs(weights, values, selected).astype(queries.dtype), weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WholeStates(Whole):
    """Every sequence begins with a state of zeros, and every token is real."""

    def read(self) -> dict[str, Array]:
        return {part.name: jnp.zeros((len(self.counts), *part.shape), part.dtype) for part in self.state.arrays}

    def write(self, states: dict[str, Array]) -> Self:
        return self

    def valid(self, num_tokens: int) -> Array:
        return jnp.ones((len(self.counts), num_tokens), bool)
