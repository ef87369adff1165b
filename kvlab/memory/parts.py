"""What a memory holds in the place of a mixer's states: their storage format, and the parts that a compression makes of
them. The mixer sees one view under its own name; pools, plans and accounts know the parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvlab.compression import Compression, Part, Shape
from kvlab.compression.budget import Budget
from kvlab.ledger.states import QUANTISED, State, Statistics
from kvlab.memory.config import MemoryConfig
from kvlab.memory.views import LayerStates, View, view_of
from kvlab.schema import ConfigError


@dataclass(frozen=True)
class Joined:
    """Parts that are one state of a mixer: by part, the name of the state that holds it. "" is the tokens."""

    method: Compression
    names: tuple[tuple[str, str], ...]
    layer: int
    """Among the layers that are compressed."""
    state: State
    """What they are together, as it is stored."""
    heads: tuple[tuple[str, tuple[int, ...]], ...]
    """By part, statistics apart, the KV heads of the state that it holds."""


@dataclass(frozen=True)
class LayerParts:
    """One layer: every state that is held, by name, and those of the mixer's that are held in parts."""

    held: Mapping[str, Part]
    joined: Mapping[str, Joined]


def parts_of(
    layers: Sequence[LayerStates], memory: MemoryConfig, *, max_len: int, prompt_len: int | None = None
) -> list[LayerParts]:
    """Every layer's states as a memory holds them. Raises ConfigError for a state that it cannot hold."""
    stored, method = stored_states(layers, memory), memory.compression
    if method is None:
        return [LayerParts({name: Part(state) for name, state in layer.items()}, {}) for layer in stored]
    compressed = [index for index, layer in enumerate(stored) if any(not method.skips(s) for s in layer.values())]
    if not compressed:
        reasons = sorted({method.skips(state) for layer in stored for state in layer.values()})
        raise ConfigError("memory.compression", method.name, f"serves no layer of this model: {'; '.join(reasons)}")
    return [
        _in_parts(layer, memory, method, max_len, prompt_len, (compressed.index(index), len(compressed)))
        if index in compressed
        else LayerParts({name: Part(state) for name, state in layer.items()}, {})
        for index, layer in enumerate(stored)
    ]


def _in_parts(
    layer: Mapping[str, State],
    memory: MemoryConfig,
    method: Compression,
    max_len: int,
    prompt_len: int | None,
    place: tuple[int, int],
) -> LayerParts:
    held, joined = dict[str, Part](), dict[str, Joined]()
    chunk_len = min(memory.chunk_len, max_len)
    for name, state in layer.items():
        if method.skips(state):
            held[name] = Part(state)
            continue
        assert memory.budget is not None
        shape = Shape(Budget.of(memory.budget), max_len, chunk_len, *place, memory.page_size)
        retention = method.retention(state, shape)
        if retention is None:
            most = max_len
        elif prompt_len is None:
            most = retention.most_of_any(max_len, chunk_len)
        else:
            most = retention.most(prompt_len, max_len, chunk_len)
        shape = shape._replace(num_slots=-(-most // memory.page_size) * memory.page_size)
        parts = method.parts(state, shape)
        names = {part: f"{name}.{part}" if part else name for part in parts}
        held |= {names[part]: value._replace(heads=None) for part, value in parts.items()}
        everyone = tuple(range(state.arrays[0].shape[0]))
        heads = tuple(
            (part, everyone if value.heads is None else value.heads)
            for part, value in parts.items()
            if not isinstance(value.state, Statistics)
        )
        joined[name] = Joined(method, tuple(names.items()), place[0], state, heads)
    return LayerParts(held, joined)


def stored_states(layers: Sequence[LayerStates], memory: MemoryConfig) -> list[dict[str, State]]:
    """Every layer's states in a memory's format. Raises ConfigError for one that such a memory cannot hold, or not in
    its format."""
    return [{name: _stored(state, memory) for name, state in layer.items()} for layer in layers]


def _stored(state: State, memory: MemoryConfig) -> State:
    try:
        view = view_of(state, memory.name)
    except ValueError as error:
        raise ConfigError("memory.name", memory.name, str(error)) from None
    if reason := _refusal(view, state, memory.format):
        legal = [format for format in ("model", *QUANTISED) if not _refusal(view, state, format)]
        raise ConfigError("memory.format", memory.format, f"{reason}; legal: {', '.join(legal)}")
    return state.stored(memory.format)


def _refusal(view: type[View], state: State, format: str) -> str:
    """Why a kind of memory cannot store a state in a format; empty: it can."""
    try:
        view.check(state.stored(format))
    except ValueError as error:
        return str(error)
    return ""
