"""Which keys a model attends to, the short ones or the long ones: the sign that Knorm (arXiv 2406.11430) needs. Large
pretrained models attend to short keys; small models trained here do the opposite."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from kvlab.memory.views import whole
from kvlab.models.transformer import Transformer, merge
from kvlab.programs import Programs, make_room, program
from kvlab.typing import HeadOutputs, Params, Positions, Queries, Tokens
from pallas_kernels.masking import soft_capped


@dataclass(frozen=True)
class KeyLengths:
    """The rank correlation (Spearman's) of a head's key lengths with the attention that they get, averaged over
    sequences: +1 where the longest keys get most. `layer` counts all layers of the model; where several read the same
    keys, it is the one that holds them, and the attention that of all of them."""

    layer: int
    head: int
    correlation: float


def key_lengths(structure: nnx.GraphDef[Transformer], params: Params, tokens: Tokens) -> tuple[KeyLengths, ...]:
    """Every KV head of every layer that attends to everything, from sequences [B, T] of real tokens: how long the keys
    of their first halves are, and how much the queries of their second halves attend to each. Raises ValueError for
    fewer than 8 tokens, and for a model without such a layer."""
    if tokens.shape[1] < 8:
        raise ValueError(f"tokens of shape {tokens.shape}: must be sequences of at least 8 tokens")
    make_room()
    found = _Programs.shared().correlations(structure, params, jnp.asarray(tokens))
    if not found:
        raise ValueError("no layer of this model attends to everything: it has no keys to measure")
    heads = [(layer, np.asarray(array).mean(axis=0)) for layer, array in found.items()]
    return tuple(KeyLengths(layer, head, float(value)) for layer, each in heads for head, value in enumerate(each))


def knorm_keep(found: Sequence[KeyLengths]) -> str:
    """What `compression=knorm memory.compression.keep=...` should be for the model: "short" or "long"."""
    return "long" if sum(each.correlation for each in found) > 0 else "short"


class _Programs(Programs):
    """What measures models, compiled."""

    @program(static_argnums=0)
    def correlations(
        self, structure: nnx.GraphDef[Transformer], params: Params, tokens: Tokens
    ) -> dict[int, Float[Array, "B K"]]:
        model = merge(structure, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
        memory = [
            {
                name: _Watched(view) if view.state.per_token and view.state.span is None else view
                for name, view in mine.items()
            }
            for mine in whole(model.states(), *tokens.shape)
        ]
        _, after = model.hidden(tokens, positions, memory)
        return {
            layer: _correlation(_ranks(view.attention), _ranks(lengths_of(view.keys)))
            for layer, views in enumerate(after)
            for view in views.values()
            if isinstance(view, _Watched)
        }


class _Watched:
    """A view of complete sequences that measures while it is attended to; it exists only while it is traced."""

    def __init__(self, view: Any, keys: Any = None, attention: Any = 0.0):
        self.view, self.keys, self.attention = view, keys, attention

    def append(self, **tokens: Array) -> "_Watched":
        return _Watched(self.view.append(**tokens), tokens["keys"])

    def attend(self, queries: Queries, positions: Positions, **options: Any) -> tuple[HeadOutputs, "_Watched"]:
        outputs, view = self.view.attend(queries, positions, **options)
        return outputs, _Watched(view, self.keys, self.attention + attention_of(self.view.state, queries, self.keys))


def correlation_of(state: Any, queries: Float[Array, "B T H D"], keys: Float[Array, "B T K D"]) -> Float[Array, "B K"]:
    """Of each head: the rank correlation of the lengths of the first half's keys with the mean weight that the second
    half's queries give them."""
    return _correlation(_ranks(attention_of(state, queries, keys)), _ranks(lengths_of(keys)))


def attention_of(state: Any, queries: Float[Array, "B T H D"], keys: Float[Array, "B T K D"]) -> Float[Array, "B K S"]:
    """Of each head: the mean weight that the second half's queries give the first half's keys."""
    queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)
    num_tokens, num_kv_heads, dim = keys.shape[1:]
    half = num_tokens // 2
    asked = queries[:, half:].reshape(len(queries), num_tokens - half, num_kv_heads, -1, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", asked, keys) * state.scale(dim)
    scores = soft_capped(scores, state.soft_cap)
    places = jnp.arange(num_tokens, dtype=jnp.int32)
    seen = (places[None, :] <= places[half:, None])[None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return weights[..., :half].mean(axis=(2, 3))


def lengths_of(keys: Float[Array, "B T K D"]) -> Float[Array, "B K S"]:
    """Of each head: the lengths of the first half's keys."""
    return jnp.linalg.norm(keys[:, : keys.shape[1] // 2].astype(jnp.float32), axis=-1).swapaxes(1, 2)


def _ranks(x: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
    return jnp.argsort(jnp.argsort(x, axis=-1), axis=-1).astype(jnp.float32)


def _correlation(x: Float[Array, "*B N"], y: Float[Array, "*B N"]) -> Float[Array, "*B"]:
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    return (x * y).mean(axis=-1) / jnp.maximum(jnp.sqrt((x * x).mean(axis=-1) * (y * y).mean(axis=-1)), 1e-30)
