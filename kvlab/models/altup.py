"""Several residual streams, of which each layer computes one and guesses the others (AltUp, arXiv 2301.13310), and an
embedding of the token for every layer: the model around the blocks of Gemma 3n.

A stack without streams knows nothing of this file: `AltUpBlock` wraps a block, `StreamEnds` stands before the first and
behind the last.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from kvlab.ledger.states import State
from kvlab.mixers import LayerMemory
from kvlab.mixers.layers import Linear, RMSNorm
from kvlab.models.config import ModelConfig
from kvlab.models.mlp import activated
from kvlab.typing import Hidden, LayerEmbedding, LayerEmbeddings, Positions, StreamValues, Tokens

LEAST_SQUARE = 1e-5
"""Least mean square that a stream is divided by the root of."""
LEAST_NUMBER = float(jnp.finfo(jnp.float32).tiny)
"""In place of 0, at which a root has no gradient: rows of embeddings may be nothing but zeros."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Streams:
    """What blocks with streams hand on: the streams [A, B, T, E], the tokens' embeddings for each layer [L, B, T, F] or
    None, and which layer is next, []. That is traced, so that layers that are alike are one program."""

    values: Any
    embeddings: Any
    layer: Any


type Residual = Hidden | Streams
"""What blocks hand on: one residual stream, or several."""


class StreamEnds(nnx.Module):
    """Makes the streams of the embedded tokens, and hidden states of the streams.

    The first stream is the embedding, each other a product of it that is made as long: equal root mean squares. At the
    end the streams behind the first are multiplied back, made as long as the first, and all averaged. The embedding for
    a layer is (e sqrt(F) + norm(W x / sqrt(E))) / sqrt(2) of the token's row e of a table and its embedding x; tokens
    behind the table's last row take its first.
    """

    def __init__(self, model: ModelConfig, num_layers: int, vocab_size: int, *, rngs: nnx.Rngs):
        dim, dtype = model.model_dim, jnp.dtype(model.dtype)

        def square() -> Linear:
            return Linear(dim, dim, use_bias=False, dtype=dtype, rngs=rngs)

        self.spread = nnx.List([square() for _ in range(model.num_streams - 1)])
        self.gather = nnx.List([square() for _ in range(model.num_streams - 1)])
        self.num_features, self.num_layers = model.layer_embed_dim, num_layers
        if self.num_features:
            width, self.num_rows = num_layers * self.num_features, model.layer_embed_vocab or vocab_size
            init = nnx.initializers.normal(0.02)
            self.embedding = nnx.Embed(self.num_rows, width, dtype=dtype, embedding_init=init, rngs=rngs)
            self.projection = Linear(dim, width, use_bias=False, dtype=dtype, rngs=rngs)
            self.norm = RMSNorm(self.num_features, eps=model.norm_eps)

    def opened(self, x: Hidden, tokens: Tokens) -> Streams:
        """The streams of tokens [B, T] that are embedded as x [B, T, E]."""
        values = jnp.stack([x, *(_as_long(linear(x), x) for linear in self.spread)])
        embeddings = self.embeddings(x, tokens) if self.num_features else None
        return Streams(values, embeddings, jnp.zeros((), jnp.int32))

    def closed(self, streams: Streams) -> Hidden:
        """Hidden states [B, T, E] behind the last block, before the last norm."""
        first, *others = streams.values
        back = [_as_long(linear(other), first) for linear, other in zip(self.gather, others, strict=True)]
        return jnp.mean(jnp.stack([first, *back]), axis=0)

    def embeddings(self, x: Hidden, tokens: Tokens) -> LayerEmbeddings:
        """The embeddings of the tokens for every layer."""
        rows = self.embedding(jnp.where(tokens < self.num_rows, tokens, 0)) * self.num_features**0.5
        made = self.projection(x) * x.shape[-1] ** -0.5
        by_layer = (*tokens.shape, self.num_layers, self.num_features)
        both = (self.norm(made.reshape(by_layer)) + rows.reshape(by_layer)) * 2**-0.5
        return jnp.moveaxis(both, 2, 0)


