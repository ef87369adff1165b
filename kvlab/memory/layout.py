"""How a model's states are laid out: equal specs form one class, every layer has its own pool, one ledger rules them all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import StateClass, sized_class
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import Plan
from kvlab.ledger.replacement import POLICIES
from kvlab.ledger.states import State
from kvlab.memory import pools as device
from kvlab.schema import Schema, choice, integer

type LayerStates = Mapping[str, State]
"""The named states of one layer: {"kv": ...}, {"ssm": ...}, a short convolution's {"short_conv": ...}."""


@dataclass(frozen=True)
class MemoryConfig(Schema):
    """The memory a model is evaluated through."""

    name: str = choice("paged", ("paged", "dense"))
    page_size: int = integer(16, 1, 4096)
    chunk_len: int = integer(16, 1, 65536)


@dataclass(frozen=True)
class MemoryLayout:
    """Classes, and which class each (layer, state) belongs to. Host data only; `allocate` makes the arrays.

    `states[l][name]` is an index into `classes`.
    """

    classes: tuple[StateClass, ...]
    states: tuple[dict[str, int], ...]
    max_sequences: int
    max_len: int
    chunk_len: int
    page_size: int

    def __hash__(self) -> int:
        return hash((self.classes, self.max_sequences, self.max_len, self.chunk_len))

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerStates],
        memory: MemoryConfig,
        *,
        max_sequences: int,
        max_len: int,
        pool_len: int | None = None,
        host_len: int = 0,
        spare_states: int = 0,
    ) -> "MemoryLayout":
        """The layout in which `max_sequences` sequences may each grow to `max_len` tokens in chunks of memory.chunk_len; with
        `pool_len` all of them together to that many only. See `sized_class` for the rest."""
        chunk_len = min(memory.chunk_len, max_len)
        specs: dict[State, int] = {}
        for layer in layers:
            for spec in layer.values():
                specs[spec] = specs.get(spec, 0) + 1
        order = list(specs)
        names = [name for spec in order for name in [_name(spec, layers)]]
        classes = tuple(
            sized_class(
                f"{name}.{index}" if names.count(name) > 1 else name,
                spec,
                num_layers=specs[spec],
                page_size=memory.page_size,
                contiguous=memory.name == "dense",
                max_sequences=max_sequences,
                max_len=max_len,
                chunk_len=chunk_len,
                pool_len=pool_len,
                host_len=host_len,
                spare_states=spare_states,
            )
            for index, (name, spec) in enumerate(zip(names, order, strict=True))
        )
        states = tuple({name: order.index(spec) for name, spec in layer.items()} for layer in layers)
        return cls(classes, states, max_sequences, max_len, chunk_len, memory.page_size)

    def ledger(self, policy: str = "lru", checkpoints: str = "junctions") -> Ledger:
        """An empty ledger over these classes, evicting by `policy` and keeping recurrent states by `checkpoints`."""
        return Ledger(
            self.classes,
            self.max_len,
            self.chunk_len,
            policy=POLICIES[policy],
            checkpoints=Checkpoints(checkpoints),
            page_size=self.page_size,
        )

    def allocate(self, fill: float = 0.0) -> tuple[dict[str, device.Pool], ...]:
        """The pools of every layer, zero unless a test asks for another fill."""
        return tuple(
            {name: device.allocate(self.classes[index], fill) for name, index in layer.items()} for layer in self.states
        )

    def views(self, pools: Sequence[Mapping[str, device.Pool]], plan: Plan) -> tuple[dict[str, device.View], ...]:
        """Every layer's memory for one step."""
        starts, counts = jnp.asarray(plan.starts), jnp.asarray(plan.counts)
        shared = [
            device.attention_plan(state, mine, starts, counts)
            for state, mine in zip(self.classes, plan.classes, strict=True)
        ]
        return tuple(
            {
                name: device.view(
                    self.classes[index], pools[layer][name], plan.classes[index], starts, counts, shared[index]
                )
                for name, index in states.items()
            }
            for layer, states in enumerate(self.states)
        )

    def pools(self, views: Sequence[Mapping[str, Any]]) -> tuple[dict[str, device.Pool], ...]:
        """The pools back out of a step's views."""
        return tuple({name: view.pool for name, view in layer.items()} for layer in views)

    @property
    def pool_bytes(self) -> int:
        """Stated bytes of all pools; equals the bytes of `allocate()`'s arrays."""
        return sum(state.pool_bytes for state in self.classes)


def _name(spec: State, layers: Sequence[LayerStates]) -> str:
    return next(name for layer in layers for name, one in layer.items() if one == spec)
