"""Published models as their states and sizes: what capacity is computed from. One YAML each in
`configs/capacity/model`."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Annotated, cast

from pydantic import Field

from kvlab.ledger.readers import Readers
from kvlab.ledger.states import ArraySpec, LatentState, RecurrentState, RetrievalState, State, TokenState
from kvlab.schema import ConfigError, Schema, choice, flag, integer, integers, text
from pallas_kernels.visible import Visible

KINDS = ("full", "window", "chunked", "latent", "retrieval", "recurrent")
VARIANTS = ("published", "mha", "gqa", "mqa", "mla", "window", "recurrent")
WEIGHT_BYTES = {"bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0, "mxfp4": 17 / 32, "int4": 0.5}
"""Of one parameter. MXFP4 has 4 bits and a scale of 8 for each 32 (OCP Microscaling 1.0)."""
WIDE = ("bfloat16", "float16")
"""What models compute keys and values in."""


@dataclass(frozen=True)
class LayerGroup(Schema):
    """`count` layers of one kind. Attention: heads and dims; `window`, `num_sinks`, `chunk` for local kinds; `rank` and
    `rope_dim` for latent ones; `index_dim`, `num_selected` for retrieval; the shapes of one state for recurrent
    ones. Layers that `shares_kv` hold nothing: they read what a layer of the nearest group before that is alike holds.
    """

    kind: str = choice("full", KINDS)
    count: int = integer(1, 1, 4096)
    num_heads: int = integer(1, 1, 4096)
    num_kv_heads: int = integer(1, 1, 4096)
    head_dim: int = integer(128, 1, 4096)
    window: int | None = integer(None, 1, 1 << 24, optional=True)
    num_sinks: int = integer(0, 0, 65536)
    chunk: int | None = integer(None, 1, 1 << 24, optional=True)
    rank: int | None = integer(None, 1, 65536, optional=True)
    rope_dim: int | None = integer(None, 1, 4096, optional=True)
    index_dim: int | None = integer(None, 1, 4096, optional=True)
    num_selected: int | None = integer(None, 1, 1 << 24, optional=True)
    state_shape: tuple[int, ...] = integers((), 1)
    conv_shape: tuple[int, ...] = integers((), 1)
    shares_kv: bool = flag(False)

    def cross_check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("num_kv_heads", self.num_kv_heads, f"must divide num_heads = {self.num_heads}")
        needed = {
            "window": ("window",),
            "chunked": ("chunk",),
            "latent": ("rank", "rope_dim"),
            "retrieval": ("index_dim", "num_selected"),
            "recurrent": ("state_shape",),
        }
        for name in needed.get(self.kind, ()):
            if not getattr(self, name):
                raise ConfigError(name, getattr(self, name), f"must be given for kind {self.kind}")
        if self.shares_kv and self.kind in ("retrieval", "recurrent"):
            raise ConfigError("shares_kv", True, f"must be false for kind {self.kind}")

    def spec(self, dtype: str, num_readers: int = 1) -> State:
        """The state of one layer of a model that computes in `dtype`, as declared, which `num_readers` layers read: a
        memory's format is not in it."""
        if self.kind == "recurrent":
            return RecurrentState(_arrays(dtype, ssm=self.state_shape, conv=self.conv_shape))
        if self.kind == "latent":
            readers = Readers(self.num_heads, num_layers=num_readers) if num_readers > 1 else None
            return LatentState(cast(int, self.rank), cast(int, self.rope_dim), dtype, readers=readers)
        heads = (self.num_kv_heads, self.head_dim, self.head_dim)
        if self.kind == "retrieval":
            return RetrievalState(*heads, cast(int, self.index_dim), cast(int, self.num_selected), dtype)
        visible = Visible()
        if self.kind == "window":
            visible = Visible(self.window, self.num_sinks)
        elif self.kind == "chunked":
            visible = Visible(chunk=self.chunk)
        return TokenState(*heads, dtype, visible=visible, readers=Readers(self.num_heads, num_layers=num_readers))

    def decode_flops(self, n: int) -> int:
        """FLOPs of one layer's mixing for token n, projections apart (they are among the parameters)."""
        if self.kind == "recurrent":
            return 5 * math.prod(self.state_shape)  # decay, outer product and sum; product with the output row
        seen = self.spec("bfloat16").live_len(n) + 1
        if self.kind == "latent":  # absorbed: scores over rank and rope, values over rank
            return 2 * self.num_heads * (2 * cast(int, self.rank) + cast(int, self.rope_dim)) * seen
        index = 2 * cast(int, self.index_dim) * seen if self.kind == "retrieval" else 0
        if self.kind == "retrieval":
            seen = min(seen, cast(int, self.num_selected))
        return index + 4 * self.num_heads * self.head_dim * seen


def _arrays(dtype: str, **shapes: tuple[int, ...]) -> tuple[ArraySpec, ...]:
    return tuple(ArraySpec(name, shape, dtype) for name, shape in shapes.items() if shape)


