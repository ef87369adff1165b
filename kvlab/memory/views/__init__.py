"""Views by the state's type and the kind of memory. A new kind is a file and its lines here; no mixer knows of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from kvlab.ledger.memory_states import SealedState, Statistics
from kvlab.ledger.states import LatentState, RecurrentState, RetrievalState, State, TokenState
from kvlab.memory.views.base import StateView, TokenView, View
from kvlab.memory.views.dense import DenseTokens
from kvlab.memory.views.latent import PagedLatents
from kvlab.memory.views.paged import PagedTokens
from kvlab.memory.views.retrieval import PagedRetrieval
from kvlab.memory.views.sealed import SealedPages
from kvlab.memory.views.slots import StateSlots
from kvlab.memory.views.whole import WholeLatents, WholeRetrieval, WholeStates, WholeTokens

VIEWS: dict[tuple[type[State], str], type[View]] = {
    (TokenState, "paged"): PagedTokens,
    (TokenState, "dense"): DenseTokens,
    (TokenState, "whole"): WholeTokens,
    (LatentState, "paged"): PagedLatents,
    (LatentState, "whole"): WholeLatents,
    (RetrievalState, "paged"): PagedRetrieval,
    (RetrievalState, "whole"): WholeRetrieval,
    (RecurrentState, "paged"): StateSlots,
    (RecurrentState, "dense"): StateSlots,
    (Statistics, "paged"): StateSlots,
    (SealedState, "paged"): SealedPages,
    (RecurrentState, "whole"): WholeStates,
}

type LayerStates = Mapping[str, State]
"""The named states of one layer: {"kv": ...}, {"ssm": ...}, a short convolution's {"short_conv": ...}."""


def view_of(state: State, memory: str) -> type[View]:
    """The view of a state in a kind of memory. Raises ValueError for a kind that cannot hold it."""
    try:
        return VIEWS[type(state), memory]
    except KeyError:
        legal = [kind for held, kind in VIEWS if held is type(state) and kind != "whole"]
        raise ValueError(f"cannot hold {type(state).__name__}; legal: {', '.join(legal) or 'none'}") from None


def whole(
    layers: Sequence[LayerStates], batch_size: int, num_tokens: int, progress: Any = None
) -> tuple[dict[str, Any], ...]:
    """The memory of every layer for complete sequences of `num_tokens`: training, which says what share of its steps is
    done, and scoring in the parallel form."""
    starts, counts = jnp.zeros(batch_size, jnp.int32), jnp.full(batch_size, num_tokens, jnp.int32)
    return tuple(
        {name: view_of(state, "whole").of(state, {}, None, starts, counts, progress) for name, state in layer.items()}
        for layer in layers
    )


__all__ = ["VIEWS", "LayerStates", "StateView", "TokenView", "View", "view_of", "whole"]
