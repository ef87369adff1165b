"""Some heads keep everything, the others sinks and a window (DuoAttention, arXiv 2410.10819)."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from kvlab.compression.base import Part, Shape
from kvlab.compression.streaming import Windowed
from kvlab.ledger.states import State, TokenState
from kvlab.schema import ConfigError, integer_lists, real, text

type Ranking = tuple[tuple[int, int], ...]
"""(layer, KV head) from the one that loses least when it alone is made streaming to the one that loses most; layers
count those that are compressed."""


@dataclass(frozen=True)
class Duo(Windowed):
    """The heads of a state are held as two: those that keep every token, and those that stream, with `sinks` and a
    window of `memory.budget` slots. Which heads stream is said by `streaming`, a list of KV heads for each layer that
    is compressed, or by a file of `kvlab.evaluation.heads.rank_heads`, of which the first `share` stream; `sha256`
    pins its contents."""

    name: ClassVar[str] = "duo"

    streaming: tuple[tuple[int, ...], ...] = integer_lists((), 0, 65536)
    ranking: str | None = text(None, legal="must be a file that ranks heads, or null", optional=True)
    share: float = real(0.5, 0.0, 1.0)
    sha256: str | None = text(None, legal="must be the SHA-256 of the ranking's file, or null", optional=True)

    def cross_check(self) -> None:
        if bool(self.streaming) == (self.ranking is not None):
            legal = "must be given, or else ranking: which heads stream is a property of the model"
            raise ConfigError("streaming", [list(heads) for heads in self.streaming], legal)
        for heads in self.streaming:
            if len(set(heads)) < len(heads):
                raise ConfigError("streaming", list(heads), "must not name a head twice")
        if self.ranking is not None:
            ranked(self.ranking, self.sha256)

    def skips(self, state: State) -> str:
        if not isinstance(state, TokenState):
            return super().skips(state) or "its heads share one row, which cannot be split"
        return super().skips(state)

    def streaming_heads(self, layer: int, num_layers: int, num_kv_heads: int) -> tuple[int, ...]:
        """The KV heads of a layer that stream, ascending. Raises ConfigError where what was given does not fit the
        model."""
        if self.ranking is None:
            if len(self.streaming) != num_layers:
                legal = f"must have a list for each compressed layer, {num_layers} in all"
                raise ConfigError("memory.compression.streaming", [list(heads) for heads in self.streaming], legal)
            heads = self.streaming[layer]
            if heads and max(heads) >= num_kv_heads:
                legal = f"must be below the {num_kv_heads} KV heads of layer {layer}"
                raise ConfigError("memory.compression.streaming", list(heads), legal)
            return tuple(sorted(heads))
        order = ranked(self.ranking, self.sha256)
        mine = [head for place, head in order if place == layer]
        if sorted(mine) != list(range(num_kv_heads)) or max(place for place, _ in order) >= num_layers:
            legal = f"must rank all {num_kv_heads} KV heads of each compressed layer, {num_layers} in all"
            raise ConfigError("memory.compression.ranking", self.ranking, legal)
        first = order[: int(self.share * len(order) + 0.5)]
        return tuple(sorted(head for place, head in first if place == layer))

    def parts(self, state: State, shape: Shape) -> Mapping[str, Part]:
        assert isinstance(state, TokenState)
        visible, everyone = self.visible(shape.budget), range(state.num_kv_heads)
        streaming = self.streaming_heads(shape.layer, shape.num_layers, state.num_kv_heads)
        full = tuple(head for head in everyone if head not in streaming)
        if not streaming:
            return {"": Part(state)}
        if not full:
            return {"": Part(replace(state, visible=visible))}
        return {
            "full": Part(state.of_heads(len(full)), heads=full),
            "streaming": Part(replace(state.of_heads(len(streaming)), visible=visible), heads=streaming),
        }


@lru_cache(maxsize=16)
def ranked(path: str, sha256: str | None = None) -> Ranking:
    """A ranking from its file, {"ranking": [{"layer": 0, "head": 1, ...}, ...]}. Raises ConfigError for what is none,
    or has other contents than `sha256` says."""
    try:
        written = Path(path).read_bytes()
        rows: Any = json.loads(written)["ranking"]
        order = tuple((int(row["layer"]), int(row["head"])) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("ranking", path, f"must be a file that ranks heads ({type(error).__name__})") from None
    if not order or len(set(order)) < len(order) or min(map(min, order)) < 0:
        raise ConfigError("ranking", path, "must rank each head once")
    found = hashlib.sha256(written).hexdigest()
    if sha256 is not None and found != sha256:
        raise ConfigError("sha256", sha256, f"must be that of {path}, which is {found}")
    return order
