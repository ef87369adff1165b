"""Which heads need everything: each KV head alone is given sinks and a window, and what the model loses is measured. A
ranking without training for DuoAttention (arXiv 2410.10819)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvlab.evaluation.mask_check import Implied, masked_hidden
from kvlab.evaluation.score import Scorer
from kvlab.evaluation.trail import NEVER
from kvlab.files import write_atomic
from kvlab.ledger.states import TokenState
from kvlab.models.transformer import Transformer, logits_at, merge
from kvlab.tasks import Batch
from kvlab.training.step import score
from kvlab.typing import Params


@dataclass(frozen=True)
class HeadLoss:
    """What is lost when a KV head alone streams: of the task's metric, and in nats a label. `layer` counts the layers
    of full attention."""

    layer: int
    head: int
    lost: float
    nats: float


def rank_heads(
    scorer: Scorer, params: Params, *, window: int, sinks: int = 4, split: str = "validation"
) -> tuple[HeadLoss, ...]:
    """Every KV head of every layer of full attention, from the one that loses least when it sees `sinks` tokens and the
    last `window`, its own among them, to the one that loses most. One evaluation in the parallel form for each head;
    nothing is trained. Raises ValueError for a model without such a layer."""
    states = merge(scorer.structure, params).states()
    places = [
        (layer, name, state)
        for layer, mine in enumerate(states)
        for name, state in mine.items()
        if isinstance(state, TokenState) and state.span is None
    ]
    if not places:
        raise ValueError("no layer of this model is full attention: there are no heads to rank")
    most = max(state.num_kv_heads for _, _, state in places)

    @jax.jit
    def forward(params: Params, batch: Batch, streams: Array) -> tuple[Array, Array]:
        return _streaming_nll(scorer.structure, params, batch, streams, places, (window, sinks))

    def measure(streams: Array) -> tuple[float, float]:
        slices = scorer.parallel(params, split, forward=lambda params, batch: forward(params, batch, streams))
        nats = sum(part.nll for part in slices) / sum(part.weight for part in slices)
        return scorer.task.metric.mean(slices), nats

    none = jnp.zeros((len(places), most), bool)
    best, least = measure(none)
    losses = list[HeadLoss]()
    for layer, (_, _, state) in enumerate(places):
        for head in range(state.num_kv_heads):
            value, nats = measure(none.at[layer, head].set(True))
            lost = best - value if scorer.task.metric.higher_is_better else value - best
            losses.append(HeadLoss(layer, head, lost, nats - least))
    return tuple(sorted(losses, key=lambda each: (each.lost, each.nats, each.layer, each.head)))


def _streaming_nll(
    structure: nnx.GraphDef[Transformer],
    params: Params,
    batch: Batch,
    streams: Array,
    places: Sequence[tuple[int, str, TokenState]],
    limits: tuple[int, int],
) -> tuple[Array, Array]:
    """As `weighted_nll`, with the heads streaming that `streams` [layers, K] says."""
    model, tokens, (window, sinks) = merge(structure, params), batch.tokens, limits
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    forgotten = jnp.where(positions < sinks, NEVER, positions + window)
    gone_at = [dict[str, Array]() for _ in model.states()]
    for place, (layer, name, state) in enumerate(places):
        mine = jnp.where(streams[place, : state.num_kv_heads, None], forgotten, NEVER)
        gone_at[layer][name] = jnp.broadcast_to(mine, (len(tokens), *mine.shape))
    hidden, _ = masked_hidden(model, model.states(), tokens, Implied(tuple(gone_at)))
    return score(logits_at(model, hidden, batch.label_positions), batch.labels, batch.weights)


def write_ranking(path: Path, losses: Sequence[HeadLoss]) -> str:
    """Writes the file that `compression=duo memory.compression.ranking=...` reads; returns its SHA-256."""
    written = json.dumps({"ranking": [asdict(each) for each in losses]}, indent=1) + "\n"
    write_atomic(path, written)
    return hashlib.sha256(written.encode()).hexdigest()
