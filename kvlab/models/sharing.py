"""Layers that read the keys and values of a layer before them (CLA, arXiv 2405.12981; YOCO, arXiv 2405.05254; the upper
layers of Gemma 3n): which reads whose, and how a view is handed on. Such a layer holds nothing, so no memory knows of
it; what it reads is what the other has stored, the tokens of the same step included."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvlab.ledger.states import PerToken
from kvlab.memory.views import LayerStates
from kvlab.mixers import LayerMemory, MixerConfig
from kvlab.mixers.attention import AttentionConfig
from kvlab.schema import ConfigError

type Sources = tuple[int | None, ...]
"""Of every layer the one whose keys and values it reads; None: it has its own, or needs none."""

SHARED = "kv"
"""The state that is shared, by the name that its mixer gives it."""
SHAPE = ("num_heads", "num_kv_heads", "head_dim", "window", "num_sinks", "soft_cap", "scale", "rope")
ROTARY = ("rope_base", "rope_fraction", "rope_scaling")
"""Fields in which two layers must agree for one to read what the other stores; those of rotary embeddings where there
are any."""


def sources_of(layers: Sequence[MixerConfig], names: Sequence[str] = ()) -> Sources:
    """Of each layer that shares keys and values the nearest before it that holds its own, and fits. `names` are what
    errors call the layers; without them "layers.0" and so on. Raises ConfigError for a layer that finds none."""
    names = names or [f"layers.{index}" for index in range(len(layers))]
    return tuple(
        _source(layers, index, names) if isinstance(config, AttentionConfig) and config.shares_kv else None
        for index, config in enumerate(layers)
    )


def _source(layers: Sequence[MixerConfig], index: int, names: Sequence[str]) -> int:
    mine, nearest = layers[index], None
    assert isinstance(mine, AttentionConfig)
    for place in range(index - 1, -1, -1):
        other = layers[place]
        if type(other) is not AttentionConfig or other.shares_kv:  # an indexed layer stores something else
            continue
        apart = differences(mine, other)
        if not apart:
            return place
        nearest = nearest or (place, other, apart)
    field = f"{names[index]}.shares_kv"
    if nearest is None:
        legal = f"must be false in layer {index}: no layer before it holds keys and values that it could read"
        raise ConfigError(field, True, legal)
    place, other, apart = nearest
    fitting = " ".join(f"{names[index]}.{name}={_word(getattr(other, name))}" for name in apart)
    legal = (
        f"layer {index} finds no keys and values that fit; to read those of layer {place} ({names[place]}) it needs "
    )
    raise ConfigError(field, True, legal + fitting)


def _word(value: object) -> str:
    """A value as the command line takes it."""
    return json.dumps(value, separators=(",", ":"))


def differences(reader: AttentionConfig, source: AttentionConfig) -> list[str]:
    """The fields because of which a layer cannot read what another stores; none: it can."""
    fields = (*SHAPE, *ROTARY) if reader.rope and source.rope else SHAPE
    return [name for name in fields if getattr(reader, name) != getattr(source, name)]


def read_by_all(states: Sequence[LayerStates], sources: Sources) -> tuple[LayerStates, ...]:
    """The states of every layer, each of which says how many layers read it."""
    readers, found = Counter(source for source in sources if source is not None), list[LayerStates]()
    for layer, mine in enumerate(states):
        if layer in readers:
            state = mine[SHARED]
            assert isinstance(state, PerToken)
            assert state.readers is not None
            read = replace(state, readers=replace(state.readers, num_layers=1 + readers[layer]))
            mine = {**mine, SHARED: read}
        found.append(mine)
    return tuple(found)


def lent(memory: LayerMemory, source: int | None, after: Sequence[LayerMemory]) -> LayerMemory:
    """The memory of a layer with what it reads of its source, whose step is done."""
    return memory if source is None else {**memory, SHARED: after[source][SHARED]}


def take_back(mine: LayerMemory, source: int | None, after: list[Any]) -> LayerMemory:
    """What a layer leaves of its own. The view that it was lent, which may have noted who was attended to, becomes its
    source's in `after`."""
    if source is None:
        return mine
    after[source] = {**after[source], SHARED: mine[SHARED]}
    return {name: view for name, view in mine.items() if name != SHARED}


def readers_of(layer: str, layers: Mapping[str, MixerConfig], pattern: str) -> set[str]:
    """The named layers of a pattern, "A B", that read what the named `layer` stores."""
    names = pattern.split()
    sources = sources_of([layers[name] for name in names])
    return {names[reader] for reader, source in enumerate(sources) if source is not None and names[source] == layer}
