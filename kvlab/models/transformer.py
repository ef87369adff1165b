"""A stack of pre-norm blocks from a layer pattern over named mixers: "A", "M A", "W W W A"."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvlab.ledger.states import State
from kvlab.memory.views import LayerStates, whole
from kvlab.mixers import MIXERS, LayerMemory, Mixer
from kvlab.mixers.convolution import ShortConv
from kvlab.mixers.layers import Linear, RMSNorm
from kvlab.models.altup import AltUpBlock, Residual, StreamEnds, Streams
from kvlab.models.config import LayerConfig, ModelConfig
from kvlab.models.experts import Experts
from kvlab.models.laurel import Laurel
from kvlab.models.mlp import GatedMLP
from kvlab.models.sharing import lent, read_by_all, sources_of, take_back
from kvlab.schema import nearest
from kvlab.typing import Hidden, LabelLogits, LabelPositions, Logits, Params, Positions, Tokens
from kvlab.units import counted


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where there is an MLP; a short convolution may stand before the mixer,
    which then reads h + conv(h) in place of h = norm(x). `MixerConfig.norms` says whether a norm stands before mixer
    and MLP, after them, or both; behind the mixer there may be a Laurel."""

    def __init__(self, layer: LayerConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        self.is_before, self.is_after = layer.config.norms != "after", layer.config.norms != "before"
        self.residual_scale = model.residual_scale
        if self.is_before:
            self.mixer_norm = RMSNorm(model.model_dim, eps=model.norm_eps)
        if self.is_after:
            self.mixer_norm_after = RMSNorm(model.model_dim, eps=model.norm_eps)
        build: Any = MIXERS[layer.mixer]  # each mixer takes its own config type
        self.has_laurel = model.laurel_rank > 0
        if self.has_laurel:
            self.laurel = Laurel(model, rngs=rngs)
        self.mixer: Mixer = build(layer.config, model.model_dim, dtype=model.dtype, rngs=rngs)
        self.has_conv = layer.config.short_conv > 0
        if self.has_conv:
            width = layer.config.short_conv
            self.short_conv = ShortConv(model.model_dim, width, dtype=model.dtype, rngs=rngs)
        self.has_mlp = layer.mlp is not None or layer.width_of_mlp(model) > 0
        if self.has_mlp:
            if self.is_before:
                self.mlp_norm = RMSNorm(model.model_dim, eps=model.norm_eps)
            if self.is_after:
                self.mlp_norm_after = RMSNorm(model.model_dim, eps=model.norm_eps)
            self.mlp = _mlp_of(layer, model, rngs)

    def states(self) -> dict[str, State]:
        """The named states of the layer: the mixer's, and the short convolution's history."""
        return self.mixer.states() | ({"short_conv": self.short_conv.state()} if self.has_conv else {})

    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        h, conv_memory = self.mixer_norm(x) if self.is_before else x, {}
        if self.has_conv:
            mixed, history = self.short_conv(h, memory["short_conv"])
            h, conv_memory = h + mixed, {"short_conv": history}
        y, after = self.mixer(h, positions, memory)
        x = self._sum(x, self.mixer_norm_after(y) if self.is_after else y)
        if self.has_laurel:
            x = self.laurel(x, h)
        if self.has_mlp:
            y = self.mlp(self.mlp_norm(x) if self.is_before else x)
            x = self._sum(x, self.mlp_norm_after(y) if self.is_after else y)
        return x, {**after, **conv_memory}

    def _sum(self, x: Hidden, y: Hidden) -> Hidden:
        return x + y if self.residual_scale == 1 else x + y * self.residual_scale


def _mlp_of(layer: LayerConfig, model: ModelConfig, rngs: nnx.Rngs) -> GatedMLP | Experts:
    """What stands behind the layer's mixer."""
    if layer.mlp is not None:
        return Experts(layer.mlp, model.model_dim, dtype=model.dtype, rngs=rngs)
    of_model = {"activation": model.activation, "bias": model.mlp_bias, "dtype": model.dtype}
    return GatedMLP(model.model_dim, layer.width_of_mlp(model), **of_model, sparsity=layer.mlp_sparsity, rngs=rngs)


class Transformer(nnx.Module):
    """Embedding, blocks, final norm, head (the embedding itself when tied). Parameters float32, compute `model.dtype`.
    With `model.num_streams` the blocks pass on several streams (`kvlab.models.altup`). Raises ConfigError for a layer
    that is to share keys and values, and finds none that fit."""

    def __init__(self, layers: Sequence[LayerConfig], model: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(model.dtype)
        init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(vocab_size, model.model_dim, dtype=dtype, embedding_init=init, rngs=rngs)
        self.sources = sources_of([layer.config for layer in layers])
        self.has_streams = model.num_streams > 0
        blocks = [Block(layer, model, rngs=rngs) for layer in layers]
        self.blocks = nnx.List([AltUpBlock(each, model, rngs=rngs) for each in blocks] if self.has_streams else blocks)
        if self.has_streams:
            self.streams = StreamEnds(model, len(layers), vocab_size, rngs=rngs)
        self.norm = RMSNorm(model.model_dim, eps=model.norm_eps)
        if not model.tie_embeddings:
            self.head = Linear(model.model_dim, vocab_size, use_bias=False, dtype=dtype, rngs=rngs)
        self.config = model

    def states(self) -> tuple[LayerStates, ...]:
        """The named states of every layer; none where it reads another's alone."""
        return read_by_all([block.states() for block in self.blocks], self.sources)

    def embedded(self, tokens: Tokens) -> Residual:
        """What the first layer reads, [B, T, E] or the streams."""
        x = self.embedding(tokens)
        x = x if self.config.embed_scale == 1 else x * self.config.embed_scale
        return self.streams.opened(x, tokens) if self.has_streams else x

    def normed(self, x: Residual) -> Hidden:
        """Final hidden states [B, T, E] of what the last layer gives."""
        return self.norm(self.streams.closed(x) if isinstance(x, Streams) else x)

    def hidden(
        self, tokens: Tokens, positions: Positions, memory: Sequence[LayerMemory]
    ) -> tuple[Hidden, tuple[LayerMemory, ...]]:
        """Final hidden states [B, T, E]; memory as in `Mixer.__call__`, one entry a layer."""
        x: Any = self.embedded(tokens)  # what its blocks take: one stream, or several
        after = list[LayerMemory]()
        for block, layer_memory, source in zip(self.blocks, memory, self.sources, strict=True):
            x, mine = block(x, positions, lent(layer_memory, source, after))
            after.append(take_back(mine, source, after))
        return self.normed(x), tuple(after)

    def parallel(self, tokens: Tokens, states: Sequence[LayerStates] | None = None) -> Hidden:
        """Final hidden states [B, T, E] of complete sequences, which start at 0: training and scoring. Nothing is
        remembered.

        `states` are the layers' states in another format than the model's: what is attended to is rounded to it.
        """
        return self.in_parallel(tokens, states)[0]

    def in_parallel(
        self, tokens: Tokens, states: Sequence[LayerStates] | None = None, *, progress: Array | None = None
    ) -> tuple[Hidden, tuple[LayerMemory, ...]]:
        """As `parallel`, and the views afterwards. In training `progress` is the share of its steps that is done."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
        return self.hidden(tokens, positions, whole(states or self.states(), *tokens.shape, progress=progress))

    def logits(self, hidden: Hidden) -> Logits:
        """Next-token logits [B, T, V] in float32."""
        outputs = self.embedding.attend(hidden) if self.config.tie_embeddings else self.head(hidden)
        logits = outputs.astype(jnp.float32)
        if self.config.logit_divisor != 1:
            logits = logits / self.config.logit_divisor
        if (cap := self.config.logit_cap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits

    def __str__(self) -> str:
        return describe(self)


def parse_pattern(pattern: str, names: Sequence[str], num_layers: int | None) -> list[str]:
    """The mixer name of every layer. Raises ValueError for unknown names and for lengths that do not tile."""
    layers = pattern.split()
    if not layers:
        raise ValueError("names no layer; legal: mixer names separated by spaces, such as 'M M A'")
    for name in layers:
        if name not in names:
            raise ValueError(f"names an unknown layer {name!r}; {nearest(name, names)}")
    if num_layers is None:
        return layers
    if num_layers % len(layers):
        raise ValueError(f"has {counted(len(layers), 'layer')}, which must divide model.num_layers = {num_layers}")
    return layers * (num_layers // len(layers))


def split(model: Transformer) -> tuple[nnx.GraphDef[Transformer], Params]:
    """A model as its static structure and a plain nested dict of arrays."""
    structure, state = nnx.split(model)
    return structure, nnx.to_pure_dict(state)


def merge(structure: nnx.GraphDef[Transformer], params: Params) -> Transformer:
    """The inverse of `split`; cheap, and meant to be called inside jit."""
    return nnx.merge(structure, params)


def describe(model: Transformer) -> str:
    """A table of the model: every parameter with shape and bytes, every layer's state with its bytes."""
    _, params = split(model)
    rows, total = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        size: int = leaf.size * leaf.dtype.itemsize
        total += size
        shape = "x".join(str(n) for n in leaf.shape)
        rows.append(f"  {path_name(path):<44} {shape:>12} {leaf.dtype.name:>9} {size:>12,} B")
    rows.append(f"  {'parameters':<44} {'':>12} {'':>9} {total:>12,} B")
    for index, states in enumerate(model.states()):
        for name, spec in states.items():
            unit = "B/token" if spec.per_token else "B/sequence"
            rows.append(f"  blocks.{index} state {name:<28} {'':>12} {'':>9} {spec.unit_bytes:>12,} {unit}")
    return "\n".join(["Transformer", *rows])


def path_name(path: Sequence[Any]) -> str:
    """A pytree path as dotted words: blocks.0.mixer.key.kernel."""
    return ".".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)


def logits_at(model: Transformer, hidden: Hidden, positions: LabelPositions) -> LabelLogits:
    """Logits only at the given token indices [B, M]: the head is the costliest product of a small model."""
    return model.logits(jnp.take_along_axis(hidden, positions[:, :, None], axis=1))
