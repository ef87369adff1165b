"""A model that runs layer by layer: blocks that are alike share a program, so that a deep model costs the compilation
of a shallow one. For evaluation of published weights; what is computed is the same to rounding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import Array

from kvlab.engine.step import IsRead, MemoryStep, Pools
from kvlab.evaluation.mask_check import Implied, MaskCheck, masked_hidden, sealings_of
from kvlab.ledger.plan import Compaction, Plan, Seals
from kvlab.ledger.states import State
from kvlab.memory.compacting import Kept, compact, seal_layers
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.views import LayerStates, view_of
from kvlab.mixers import LayerMemory
from kvlab.models.altup import AltUpBlock, Residual
from kvlab.models.model import Model
from kvlab.models.sharing import lent, take_back
from kvlab.models.transformer import Block, Transformer
from kvlab.programs import Programs, make_room, program
from kvlab.typing import Hidden, Logits, Params, Positions, Tokens

type AnyBlock = Block | AltUpBlock
type Wrap = Callable[[int, State, Any], Any]
"""(layer, state, its view of complete sequences) -> the view that takes its place."""

LOGITS_AT_ONCE = 256
"""Positions whose logits are held together."""


class Blockwise:
    """A `Transformer` whose blocks are programs of their own."""

    def __init__(self, model: Model):
        built = model.merge()
        self.structure, self.params = model.structure, model.params
        self.blocks = [nnx.split(block) for block in built.blocks]
        self.rest, self._states, self._sources = nnx.split(_Ends(built)), built.states(), built.sources
        make_room()
        self.programs = _Programs.shared()

    def states(self) -> tuple[LayerStates, ...]:
        """The named states of every layer."""
        return self._states

    def hidden(
        self, tokens: Tokens, positions: Positions, memory: Sequence[LayerMemory]
    ) -> tuple[Hidden, tuple[LayerMemory, ...]]:
        """As `Transformer.hidden`. Not traced: it dispatches."""
        x, after = self.programs.embedded(*self.rest, tokens), list[LayerMemory]()
        for (structure, params), layer, source in zip(self.blocks, memory, self._sources, strict=True):
            x, behind = self.programs.block(structure, params, x, positions, lent(layer, source, after))
            after.append(take_back(behind, source, after))
        return self.programs.normed(*self.rest, x), tuple(after)

    def logits(self, hidden: Hidden) -> Logits:
        """As `Transformer.logits`."""
        return self.programs.logits(*self.rest, hidden)


class _Ends(nnx.Module):
    """What of a model is no block."""

    def __init__(self, model: Transformer):
        self.model = _without_blocks(model)


def _without_blocks(model: Transformer) -> Transformer:
    structure, state = nnx.split(model)
    copy = nnx.merge(structure, state)
    copy.blocks = nnx.List([])
    return copy


class _Programs(Programs):
    """What models are compiled to. Blocks that are alike share theirs, whichever models they are of."""

    @program(static_argnums=0)
    def block(
        self, structure: nnx.GraphDef[AnyBlock], params: Any, x: Residual, positions: Positions, memory: LayerMemory
    ) -> tuple[Residual, LayerMemory]:
        block: Any = nnx.merge(structure, params)  # takes what the one before it gives
        return block(x, positions, memory)

    @program(static_argnums=0)
    def embedded(self, structure: nnx.GraphDef[_Ends], params: Any, tokens: Tokens) -> Residual:
        return nnx.merge(structure, params).model.embedded(tokens)

    @program(static_argnums=0)
    def normed(self, structure: nnx.GraphDef[_Ends], params: Any, x: Residual) -> Hidden:
        return nnx.merge(structure, params).model.normed(x)

    @program(static_argnums=0)
    def logits(self, structure: nnx.GraphDef[_Ends], params: Any, hidden: Hidden) -> Logits:
        return nnx.merge(structure, params).model.logits(hidden)

    @program(static_argnums=0)
    def nats(self, structure: nnx.GraphDef[_Ends], params: Any, hidden: Hidden, labels: Array) -> Array:
        logits = nnx.merge(structure, params).model.logits(hidden)
        told = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - told


def layers_of(
    model: Blockwise, tokens: Tokens | npt.NDArray[np.int32], wrap: Wrap
) -> tuple[Hidden, tuple[LayerMemory, ...]]:
    """Final hidden states [B, T, E] of complete sequences [B, T], and every layer's views behind them."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    starts, counts = jnp.zeros(len(tokens), jnp.int32), jnp.full(len(tokens), tokens.shape[1], jnp.int32)
    memory = [
        {
            name: wrap(layer, state, view_of(state, "whole").of(state, {}, None, starts, counts))
            for name, state in states.items()
        }
        for layer, states in enumerate(model.states())
    ]
    return model.hidden(tokens, positions, memory)