@dataclass(frozen=True)
class Preset(Schema):
    """A published model: its parameters, its states, and where both are printed.

    `num_active_params` is what one token uses of a mixture of experts, of which `experts_per_token` in `num_experts`
    are chosen. `weight_dtype` is the type in which the weights are published; `num_wide_params` of them, none of an
    expert, have 16 bits whatever it is. `variant` replaces the attention of every layer by another one of the same
    width: one model, many memories.
    """

    name: str = text("none")
    source: str = text("none")
    num_params: int = integer(1, 1, 1 << 62)
    num_active_params: int | None = integer(None, 1, 1 << 62, optional=True)
    num_experts: int = integer(1, 1, 65536)
    experts_per_token: int = integer(1, 1, 65536)
    weight_dtype: str = choice("bfloat16", WEIGHT_BYTES)
    num_wide_params: int = integer(0, 0, 1 << 62)
    variant: str = choice("published", VARIANTS)
    layers: dict[str, LayerGroup] = field(
        kw_only=True, metadata={"type": Annotated[dict[str, LayerGroup], Field(min_length=1)]}
    )

    def cross_check(self) -> None:
        if self.experts_per_token > self.num_experts:
            legal = f"must be at most num_experts = {self.num_experts}"
            raise ConfigError("experts_per_token", self.experts_per_token, legal)
        if self.num_active_params is not None and self.num_active_params > self.num_params:
            raise ConfigError("num_active_params", self.num_active_params, f"must be at most {self.num_params}")
        if self.num_wide_params > self.num_params:
            raise ConfigError("num_wide_params", self.num_wide_params, f"must be at most {self.num_params}")
        self.sources()

    @property
    def num_layers(self) -> int:
        """Layers that hold a state, or read another's."""
        return sum(group.count for group in self.layers.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return int(self.num_params * WEIGHT_BYTES[self.weight_dtype] + self.num_wide_params * self._widening)

    @property
    def _widening(self) -> float:
        """Bytes by which a wide parameter is larger than the others."""
        return 2.0 - WEIGHT_BYTES[self.weight_dtype]

    def read_weight_bytes(self, batch_size: int) -> float:
        """Expected bytes of parameters that a step of `batch_size` tokens reads: every dense one, and the experts that
        some token chooses (independently, uniformly)."""
        active = self.num_active_params or self.num_params
        chosen = self.experts_per_token / self.num_experts
        routed = 0.0 if chosen == 1 else (self.num_params - active) / (1 - chosen)
        dense = self.num_params - routed
        touched = dense + routed * (1 - (1 - chosen) ** batch_size)
        return touched * WEIGHT_BYTES[self.weight_dtype] + min(dense, self.num_wide_params) * self._widening

    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers under `variant`."""
        return tuple(_varied(group, self.variant) for group in self.layers.values())

    def sources(self) -> list[tuple[LayerGroup, int | None]]:
        """Every layer's group under `variant`, and where it reads another layer's keys and values the place of that: of
        the nearest group before that is alike the last layer. Raises ConfigError where there is none."""
        layers, last = list[tuple[LayerGroup, int | None]](), dict[LayerGroup, int]()
        for name, group in zip(self.layers, self.groups(), strict=True):
            alike = replace(group, count=1, shares_kv=False)
            if group.shares_kv and alike not in last:
                legal = f"must be false: no group before {name} holds a state of the same kind and sizes"
                raise ConfigError(f"layers.{name}.shares_kv", True, legal)
            layers += [(group, last[alike] if group.shares_kv else None)] * group.count
            if not group.shares_kv:
                last[alike] = len(layers) - 1
        return layers

    def states(self, dtype: str) -> list[State | None]:
        """Every layer's state; None: it reads another's."""
        layers = self.sources()
        readers = Counter(source for _, source in layers)
        return [
            group.spec(dtype, 1 + readers[place]) if source is None else None
            for place, (group, source) in enumerate(layers)
        ]

    def specs(self, dtype: str) -> dict[State, int]:
        """Every distinct state with its number of layers."""
        return dict(Counter(state for state in self.states(dtype) if state is not None))

    def logical_bytes(self, n: int, dtype: str) -> int:
        """Bytes of live state of one sequence of n tokens."""
        return sum(count * spec.logical_bytes(n) for spec, count in self.specs(dtype).items())

    def moved_bytes(self, n: int, dtype: str) -> int:
        """Bytes of state that decoding token n moves: what it reads, and recurrent states once more, as they are
        written back."""
        return sum(
            count * spec.read_bytes(n) * (1 if spec.per_token else 2) for spec, count in self.specs(dtype).items()
        )

    def decode_flops(self, n: int) -> float:
        """FLOPs of decoding token n: two for each active parameter, and the mixing of every layer."""
        mixing = sum(group.count * group.decode_flops(n) for group in self.groups())
        return 2.0 * (self.num_active_params or self.num_params) + mixing


def _varied(group: LayerGroup, variant: str) -> LayerGroup:
    """The same layer with another mixer; recurrent layers of a hybrid stay as they are, except for "recurrent", of
    which every layer has a state."""
    if variant == "published" or group.kind == "recurrent":
        return group
    heads = {"mha": group.num_heads, "gqa": max(1, group.num_heads // 8), "mqa": 1}
    if variant in heads:
        return replace(group, kind="full", num_kv_heads=heads[variant])
    if variant == "mla":  # DeepSeek-V3's latent: 512 + 64 numbers a token
        return replace(group, kind="latent", rank=512, rope_dim=64)
    if variant == "window":
        return replace(group, kind="window", window=4096, num_sinks=4)
    width = 2 * group.num_heads * group.head_dim  # Mamba-2 of expansion 2: heads of 64, state 128, convolution of 4
    shapes = {"state_shape": (width // 64, 64, 128), "conv_shape": (width + 256, 4)}
    return replace(group, kind="recurrent", shares_kv=False, **shapes)
