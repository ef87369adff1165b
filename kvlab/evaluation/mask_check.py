"""The parallel form of what a lossy memory computes: the same examples, with what is stored rounded as the memory
rounds it, and under the mask that its compactions and windows imply. What a compression costs is then its own; no error
of the memory hides in it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kvlab.evaluation.lossy import Compacted, SealedTogether
from kvlab.evaluation.read_masks import ReadMasks, what_was_read
from kvlab.evaluation.session import ReadStep
from kvlab.evaluation.trail import GoneAt, SealedAt, sealed_trail, trail
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.views import LayerStates, view_of
from kvlab.memory.views.masked import MaskedTokens, SealedMasked
from kvlab.mixers import LayerMemory
from kvlab.models.transformer import Transformer, merge
from kvlab.typing import Hidden, Params, Positions, Tokens

MOST_LOGITS = 1 << 27
"""Numbers of a batch that are compared; beyond, at evenly spaced positions."""


class MaskCheck:
    """Compares logits through a lossy memory with those of the parallel form; `worst` is the largest difference so far,
    relative to the largest logit of its position."""

    def __init__(self, structure: nnx.GraphDef[Transformer], params: Params, layout: MemoryLayout):
        self.structure, self.params, self.layout = structure, params, layout
        self.worst = 0.0
        self.num_compared = self.num_compactions = 0
        self.evicted: dict[str, list[int]] = {}
        """By slice: tokens that heads dropped before the end of their sequence, by compactions or behind a window, and
        tokens that these heads were given."""

    def compare(
        self,
        tokens: np.ndarray,
        compacted: Sequence[Compacted],
        seen: dict[int, np.ndarray],
        name: str = "",
        steps: Sequence[ReadStep] = (),
        sealed: Sequence[SealedTogether] = (),
    ) -> None:
        """One batch of sequences [B, T] of a slice, named by their rows; `seen` are logits [B, V] through the memory,
        by position, and `steps` what was read."""
        if not seen:
            return
        gone_at = trail(self.layout, compacted, *tokens.shape)
        is_read = what_was_read(self.layout, steps, compacted, *tokens.shape)
        sealed_at = sealed_trail(self.layout, gone_at, sealed)
        hidden = self.hidden_of(jnp.asarray(tokens), gone_at, is_read, sealed_at)
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
        dropped = [gone < tokens.shape[1] for layer in gone_at for gone in layer.values()]
        evicted[0] += sum(int(each.sum()) for each in dropped)
        evicted[1] += sum(each.size for each in dropped)
        self.num_compactions += sum(len(each.sequences) for each in compacted)

    def hidden_of(
        self, tokens: Tokens, gone_at: GoneAt, is_read: ReadMasks, sealed_at: tuple[dict[str, SealedAt], ...]
    ) -> Hidden:
        """Final hidden states of the parallel form: a program."""
        return self._hidden(self.params, tokens, gone_at, is_read, sealed_at)

    def logits_of(self, hidden: Array) -> Array:
        """Logits [B, V] of final hidden states [B, E]: a program."""
        return self._logits(self.params, hidden)

    @partial(jax.jit, static_argnums=0)
    def _hidden(
        self,
        params: Params,
        tokens: Tokens,
        gone_at: GoneAt,
        is_read: ReadMasks,
        sealed_at: tuple[dict[str, SealedAt], ...],
    ) -> Hidden:
        """Final hidden states of the parallel form."""
        sealed = roundings_of(self.layout, sealed_at)
        return masked_hidden(merge(self.structure, params), self.layout.stored, tokens, gone_at, is_read, sealed)

    @partial(jax.jit, static_argnums=0)
    def _logits(self, params: Params, hidden: Array) -> Array:
        return merge(self.structure, params).logits(hidden[:, None])[:, 0]

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def roundings_of(
    layout: MemoryLayout, sealed_at: Sequence[Mapping[str, SealedAt]]
) -> list[dict[str, Callable[..., SealedMasked]]]:
    """How the views of sealed states are made, by layer and the mixer's state."""
    return [
        {
            name: partial(
                SealedMasked,
                order=at.order,
                sealed_at=at.sealed_at,
                rounding=layout.classes[states[f"{name}.sealed"]].spec,
                page_size=layout.page_size,
            )
            for name, at in mine.items()
            if at.order.shape[2]
        }
        for states, mine in zip(layout.states, sealed_at, strict=True)
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
    gone_at: Sequence[Mapping[str, Any]],
    is_read: ReadMasks | None = None,
    sealed: Sequence[Mapping[str, Any]] = (),
) -> Hidden:
    """Final hidden states [B, T, E] of complete sequences in the parallel form: of the states that `gone_at` names,
    each head sees what it still holds, and of these tokens what `is_read` says. All are rounded as the `stored` states
    say. Traced."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    starts, counts = jnp.zeros(len(tokens), jnp.int32), jnp.full(len(tokens), tokens.shape[1], jnp.int32)
    memory: list[dict[str, Any]] = []
    for layer, (states, gone) in enumerate(zip(stored, gone_at, strict=True)):
        views = dict[str, Any]()
        for name, state in states.items():
            if name in gone:
                read = None if is_read is None else is_read[layer].get(name)
                make = sealed[layer].get(name, MaskedTokens) if sealed else MaskedTokens
                views[name] = make(state, {}, counts, gone[name], read)
            else:
                views[name] = view_of(state, "whole").of(state, {}, None, starts, counts)
        memory.append(views)
    return model.hidden(tokens, positions, memory)[0]
