"""The parallel form of what a lossy memory computes: the same examples, with what is stored rounded as the memory
rounds it, and under the mask that its compactions and windows imply. What a compression costs is then its own; no error
of the memory hides in it.

Of what was read back of a memory in a format, every number is compared with what rounding gives, and then taken: a
number beside a tie may be rounded either way, and one such number moves every logit behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kvlab.evaluation.read_masks import ReadMasks, what_was_read
from kvlab.evaluation.session import Events
from kvlab.evaluation.stored import Stored, what_was_sealed, what_was_stored
from kvlab.evaluation.trail import GoneAt, SealedAt, sealed_trail, trail
from kvlab.ledger.states import State
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.views import LayerStates, view_of
from kvlab.memory.views.masked import MaskedTokens, SealedMasked
from kvlab.mixers import LayerMemory
from kvlab.models.transformer import Transformer, merge
from kvlab.programs import program
from kvlab.typing import Hidden, Params, Positions, Tokens

MOST_LOGITS = 1 << 27
"""Numbers of a batch that are compared; beyond, at evenly spaced positions."""


class Implied(NamedTuple):
    """What a run through a memory implies of the parallel form, by layer and the mixer's state; see `masked_hidden`."""

    gone_at: GoneAt
    is_read: ReadMasks | None = None
    sealed_at: tuple[dict[str, SealedAt], ...] = ()
    stored: Stored = ()
    sealed: Stored = ()