def nats(model: Blockwise, hidden: Hidden, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Negative log-likelihoods [B, M] of the labels of the last M positions of final hidden states [B, T, E]."""
    num_scored = labels.shape[1]
    scored, found = hidden[:, -num_scored:], []
    for start in range(0, num_scored, LOGITS_AT_ONCE):
        part = slice(start, start + LOGITS_AT_ONCE)
        found.append(
            np.asarray(model.programs.nats(*model.rest, scored[:, part], jnp.asarray(labels[:, part])), np.float64)
        )
    return np.concatenate(found, axis=1)


@dataclass(frozen=True, eq=False)
class LayerwiseStep(MemoryStep):
    """A step of `model` through the same pools, of which it takes the weights: `params` are passed over. Pools are not
    donated: a layer's are held twice while it runs."""

    model: Blockwise

    def run(self, params: Params, pools: Pools, plan: Plan, tokens: npt.NDArray[np.int32]) -> tuple[Logits, Pools]:
        plan, pools = self.copied(pools, plan)
        hidden, views = self._run(pools, plan, jnp.asarray(tokens))
        return self.model.logits(hidden), self.layout.pools(views)

    def run_observed(
        self, params: Params, pools: Pools, plan: Plan, tokens: npt.NDArray[np.int32]
    ) -> tuple[Logits, Pools, IsRead]:
        plan, pools = self.copied(pools, plan)
        hidden, views = self._run(pools, plan, jnp.asarray(tokens))
        return self.model.logits(hidden), self.layout.pools(views), self.layout.read_by(views)

    def read_on(self, params: Params, pools: Pools, steps: Sequence[tuple[Plan, npt.NDArray[np.int32]]]) -> Pools:
        for step_plan, tokens in steps:
            plan, pools = self.copied(pools, step_plan)
            pools = self.layout.pools(self._run(pools, plan, jnp.asarray(tokens), listens=True)[1])
        return pools

    def compact_padded(self, pools: Pools, compaction: Compaction) -> tuple[Pools, Kept]:
        return compact(self.layout, pools, compaction)

    def seal_padded(self, pools: Pools, seals: Seals) -> Pools:
        return seal_layers(self.layout, pools, seals)

    def _run(self, pools: Pools, plan: Plan, tokens: Tokens, *, listens: bool = False) -> tuple[Hidden, Any]:
        positions = jnp.asarray(plan.starts)[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        return self.model.hidden(tokens, positions, self.layout.views(pools, plan, listens=listens))


class LayerwiseCheck(MaskCheck):
    """The check of a lossy memory by a model that runs layer by layer."""

    def __init__(self, model: Blockwise, layout: MemoryLayout):
        super().__init__(model.structure, model.params, layout)
        self.model = model

    def hidden_of(self, tokens: Tokens, implied: Implied) -> tuple[Hidden, Array]:
        return masked_hidden(self.model, self.layout.stored, tokens, implied, sealings_of(self.layout))

    def logits_of(self, hidden: Array) -> Array:
        return self.model.logits(hidden[:, None])[:, 0]
