"""The device step, a pure function."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import Array
from jaxtyping import Bool

from kvlab.engine.listener import Listener, Slots, heard
from kvlab.ledger.plan import Compaction, Plan, Seals
from kvlab.memory.compacting import Kept, compact, padded, seal_layers
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.pools import copy_pages, padded_pages, poison_pages
from kvlab.memory.reading_back import Given, read_back, read_sealed
from kvlab.models.transformer import Transformer, logits_at, merge
from kvlab.programs import LET_GO, make_room, program
from kvlab.typing import Hidden, LabelLogits, Logits, Params, Tokens

type Pools = tuple[Mapping[str, Any], ...]
type IsRead = tuple[Mapping[str, Any], ...]
"""By layer and state, for those that select, of each layer that reads it: [B, T, K, N] whether a query read an entry of
its list of pages."""


@dataclass(frozen=True, eq=False)
class MemoryStep:
    """`step(params, pools, plan, tokens) -> (logits, pools)`; pools are donated, so nothing is copied.

    Programs belong to a step and go with it; `of` gives the same one to all who ask for the same."""

    structure: nnx.GraphDef[Transformer]
    layout: MemoryLayout

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, structure: nnx.GraphDef[Transformer], layout: MemoryLayout) -> "MemoryStep":
        """The step of a model in a memory: engines and sessions that are alike share their programs, and compile them
        once. Where the process runs short of mappings, those that nobody uses are let go of (`kvlab.programs`)."""
        make_room()
        return cls(structure, layout)

    @program(donate_argnums=1)
    def __call__(self, params: Params, pools: Pools, plan: Plan, tokens: Tokens) -> tuple[Logits, Pools]:
        """Logits [B, T, V] of tokens [B, T], which continue what the plan's sequences hold; rows past counts are
        noise."""
        model, hidden, pools = self.forward(params, pools, plan, tokens)
        return model.logits(hidden), pools

    @program(donate_argnums=1)
    def observe(self, params: Params, pools: Pools, plan: Plan, tokens: Tokens) -> tuple[Logits, Pools, IsRead]:
        """As a call, and by layer and state which entries of its list of pages each query read: for verification."""
        model, hidden, views = self._advance(params, pools, plan, tokens)
        return model.logits(hidden), self.layout.pools(views), self.layout.read_by(views)

    @program(static_argnames="everywhere", donate_argnums=1)
    def next_logits(
        self, params: Params, pools: Pools, plan: Plan, tokens: Tokens, *, everywhere: bool = False
    ) -> tuple[LabelLogits, Bool[Array, "B"], Pools]:
        """Logits [B, M, V] after each row's last token, M = 1, or with `everywhere` after each of its tokens, M = T;
        and whether all that a row computed is finite."""
        model, hidden, pools = self.forward(params, pools, plan, tokens)
        counts = jnp.asarray(plan.counts)[:, None]
        offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        finite = jnp.isfinite(hidden).all(axis=-1) | (offsets >= counts)
        logits = model.logits(hidden) if everywhere else logits_at(model, hidden, jnp.maximum(counts - 1, 0))
        return logits, finite.all(axis=1), pools

    @program(donate_argnums=1)
    def listen(self, params: Params, pools: Pools, plan: Plan, tokens: Tokens) -> Pools:
        """The pools after tokens [B, T] that are read only for what they attend to: there are no logits."""
        return self.forward(params, pools, plan, tokens, listens=True)[2]

    def forward(
        self, params: Params, pools: Pools, plan: Plan, tokens: Tokens, *, listens: bool = False
    ) -> tuple[Transformer, Hidden, Pools]:
        """The model, its final hidden states [B, T, E] of the plan's tokens, and the pools after; traced, not
        compiled. A step of a second pass `listens`."""
        model, hidden, views = self._advance(params, pools, plan, tokens, listens=listens)
        return model, hidden, self.layout.pools(views)

    def _advance(
        self, params: Params, pools: Pools, plan: Plan, tokens: Tokens, *, listens: bool = False
    ) -> tuple[Transformer, Hidden, Any]:
        """The same with the views after the step in place of their pools."""
        model = merge(self.structure, params)
        positions = jnp.asarray(plan.starts)[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        hidden, views = model.hidden(tokens, positions, self.layout.views(pools, plan, listens=listens))
        return model, hidden, views

    def compiled(self, params: Params, pools: Pools, num_tokens: int) -> Any:
        """The compiled step for chunks of `num_tokens`: what `memory_analysis()` is asked of. Nothing runs."""
        batch_size = self.layout.max_sequences
        plan = self.layout.ledger().plan([], batch_size, num_tokens)
        tokens = jax.ShapeDtypeStruct((batch_size, num_tokens), jnp.int32)
        return type(self).__call__.lower(self, params, pools, plan, tokens).compile()

    @program(donate_argnums=0)
    def copy(self, pools: Pools, copies: tuple[Array, ...]) -> Pools:
        """The pools with every class's (source, destination) pages copied: what comes before a step that shares
        pages."""
        return tuple(
            {
                name: copy_pages(pool, copies[states[name]][:, 0], copies[states[name]][:, 1])
                for name, pool in layer.items()
            }
            for layer, states in zip(pools, self.layout.states, strict=True)
        )

    def compact(self, pools: Pools, compaction: Compaction, slots: Slots | None = None) -> tuple[Pools, Kept]:
        """The pools after a compaction, which is dispatched and not waited for, and which slots stayed. Rows and pages
        are padded to powers of two, so that few shapes are compiled. `slots` are where a second pass left the
        statistics of the only sequence. Raises ValueError for a memory that needs such a pass, without."""
        if listener := Listener(self.layout):
            if slots is None:
                raise ValueError(f"compression = {listener.name}: its second pass was not run (Listener.plan)")
            compaction = heard(compaction, slots)
        return self.compact_padded(pools, padded(compaction, self.layout))

    def compact_padded(self, pools: Pools, compaction: Compaction) -> tuple[Pools, Kept]:
        """The compaction itself."""
        return self.compact_program(pools, compaction)

    @program(donate_argnums=0)
    def compact_program(self, pools: Pools, compaction: Compaction) -> tuple[Pools, Kept]:
        """All layers' in one program."""
        return compact(self.layout, pools, compaction)

    def seal(self, pools: Pools, seals: Seals) -> Pools:
        """The pools with full pages sealed, dispatched and not waited for; pages are padded to powers of two."""
        return self.seal_padded(pools, self._padded_seals(seals))

    def _padded_seals(self, seals: Seals) -> Seals:
        classes = zip(self.layout.classes, seals.classes, strict=True)
        beyond = {state.name: state.num_pages for state in self.layout.classes}
        return Seals(
            tuple(
                jnp.asarray(padded_pages(mine, (0, beyond[state.sealed_name])) if len(mine) else mine)
                for state, mine in classes
            )
        )

    def seal_padded(self, pools: Pools, seals: Seals) -> Pools:
        """The sealing itself."""
        return self.seal_program(pools, seals)

    @program(donate_argnums=0)
    def seal_program(self, pools: Pools, seals: Seals) -> Pools:
        """All layers' in one program."""
        return seal_layers(self.layout, pools, seals)

    @program()
    def read_back(self, pools: Pools, plan: Plan) -> Given:
        """What a step's tokens are as they are stored, where that is in a format: for verification."""
        return read_back(self.layout, pools, plan)

    def read_sealed(self, pools: Pools, seals: Seals) -> Given:
        """What these pages are once sealed, the padded ones of `seal` behind them: for verification."""
        return self._read_sealed(pools, self._padded_seals(seals))

    @program()
    def _read_sealed(self, pools: Pools, seals: Seals) -> Given:
        return read_sealed(self.layout, pools, seals)

    @program(donate_argnums=0)
    def poison(self, pools: Pools, pages: tuple[Array, ...]) -> Pools:
        """The pools with NaN, or the largest whole number, in these pages [n] of every class: what nobody may read. A
        page out of range is passed over."""
        return tuple(
            {name: poison_pages(pool, pages[states[name]]) for name, pool in layer.items()}
            for layer, states in zip(pools, self.layout.states, strict=True)
        )

    def run(self, params: Params, pools: Pools, plan: Plan, tokens: npt.NDArray[np.int32]) -> tuple[Array, Pools]:
        """One planned step, its copies first."""
        plan, pools = self.copied(pools, plan)
        return self(params, pools, plan, jnp.asarray(tokens))

    def run_observed(
        self, params: Params, pools: Pools, plan: Plan, tokens: npt.NDArray[np.int32]
    ) -> tuple[Array, Pools, IsRead]:
        """The same, and what it read; see `observe`."""
        plan, pools = self.copied(pools, plan)
        return self.observe(params, pools, plan, jnp.asarray(tokens))

    def read_on(self, params: Params, pools: Pools, steps: Sequence[tuple[Plan, npt.NDArray[np.int32]]]) -> Pools:
        """The pools after the planned steps of a second pass (`Listener.plan`)."""
        for plan, tokens in steps:
            plan, pools = self.copied(pools, plan)
            pools = self.listen(params, pools, plan, jnp.asarray(tokens))
        return pools

    def copied(self, pools: Pools, plan: Plan) -> tuple[Plan, Pools]:
        """The plan without its copies, and the pools with them done."""
        if plan.has_copies:
            classes = zip(plan.classes, self.layout.classes, strict=True)
            copies = (padded_pages(planned.copies, (0, state.num_pages)) for planned, state in classes)
            pools = self.copy(pools, tuple(map(jnp.asarray, copies)))
        return plan.without_copies(), pools


LET_GO.append(MemoryStep.of.cache_clear)