class MaskCheck:
    """Compares logits through a lossy memory with those of the parallel form; `worst` is the largest difference so far,
    relative to the largest logit of its position. `worst_stored` is by how much a number that was read back lies
    further from the exact one than rounding does, relative to the largest that shares its scale."""

    def __init__(self, structure: nnx.GraphDef[Transformer], params: Params, layout: MemoryLayout):
        self.structure, self.params, self.layout = structure, params, layout
        self.worst = self.worst_stored = 0.0
        self.num_compared = self.num_compactions = 0
        self.evicted: dict[str, list[int]] = {}
        """By slice: tokens that heads dropped before the end of their sequence, by compactions or behind a window, and
        tokens that these heads were given."""

    def compare(
        self,
        tokens: np.ndarray,
        seen: dict[int, np.ndarray],
        events: Events,
        name: str = "",
    ) -> None:
        """One batch of sequences [B, T] of a slice, named by their rows; `seen` are logits [B, V] through the memory,
        by position."""
        if not seen:
            return
        implied = self._implied(events, *tokens.shape)
        hidden, excess = self.hidden_of(jnp.asarray(tokens), implied)
        self.worst_stored = max(self.worst_stored, float(excess))
        positions = sorted(seen)
        most = max(1, MOST_LOGITS // next(iter(seen.values())).size)
        for position in positions[:: -(-len(positions) // most)]:
            expected = np.asarray(self.logits_of(hidden[:, position]))
            found = seen[position]
            error = np.abs(found - expected).max(axis=1) / np.maximum(np.abs(expected).max(axis=1), 1e-30)
            error = np.where(np.isfinite(found).all(axis=1), error, np.inf)
            self.worst = max(self.worst, float(error.max()))
            self.num_compared += error.size
        evicted = self.evicted.setdefault(name, [0, 0])
        dropped = [gone < tokens.shape[1] for layer in implied.gone_at for gone in layer.values()]
        evicted[0] += sum(int(each.sum()) for each in dropped)
        evicted[1] += sum(each.size for each in dropped)
        self.num_compactions += sum(len(each.sequences) for each in events.compacted)

    def _implied(self, events: Events, num_rows: int, num_tokens: int) -> Implied:
        sizes = num_rows, num_tokens
        gone_at = trail(self.layout, events.compacted, *sizes)
        return Implied(
            gone_at,
            what_was_read(self.layout, events.steps, events.compacted, *sizes),
            sealed_trail(self.layout, gone_at, events.sealed),
            what_was_stored(self.layout, events.written, *sizes),
            what_was_sealed(self.layout, events.sealed, events.given, num_rows) if events.given else (),
        )

    def hidden_of(self, tokens: Tokens, implied: Implied) -> tuple[Hidden, Array]:
        """Final hidden states of the parallel form, and by how much what was stored exceeds rounding: a program."""
        return self._hidden(self.params, tokens, implied)

    def logits_of(self, hidden: Array) -> Array:
        """Logits [B, V] of final hidden states [B, E]: a program."""
        return self._logits(self.params, hidden)

    @program()
    def _hidden(self, params: Params, tokens: Tokens, implied: Implied) -> tuple[Hidden, Array]:
        return masked_hidden(
            merge(self.structure, params), self.layout.stored, tokens, implied, sealings_of(self.layout)
        )

    @program()
    def _logits(self, params: Params, hidden: Array) -> Array:
        return merge(self.structure, params).logits(hidden[:, None])[:, 0]


class SealedPart(NamedTuple):
    """What the sealed pages of a state are."""

    state: State
    page_size: int


def sealings_of(layout: MemoryLayout) -> list[dict[str, SealedPart]]:
    """By layer and the mixer's state, of those whose pages are sealed."""
    return [
        {
            name: SealedPart(layout.classes[states[names["sealed"]]].spec, layout.page_size)
            for name, each in joined.items()
            if "sealed" in (names := dict(each.names))
        }
        for states, joined in zip(layout.states, layout.joined, strict=True)
    ]


class Runs(Protocol):
    """What runs complete sequences: a `Transformer`, or what takes its place."""

    def hidden(
        self, tokens: Tokens, positions: Positions, memory: Sequence[LayerMemory]
    ) -> tuple[Hidden, tuple[LayerMemory, ...]]:
        """As `Transformer.hidden`."""
        ...


def masked_hidden(
    model: Runs,
    stored: Sequence[LayerStates],
    tokens: Tokens,
    implied: Implied,
    sealings: Sequence[Mapping[str, SealedPart]] = (),
) -> tuple[Hidden, Array]:
    """Final hidden states [B, T, E] of complete sequences in the parallel form, as a run through a memory implies them:
    of the states that `gone_at` names, each head sees what it still holds, and of these tokens what `is_read` says. All
    are rounded as the `stored` states say, and what was read back is taken. And the largest excess of that. `sealings`
    are the sealed states of those that are sealed. Traced."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    starts, counts = jnp.zeros(len(tokens), jnp.int32), jnp.full(len(tokens), tokens.shape[1], jnp.int32)
    memory: list[dict[str, Any]] = []
    for layer, states in enumerate(stored):
        views = dict[str, Any]()
        for name, state in states.items():
            view: Any
            if name in implied.gone_at[layer]:
                view = _masked(state, counts, implied, layer, name, sealings[layer].get(name) if sealings else None)
            else:
                view = view_of(state, "whole").of(state, {}, None, starts, counts)
            given = implied.stored[layer].get(name) if implied.stored else None
            views[name] = view if given is None else replace(view, given=given)
        memory.append(views)
    hidden, after = model.hidden(tokens, positions, memory)
    excess = [getattr(view, "excess", None) for layer in after for view in layer.values()]
    return hidden, jnp.stack([jnp.zeros(()), *(each for each in excess if each is not None)]).max()


def _masked(
    state: State, counts: Array, implied: Implied, layer: int, name: str, part: SealedPart | None
) -> MaskedTokens:
    """The view of a state that drops tokens, or selects among them, or seals them."""
    read = None if implied.is_read is None else implied.is_read[layer].get(name)
    masks: dict[str, Any] = {"gone_at": implied.gone_at[layer][name], "is_read": read}
    at = implied.sealed_at[layer].get(name) if implied.sealed_at else None
    if at is None or part is None or not at.order.shape[2]:
        return MaskedTokens(state, {}, counts, **masks)
    return SealedMasked(
        state,
        {},
        counts,
        **masks,
        order=at.order,
        sealed_at=at.sealed_at,
        sealed=implied.sealed[layer].get(name) if implied.sealed else None,
        rounding=part.state,
        page_size=part.page_size,
    )
