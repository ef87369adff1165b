"""What a memory's format makes of a mixer's state, and which states a memory leaves as they are."""

from collections.abc import Sequence

from kvlab.ledger.memory_states import SealedState
from kvlab.ledger.states import State, TokenState
from kvlab.memory.config import SEALED, MemoryConfig
from kvlab.memory.views import LayerStates

GROUP = 32
"""Channels of a token's values that share a scale in sealed pages; fewer where that divides no head dim."""


def left_in_type(state: State, format: str) -> str:
    """Why a format leaves a state in the model's type; empty: it does not."""
    if format == "model":
        return ""
    if not state.per_token:
        return "every step rewrites it"
    if format not in SEALED:
        return ""
    if type(state) is not TokenState:
        return "pages of keys and values are sealed, and nothing else"
    return "a window forgets by itself" if state.span is not None else ""


def sealed_state(state: TokenState, format: str) -> SealedState:
    """What sealed pages of a state hold. Raises ValueError for head dims that fill no whole bytes."""
    bits = SEALED[format]
    sealed = SealedState(
        state.num_kv_heads,
        state.key_dim,
        state.value_dim,
        state.dtype,
        readers=state.readers,
        key_bits=bits,
        value_bits=bits,
        group=next(size for size in range(GROUP, 0, -1) if state.value_dim % size == 0),
    )
    _ = sealed.arrays
    return sealed


def skipped(layers: Sequence[LayerStates], memory: MemoryConfig) -> dict[str, str]:
    """The states that a memory leaves as they are, by "layer.name", with what leaves them and why."""
    found, method = dict[str, str](), memory.compression
    for layer, states in enumerate(layers):
        for name, state in states.items():
            reasons = []
            if method is not None and (reason := method.skips(state)):
                reasons.append(f"{method.name}: {reason}")
            if reason := left_in_type(state, memory.format):
                reasons.append(f"{memory.format}: {reason}")
            if reasons:
                found[f"{layer}.{name}"] = "; ".join(reasons)
    return found
