"""How a model's states are laid out: equal specs form one class, every layer has its own pool, one ledger rules them
all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from kvlab.compression import Part, PassLens
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import StateClass, sized_class
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import Plan
from kvlab.ledger.replacement import POLICIES
from kvlab.ledger.states import State, max_pages_for_step
from kvlab.memory.config import MemoryConfig
from kvlab.memory.parts import Joined, LayerParts, parts_of, stored_states
from kvlab.memory.pools import Pool, poisoned
from kvlab.memory.views import LayerStates, View, view_of
from kvlab.memory.views.dealt import DealtTokens
from kvlab.memory.views.noted import NotedTokens
from kvlab.memory.views.sealed import SealedTokens
from kvlab.memory.views.selected import SelectedTokens
from kvlab.memory.views.split import SplitTokens
from kvlab.selection import Selection


@dataclass(frozen=True)
class MemoryLayout:
    """Classes, and which class each (layer, state) belongs to. Host data only; `allocate` makes the arrays.

    `states[l][name]` is an index into `classes`; `joined[l]` are the mixer's states that are held in parts of these.
    There is room for a sequence at a time to read on behind its prompt, up to `pass_len` tokens in all
    (`Compression.second_pass`).
    """

    classes: tuple[StateClass, ...]
    states: tuple[dict[str, int], ...]
    joined: tuple[Mapping[str, Joined], ...]
    max_sequences: int
    max_len: int
    chunk_len: int
    page_size: int
    pass_len: int
    selection: Selection | None = None
    """Who chooses what is read of the states that have a `reading`."""

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
        prompt_len: int | None = None,
    ) -> "MemoryLayout":
        """The layout in which `max_sequences` sequences may each grow to `max_len` tokens in chunks of
        memory.chunk_len; with `pool_len` all of them together to that many only. See `sized_class` for the rest.

        Raises ConfigError for a state that such a memory cannot hold, or not in its format."""
        chunk_len = min(memory.chunk_len, max_len)
        parts = parts_of(layers, memory, max_len=max_len, prompt_len=prompt_len)
        counts: dict[Part, int] = {}
        for layer in parts:
            for part in layer.held.values():
                counts[part] = counts.get(part, 0) + 1
        order = list(counts)
        names = [_name(part, parts) for part in order]
        classes = tuple(
            sized_class(
                f"{name}.{index}" if names.count(name) > 1 else name,
                part.state,
                num_layers=counts[part],
                page_size=memory.page_size,
                contiguous=memory.name == "dense",
                max_sequences=max_sequences,
                max_len=max_len,
                chunk_len=chunk_len,
                pool_len=pool_len,
                host_len=host_len,
                spare_states=spare_states,
                retention=part.retention,
                prompt_len=prompt_len,
                sealing=part.sealing,
            )
            for index, (name, part) in enumerate(zip(names, order, strict=True))
        )
        states = tuple({name: order.index(part) for name, part in layer.held.items()} for layer in parts)
        joined = tuple(layer.joined for layer in parts)
        classes = with_targets(classes, states)
        lens = memory.compression.second_pass(max_len, prompt_len) if memory.compression else PassLens(0, max_len)
        if lens.num_read:
            classes = tuple(_with_pass(state, lens, chunk_len) for state in classes)
        sizes = max_sequences, max_len, chunk_len, memory.page_size, max(max_len, lens.total_len)
        return cls(classes, states, joined, *sizes, selection=memory.selection)

    def ledger(self, policy: str = "lru", checkpoints: str = "junctions") -> Ledger:
        """An empty ledger over these classes, evicting by `policy` and keeping recurrent states by `checkpoints`."""
        return Ledger(
            self.classes,
            self.pass_len,
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

    def views(
        self, pools: Sequence[Mapping[str, Pool]], plan: Plan, *, listens: bool = False
    ) -> tuple[dict[str, Any], ...]:
        """Every layer's memory for one step; it `listens` where it is one of a second pass."""
        counts = jnp.asarray(plan.counts)
        starts = [jnp.asarray(mine.starts) for mine in plan.classes]
        shared = [
            _view(state).share(state, mine, before, counts)
            for state, mine, before in zip(self.classes, plan.classes, starts, strict=True)
        ]

        def view(index: int, pool: Pool, layer: int) -> Any:
            state = self.classes[index]
            made = _view(state).of(state.spec, pool, plan.classes[index], starts[index], counts, shared[index])
            return made if state.spec.reading is None else SelectedTokens(self.selection, layer, made)

        made: list[dict[str, Any]] = []
        for layer, states in enumerate(self.states):
            views = {name: view(index, pools[layer][name], layer) for name, index in states.items()}
            for name, joined in self.joined[layer].items():
                parts = {part: views.pop(held) for part, held in joined.names}
                views[name] = _one_view(joined, parts, listens)
            made.append(views)
        return tuple(made)

    def pools(self, views: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Pool], ...]:
        """The pools back out of a step's views."""
        pools = []
        for layer, joined in zip(views, self.joined, strict=True):
            mine = dict[str, Pool]()
            for name, view in layer.items():
                if isinstance(view, NotedTokens | DealtTokens | SplitTokens | SealedTokens):
                    parts = view.parts()
                    mine |= {held: parts[part].pool for part, held in joined[name].names}
                else:
                    mine[name] = view.pool
            pools.append(mine)
        return tuple(pools)

    def read_by(self, views: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
        """Of a step's views, by layer and state, of what selects: which entries of its list of pages each query read,
        [B, T, K, N] for each layer that reads it."""
        found = ({name: _selected(view) for name, view in layer.items()} for layer in views)
        return tuple({name: view.is_read for name, view in layer.items() if view is not None} for layer in found)

    @property
    def selects(self) -> bool:
        """Whether a step may read less than what is stored."""
        return any(state.spec.reading is not None for state in self.classes)

    @property
    def stored(self) -> tuple[dict[str, State], ...]:
        """Every layer's states as the mixer names them, in the memory's format; what is held in parts, as one."""
        layers = list[dict[str, State]]()
        for states, joined in zip(self.states, self.joined, strict=True):
            parts = {held for each in joined.values() for _, held in each.names}
            mine = {name: self.classes[index].spec for name, index in states.items() if name not in parts}
            layers.append(mine | {name: each.state for name, each in joined.items()})
        return tuple(layers)

    @property
    def compresses(self) -> bool:
        """Whether sequences may store fewer slots than they have tokens, or fewer in the model's type."""
        return any(state.retention or state.sealing for state in self.classes)

    @property
    def is_exact(self) -> bool:
        """Whether what is read is what was written, and all of it: nothing is quantised, nothing dropped, nothing
        passed over."""
        return not self.is_quantised and not any(self.joined) and not self.selects

    @property
    def is_quantised(self) -> bool:
        """Whether something is stored in fewer bits than the model computes."""
        return any(array.is_scale for state in self.classes for array in state.spec.arrays)

    @property
    def has_short_scales(self) -> bool:
        """Whether a scale is itself rounded to fewer bits than float32."""
        return any(array.is_scale and array.dtype != "float32" for state in self.classes for array in state.spec.arrays)

    @property
    def pool_bytes(self) -> int:
        """Stated bytes of all pools; equals the bytes of `allocate()`'s arrays."""
        return sum(state.pool_bytes for state in self.classes)


def _one_view(joined: Joined, parts: Mapping[str, Any], listens: bool) -> Any:
    """What the mixer sees of a state that is held in parts."""
    if len(parts) == 1:
        return parts[""]
    if "dealt" in parts:
        parts = {**parts, "": DealtTokens.of_parts(parts)}
    if "sealed" in parts:
        parts = {**parts, "": SealedTokens.of_parts(parts)}
    if "noted" in parts:
        return NotedTokens.of_parts(joined.method, parts, listens=listens)
    if "dealt" in parts or "sealed" in parts:
        return parts[""]
    return SplitTokens.of_parts(joined.heads, parts)


def with_targets(classes: tuple[StateClass, ...], states: Sequence[Mapping[str, int]]) -> tuple[StateClass, ...]:
    """Classes of open pages know which class takes what they seal."""
    targets = {
        index: classes[layer[f"{name}.sealed"]].name
        for layer in states
        for name, index in layer.items()
        if f"{name}.sealed" in layer
    }
    return tuple(replace(state, sealed_name=targets.get(index, "")) for index, state in enumerate(classes))


def _with_pass(state: StateClass, lens: PassLens, chunk_len: int) -> StateClass:
    """A class with room for a sequence to read on behind its prompt, on a fork of its own: the pages of these tokens
    and a copy of the prompt's last, or one more state."""
    if not state.spec.per_token:
        return replace(state, num_pages=state.num_pages + 1)
    table_len = max(state.table_len, max_pages_for_step(state.spec, lens.total_len, chunk_len, state.page_size))
    more = min(table_len, -(-lens.num_read // state.page_size) + 1)
    return replace(state, num_pages=state.num_pages + more, table_len=table_len)


def _view(state: StateClass) -> type[View]:
    return view_of(state.spec, "dense" if state.contiguous else "paged")


def _selected(view: Any) -> SelectedTokens | None:
    """The part of a view that selects; None: it reads everything."""
    tokens = view.tokens if isinstance(view, NotedTokens) else view
    return tokens if isinstance(tokens, SelectedTokens) else None


def _name(part: Part, layers: Sequence[LayerParts]) -> str:
    return next(name for layer in layers for name, held in layer.held.items() if held == part)


__all__ = ["MemoryConfig", "MemoryLayout", "stored_states"]
