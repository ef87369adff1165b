"""How much of the true attention lies in the pages that a selection would read: a measure that no task takes part in.

The model runs in its parallel form and reads everything; beside it each method says what it would have read. Of the
pages that are full when a query comes, a method chooses as many as it reads of so many pages; the query's own page,
which all of them read, is left out on both sides. The share is that of the attention to full pages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import Array
from jaxtyping import Float

from kvlab.evaluation.layerwise import Blockwise, layers_of
from kvlab.ledger.states import State
from kvlab.models.model import Model
from kvlab.models.transformer import Transformer
from kvlab.schema import ConfigError
from kvlab.selection import Candidates, Selection, choose
from kvlab.typing import HeadOutputs, Params, Positions, Queries, SinkLogits, Tokens
from pallas_kernels.masking import masked_softmax, soft_capped


class Recall(NamedTuple):
    """Of one method, for each layer that can select: the mean over sequences, queries and query heads of the share of
    attention in the pages chosen, of that to all full pages; and the same without the first page, the sinks. Where
    several layers read the same pages, the mean over them."""

    share: np.ndarray
    """[L]"""
    rest: np.ndarray
    """[L]"""


def page_recall(
    structure: nnx.GraphDef[Transformer],
    params: Params,
    tokens: Tokens | npt.NDArray[np.int32],
    methods: Mapping[str, Selection],
    *,
    page_size: int,
    positions: Sequence[int],
) -> dict[str, Recall]:
    """What each method would have found of the attention that the queries at `positions` of the sequences [B, T] pay.
    `dense_layers` is ignored: every layer that can select is told of. Raises ConfigError for positions without a full
    page before them, and for a model of which no layer can select."""
    num_tokens = tokens.shape[1]
    for position in positions:
        if not 2 * page_size <= position < num_tokens:
            legal = f"must be in [{2 * page_size}, {num_tokens - 1}]: two full pages before it, and a token there"
            raise ConfigError("positions", position, legal)
    asked = _Asked(tuple(methods.items()), page_size, tuple(positions))
    skips = asked.methods[0][1].skips

    def watched(layer: int, state: State, whole: Any) -> Any:
        return whole if skips(state) else _Recalling(asked, jnp.asarray(layer, jnp.int32), whole)

    _, after = layers_of(Blockwise(Model(structure, params)), tokens, watched)
    found = [view.shares for layer in after for view in layer.values() if isinstance(view, _Recalling)]
    if not found:
        raise ConfigError("methods", list(methods), "serve no layer of this model")
    shares = jax.device_get(found)
    return {
        name: Recall(*(np.array([_mean(layer, name, part) for layer in shares]) for part in range(2)))
        for name, _ in asked.methods
    }


def _mean(layer: Sequence[Mapping[str, Any]], name: str, part: int) -> float:
    return float(np.mean([read[name][part] for read in layer]))


class _Asked(NamedTuple):
    methods: tuple[tuple[str, Selection], ...]
    page_size: int
    positions: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Recalling:
    """A complete sequence that is attended to as ever, and what methods would have read of it."""

    asked: _Asked = field(metadata={"static": True})
    layer: Any  # [], traced: layers that are alike share a program
    whole: Any
    shares: tuple[Any, ...] = ()

    def append(self, **tokens: Array) -> Self:
        return replace(self, whole=self.whole.append(**tokens))

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        outputs, whole = self.whole.attend(queries, positions, sink_logits=sink_logits)
        places, size = np.array(self.asked.positions), self.asked.page_size
        keys = whole.pool["keys"].astype(jnp.float32)
        batch, num_tokens, num_kv_heads, dim = keys.shape
        keys = jnp.pad(keys, ((0, 0), (0, -num_tokens % size), (0, 0), (0, 0)))
        scaled = queries[:, places].astype(jnp.float32) * whole.state.scale(dim)
        grouped = scaled.reshape(batch, len(places), num_kv_heads, -1, dim)
        scores = jnp.einsum("btkgd,bskd->btkgs", grouped, keys)
        scores = soft_capped(scores, whole.state.soft_cap)
        seen = jnp.asarray(np.arange(keys.shape[1])[None, :] <= places[:, None])[None, :, None, None]
        weights, _ = masked_softmax(scores, jnp.broadcast_to(seen, (1, *seen.shape[1:3], *scores.shape[3:])))
        mass = weights.reshape(*weights.shape[:4], -1, size).sum(axis=-1)
        pages = keys.reshape(batch, -1, size, num_kv_heads, dim).swapaxes(2, 3)
        shares = {
            name: self._shares(method, grouped, positions[:, places], pages, mass)
            for name, method in self.asked.methods
        }
        return outputs, replace(self, whole=whole, shares=(*self.shares, shares))

    def _shares(
        self,
        method: Selection,
        queries: Float[Array, "B T K G D"],
        positions: Positions,
        pages: Float[Array, "B N K S D"],
        mass: Float[Array, "B T K G N"],
    ) -> tuple[Array, Array]:
        """`Recall` of one method in this layer."""
        size, num_tokens = self.asked.page_size, self.whole.pool["keys"].shape[1]
        batch, num_pages = pages.shape[:2]
        used = jnp.arange(num_pages * size).reshape(num_pages, size) < num_tokens
        used = jnp.broadcast_to(used[None], (batch, num_pages, size))
        dtype = self.whole.pool["keys"].dtype
        has_index = method.arrays(pages.shape[2], pages.shape[4], dtype.name)
        index = method.note(pages, used, dtype) if has_index else {}
        index = {name: array.astype(jnp.float32) for name, array in index.items()}
        numbers = jnp.broadcast_to(jnp.arange(num_pages, dtype=jnp.int32)[None, :], (batch, num_pages))
        layer = self.layer + len(self.shares)  # as `SelectedTokens` counts layers that read the same pages
        scores = method.score(Candidates(queries, positions, index, numbers, layer, lambda: mass))
        num_full, reading = positions // size, method.reading(size)
        counts = jnp.asarray(np.array([reading.num_read(count) for count in range(num_pages + 1)], np.int32))[num_full]
        chosen = choose(scores, numbers, num_full - 1, counts, first=reading.first, last=reading.last - 1)
        is_full = (numbers[:, None] < num_full[:, :, None])[:, :, None, None]
        rest = is_full & (numbers > 0)[:, None, None, None]
        taken = chosen.is_read[:, :, :, None]

        def share(of: Array) -> Array:
            return (jnp.where(of & taken, mass, 0).sum(axis=-1) / jnp.where(of, mass, 0).sum(axis=-1)).mean()

        return share(is_full), share(rest)