class AltUpBlock(nnx.Module):
    """Guesses every stream behind its block from those before it, x_i + sum_j p_ij x_j; runs the block on the guess of
    the active stream; and corrects each guess by (1 + c_i) of what that was wrong by. p comes of the active stream
    before the block, c of the block's result, both through a router of A features, tanh(W norm(x) / E).

    Where layers have embeddings, streams behind the first get norm(W_out (act(W_gate (s y)) * e)) added, of the
    corrected active stream y, a learned scale s [E] and the layer's embedding e [F].
    """

    def __init__(self, block: nnx.Module, model: ModelConfig, *, rngs: nnx.Rngs):
        dim, num_streams = model.model_dim, model.num_streams

        def linear(inputs: int, outputs: int, **more: Any) -> Linear:
            return Linear(inputs, outputs, use_bias=False, dtype=jnp.dtype(model.dtype), rngs=rngs, **more)

        zeros = {"kernel_init": nnx.initializers.zeros_init()}
        self.block: Any = block
        self.router = linear(dim, num_streams)
        self.router_norm = RMSNorm(dim, eps=model.norm_eps)
        self.prediction = linear(num_streams, num_streams**2, **zeros)
        self.correction = linear(num_streams, num_streams, **zeros)
        self.active, self.activation = model.active_stream, model.activation
        self.has_embeddings = model.layer_embed_dim > 0
        if self.has_embeddings:
            self.scale_of_active = nnx.Param(jnp.ones(dim))
            self.gate = linear(dim, model.layer_embed_dim)
            self.out = linear(model.layer_embed_dim, dim)
            self.out_norm = RMSNorm(dim, eps=model.norm_eps)

    def states(self) -> dict[str, State]:
        """The named states of the block."""
        return self.block.states()

    def __call__(self, x: Streams, positions: Positions, memory: LayerMemory) -> tuple[Streams, LayerMemory]:
        guessed = self.predicted(x.values)
        y, after = self.block(guessed[self.active], positions, memory)
        values = self.corrected(guessed, y)
        if self.has_embeddings:
            mine = jax.lax.dynamic_index_in_dim(x.embeddings, x.layer, keepdims=False)
            added = self.embedded(values[self.active], mine)
            values = jnp.concatenate([values[:1], values[1:] + added[None]])
        return replace(x, values=values, layer=x.layer + 1), after

    def predicted(self, values: StreamValues) -> StreamValues:
        """A guess of every stream behind the block, from the streams before it."""
        num_streams = len(values)
        weights = self.prediction(self.routed(values[self.active]))
        weights = weights.reshape(*weights.shape[:2], num_streams, num_streams)
        return values + jnp.einsum("btij,jbte->ibte", weights, values)

    def corrected(self, guessed: StreamValues, y: Hidden) -> StreamValues:
        """The streams behind the block, which made y of the active one's guess."""
        shares = jnp.moveaxis(self.correction(self.routed(y)) + 1, -1, 0)
        return guessed + shares[..., None] * (y - guessed[self.active])[None]

    def routed(self, x: Hidden) -> Float[Array, "B T A"]:
        """The router's features of a stream."""
        features = self.router(self.router_norm(x) * x.shape[-1] ** -1.0)
        return jnp.tanh(features.astype(jnp.float32)).astype(x.dtype)

    def embedded(self, y: Hidden, embedding: LayerEmbedding) -> Hidden:
        """What the layer's embedding adds to the streams behind the first."""
        scaled = (y.astype(jnp.float32) * self.scale_of_active[...][None, None]).astype(y.dtype)
        return self.out_norm(self.out(activated(self.gate(scaled), self.activation) * embedding))


def _as_long(x: Hidden, like: Hidden) -> Hidden:
    """x with the root mean square of another, over the last axis; in float32, returned in the dtype of x."""
    wide, other = x.astype(jnp.float32), like.astype(jnp.float32)
    length = jnp.sqrt(jnp.maximum(jnp.mean(wide * wide, axis=-1, keepdims=True), LEAST_SQUARE))
    wanted = jnp.sqrt(jnp.maximum(jnp.mean(other * other, axis=-1, keepdims=True), LEAST_NUMBER))
    return (wide * (wanted / length)).astype(x.dtype)
