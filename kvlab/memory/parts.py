"""What a memory holds in the place of a mixer's states: their storage format, and the parts that a compression makes of
them. The mixer sees one view under its own name; pools, plans and accounts know the parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvlab.compression import Compression, Part, Shape
from kvlab.compression.budget import Budget
from kvlab.ledger.memory_states import Statistics
from kvlab.ledger.retention import Sealing
from kvlab.ledger.states import QUANTISED, ROTATED, PerToken, State, TokenState
from kvlab.memory.config import SEALED, MemoryConfig
from kvlab.memory.formats import left_in_type, sealed_state
from kvlab.memory.views import LayerStates, View, view_of
from kvlab.schema import ConfigError
from kvlab.selection import Selection


@dataclass(frozen=True)
class Joined:
    """Parts that are one state of a mixer: by part, the name of the state that holds it. "" is the tokens."""

    method: Compression | None
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
    return parts_of_stored(stored_states(layers, memory), memory, max_len=max_len, prompt_len=prompt_len)


def parts_of_stored(
    stored: Sequence[LayerStates], memory: MemoryConfig, *, max_len: int, prompt_len: int | None = None
) -> list[LayerParts]:
    """The same for states that are in the memory's format already."""
    parts = _compressed(stored, memory, max_len, prompt_len)
    if memory.format not in SEALED:
        return parts
    method = memory.compression
    if method is not None and method.second_pass(max_len).num_read:
        legal = f"works with no compression that reads on behind a prompt ({method.name})"
        raise ConfigError("memory.format", memory.format, legal)
    sealed = [with_sealed_pages(layer, memory, min(memory.chunk_len, max_len)) for layer in parts]
    if not any(part.sealing for layer in sealed for part in layer.held.values()):
        legal = "serves no layer of this model: it seals keys and values of full attention"
        raise ConfigError("memory.format", memory.format, legal)
    return sealed


def with_sealed_pages(layer: LayerParts, memory: MemoryConfig, chunk_len: int) -> LayerParts:
    """A layer of which keys and values of full attention are sealed page by page. A window forgets before that would
    save anything, and stays as it is."""
    held, joined = dict(layer.held), dict(layer.joined)
    sealing = Sealing(memory.residual, memory.page_size, chunk_len, memory.quantised_prefill == "no")
    for name, part in layer.held.items():
        state = part.state
        if not isinstance(state, TokenState) or left_in_type(state, memory.format):
            continue
        if name in joined and len(joined[name].heads) > 1:
            legal = f"works with no method that parts heads ({memory.compression and memory.compression.name})"
            raise ConfigError("memory.format", memory.format, legal)
        try:
            sealed = sealed_state(state, memory.format)
        except ValueError as error:
            raise ConfigError("memory.format", memory.format, str(error)) from None
        everyone = tuple(range(state.num_kv_heads))
        held |= {name: part._replace(sealing=sealing), f"{name}.sealed": Part(sealed)}
        mine = joined.get(name) or Joined(None, (("", name),), 0, state, (("", everyone),))
        joined[name] = replace(mine, names=(*mine.names, ("sealed", f"{name}.sealed")))
    return LayerParts(held, joined)


def _compressed(
    stored: Sequence[LayerStates], memory: MemoryConfig, max_len: int, prompt_len: int | None
) -> list[LayerParts]:
    """Every layer's states in the parts that a compression makes of them."""
    method = memory.compression
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
        selected, state = state, _unselected(state)
        retention = method.retention(state, shape)
        if retention is None:
            most = max_len
        elif prompt_len is None:
            most = retention.most_of_any(max_len, chunk_len)
        else:
            most = retention.most(prompt_len, max_len, chunk_len)
        shape = shape._replace(num_slots=-(-most // memory.page_size) * memory.page_size)
        parts = method.parts(state, shape)
        if selected.reading is not None:
            parts, state = _with_selection(parts, selected, memory), selected
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


def _unselected(state: State) -> State:
    """A state as it is where all of it is read."""
    if state.reading is None:
        return state
    assert isinstance(state, PerToken)
    return replace(state, reading=None, index=())


def _with_selection(parts: Mapping[str, Part], selected: State, memory: MemoryConfig) -> Mapping[str, Part]:
    """The parts that a compression makes of a state, of whose pages some are read. Raises ConfigError where they are
    not pages that all heads share."""
    assert memory.selection is not None
    assert memory.compression is not None
    if parts.keys() - {"", "noted"} or parts[""].state != _unselected(selected):
        legal = (
            f"must be all with compression = {memory.compression.name}, whose heads store different pages or windows"
        )
        raise ConfigError("memory.selection", memory.selection.name, legal)
    return {**parts, "": parts[""]._replace(state=selected)}


def stored_states(layers: Sequence[LayerStates], memory: MemoryConfig) -> list[dict[str, State]]:
    """Every layer's states in a memory's format, and with the pages that it reads. Raises ConfigError for one that
    such a memory cannot hold, or not in its format, and for a format or a selection that serves no layer."""
    stored = [{name: _stored(state, memory) for name, state in layer.items()} for layer in layers]
    if memory.format not in ("model", *SEALED) and not any(s.per_token for layer in layers for s in layer.values()):
        legal = "serves no layer of this model: it is of stored tokens, and every step rewrites its states"
        raise ConfigError("memory.format", memory.format, legal)
    return stored if memory.selection is None else _selected(stored, memory, memory.selection)


def _selected(layers: Sequence[LayerStates], memory: MemoryConfig, method: Selection) -> list[dict[str, State]]:
    """The states of layers, with the pages that are read of those behind the dense ones."""
    able = [index for index, layer in enumerate(layers) if any(not method.skips(state) for state in layer.values())]
    if not able:
        reasons = sorted({method.skips(state) for layer in layers for state in layer.values()})
        raise ConfigError("memory.selection", method.name, f"serves no layer of this model: {'; '.join(reasons)}")
    if method.dense_layers >= len(able):
        legal = f"must be below {len(able)}, the layers of this model that can select"
        raise ConfigError("memory.selection.dense_layers", method.dense_layers, legal)
    return [
        {
            name: method.of_state(state, memory.page_size)
            if index in able[method.dense_layers :] and not method.skips(state)
            else state
            for name, state in layer.items()
        }
        for index, layer in enumerate(layers)
    ]


def _stored(state: State, memory: MemoryConfig) -> State:
    try:
        view = view_of(state, memory.name)
    except ValueError as error:
        raise ConfigError("memory.name", memory.name, str(error)) from None
    if memory.format not in SEALED and (reason := _refusal(view, state, memory.format)):
        legal = [format for format in ("model", *QUANTISED, *ROTATED) if not _refusal(view, state, format)]
        raise ConfigError("memory.format", memory.format, f"{reason}; legal: {', '.join(legal)}")
    return state.stored("model" if memory.format in SEALED else memory.format)


def _refusal(view: type[View], state: State, format: str) -> str:
    """Why a kind of memory cannot store a state in a format; empty: it can."""
    try:
        view.check(state.stored(format))
    except ValueError as error:
        return str(error)
    return ""
