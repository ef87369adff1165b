"""How much attention goes to the first token (attention sinks, arXiv 2309.17453): why a window without it fails."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from kvlab.evaluation.layerwise import Blockwise, layers_of
from kvlab.ledger.states import State, TokenState
from kvlab.memory.views.dense import weights_beside_sinks
from kvlab.schema import ConfigError
from kvlab.typing import HeadOutputs, Positions, Queries, SinkLogits, Tokens
from pallas_kernels.masking import soft_capped


def sink_shares(model: Blockwise, tokens: Tokens | npt.NDArray[np.int32], first: int = 64) -> npt.NDArray[np.float64]:
    """[L, H] of every layer that reads keys and values, those that share them behind their source: the share of its
    attention that a query head pays to token 0, mean over sequences [B, T] and over the queries from position `first`
    on. Raises ConfigError for a `first` outside [1, T - 1], and for a model without such a layer."""
    if not 1 <= first < tokens.shape[1]:
        raise ConfigError("first", first, f"must be in [1, {tokens.shape[1] - 1}], behind token 0 and in the sequence")

    def watched(layer: int, state: State, whole: Any) -> Any:
        return _Watched(whole, first) if isinstance(state, TokenState) else whole

    _, after = layers_of(model, tokens, watched)
    watching = [view for layer in after for view in layer.values() if isinstance(view, _Watched)]
    found = [share for view in watching for share in view.shares]
    if not found:
        raise ConfigError("model", "", "must have a layer that holds keys and values")
    return np.stack([np.asarray(share, np.float64) for share in found])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Watched:
    """A complete sequence that is attended to as ever, and what of it went to token 0, by layer that reads it."""

    whole: Any
    first: int = field(metadata={"static": True})
    shares: tuple[Any, ...] = ()

    def append(self, **tokens: Array) -> Self:
        return replace(self, whole=self.whole.append(**tokens))

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        outputs, whole = self.whole.attend(queries, positions, sink_logits=sink_logits)
        keys = whole.pool["keys"].astype(jnp.float32)
        num_kv_heads, dim = keys.shape[2:]
        asked = queries[:, self.first :].astype(jnp.float32) * whole.state.scale(dim)
        grouped = asked.reshape(*asked.shape[:2], num_kv_heads, -1, dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", grouped, keys)
        scores = soft_capped(scores, whole.state.soft_cap)
        places = jnp.arange(keys.shape[1], dtype=jnp.int32)
        seen = whole.state.visible.sees(places[self.first :, None], places[None, :])
        weights = weights_beside_sinks(scores, seen, sink_logits)
        share = weights[..., 0].mean(axis=(0, 3)).reshape(-1)
        return outputs, replace(self, whole=whole, shares=(*self.shares, share))
