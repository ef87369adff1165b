"""How a model's states are laid out: equal specs form one class, every layer has its own pool, one ledger rules them
all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import StateClass, sized_class
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import Plan
from kvlab.ledger.replacement import POLICIES
from kvlab.ledger.states import QUANTISED, State
from kvlab.memory.pools import Pool, poisoned
from kvlab.memory.views import LayerStates, View, view_of
from kvlab.schema import ConfigError, Schema, added, choice, integer


@dataclass(frozen=True)
class MemoryConfig(Schema):
    """The memory a model is evaluated through, and the format in which it stores tokens: as the model computes them,
    or as numbers of 8 or 4 bits with a scale for each token and head."""

    name: str = choice("paged", ("paged", "dense"))
    page_size: int = integer(16, 1, 4096)
    chunk_len: int = integer(16, 1, 65536)
    format: str = added(choice("model", ("model", *QUANTISED)))


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
        """The layout in which `max_sequences` sequences may each grow to `max_len` tokens in chunks of
        memory.chunk_len; with `pool_len` all of them together to that many only. See `sized_class` for the rest.

        Raises ConfigError for a state that such a memory cannot hold, or not in its format."""
        chunk_len = min(memory.chunk_len, max_len)
        layers = stored_states(layers, memory)
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

    def allocate(self, fill: float = 0.0) -> tuple[dict[str, Pool], ...]:
        """The pools of every layer: zero, unless a test asks for another fill of what must not be read."""

        def pool_of(state: StateClass) -> Pool:
            pool = _view(state).allocate(state.spec, state.num_pages, state.page_size)
            return poisoned(pool, fill, has_null_page=state.has_null_page) if fill else pool

        return tuple({name: pool_of(self.classes[index]) for name, index in layer.items()} for layer in self.states)

    def views(self, pools: Sequence[Mapping[str, Pool]], plan: Plan) -> tuple[dict[str, View], ...]:
        """Every layer's memory for one step."""
        counts = jnp.asarray(plan.counts)
        starts = [jnp.asarray(mine.starts) for mine in plan.classes]
        shared = [
            _view(state).share(state, mine, before, counts)
            for state, mine, before in zip(self.classes, plan.classes, starts, strict=True)
        ]

        def view(index: int, pool: Pool) -> View:
            state = self.classes[index]
            return _view(state).of(state.spec, pool, plan.classes[index], starts[index], counts, shared[index])

        return tuple(
            {name: view(index, pools[layer][name]) for name, index in states.items()}
            for layer, states in enumerate(self.states)
        )

    def pools(self, views: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Pool], ...]:
        """The pools back out of a step's views."""
        return tuple({name: view.pool for name, view in layer.items()} for layer in views)

    @property
    def is_exact(self) -> bool:
        """Whether what is read is what was written: nothing is quantised."""
        return not any(array.is_scale for state in self.classes for array in state.spec.arrays)

    @property
    def pool_bytes(self) -> int:
        """Stated bytes of all pools; equals the bytes of `allocate()`'s arrays."""
        return sum(state.pool_bytes for state in self.classes)


def _view(state: StateClass) -> type[View]:
    return view_of(state.spec, "dense" if state.contiguous else "paged")


def stored_states(layers: Sequence[LayerStates], memory: MemoryConfig) -> list[dict[str, State]]:
    """Every layer's states as a memory stores them. Raises ConfigError for one that such a memory cannot hold, or not
    in its format."""
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


def _name(state: State, layers: Sequence[LayerStates]) -> str:
    return next(name for layer in layers for name, held in layer.items() if held == state)
