"""Which tensors of a file make each parameter, and how: tables of names and transforms, read in both directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlab.mixers.attention import AttentionConfig
from kvlab.mixers.latent import LatentConfig
from kvlab.models.transformer import LayerConfig, ModelConfig

type Tensor = npt.NDArray[Any]


@dataclass(frozen=True)
class Transform:
    """A parameter from tensors of a file, and the tensors from it. `unload` makes views, never copies."""

    load: Callable[[Sequence[Tensor]], Tensor]
    unload: Callable[[Tensor], list[Tensor]]


AS_IS = Transform(lambda parts: parts[0], lambda whole: [whole])
TRANSPOSED = Transform(lambda parts: parts[0].T, lambda whole: [whole.T])
"""A linear layer: [out, in] in the file, [in, out] here."""
SIDE_BY_SIDE = Transform(
    lambda parts: np.concatenate([part.T for part in parts], axis=1),
    lambda whole: [half.T for half in np.split(whole, 2, axis=1)],
)
"""Two linear layers as one product."""
CONVOLUTION = Transform(lambda parts: parts[0][:, 0, ::-1].T, lambda whole: [whole.T[:, None, ::-1]])
"""[channels, 1, width] with the oldest input first in the file, [width, channels] with the newest first here."""


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the file's tensors it is made of."""

    names: tuple[str, ...]
    transform: Transform = AS_IS
    order: tuple[int, ...] | None = None
    """Rows of each tensor of the file, as they come here; None: as they are."""

    def load(self, parts: Sequence[Tensor]) -> Tensor:
        """The parameter."""
        ordered = parts if self.order is None else [part[np.asarray(self.order)] for part in parts]
        return self.transform.load(ordered)

    def unload(self, whole: Tensor) -> list[Tensor]:
        """The file's tensors; copies where rows are in another order there."""
        parts = self.transform.unload(whole)
        return parts if self.order is None else [part[np.argsort(self.order)] for part in parts]

    def shapes(self, ours: Sequence[int]) -> list[tuple[int, ...]]:
        """The file's shapes for a parameter of that shape; nothing of that size is allocated."""
        return [part.shape for part in self.transform.unload(np.broadcast_to(np.float32(0), tuple(ours)))]


type Table = dict[str, Entry]
"""By the dotted path of the parameter."""


def _linear(table: Table, ours: str, theirs: str, *, bias: bool = False, order: tuple[int, ...] | None = None) -> None:
    table[f"{ours}.kernel"] = Entry((f"{theirs}.weight",), TRANSPOSED, order)
    if bias:
        table[f"{ours}.bias"] = Entry((f"{theirs}.bias",))


def _attention(table: Table, ours: str, theirs: str, config: AttentionConfig) -> None:
    for mine, yours in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        _linear(table, f"{ours}.{mine}", f"{theirs}.{yours}_proj", bias=config.bias)
    if config.qk_norm:
        table[f"{ours}.query_norm.scale"] = Entry((f"{theirs}.q_norm.weight",))
        table[f"{ours}.key_norm.scale"] = Entry((f"{theirs}.k_norm.weight",))


def _latent(table: Table, ours: str, theirs: str, config: LatentConfig) -> None:
    """The file turns neighbours, here numbers half of `rope_dim` apart are turned: rows of what is turned are put so,
    of each head's queries and of the shared key behind the compressed row."""
    if config.query_rank:
        _linear(table, f"{ours}.compress", f"{theirs}.q_a_proj")
        table[f"{ours}.query_norm.scale"] = Entry((f"{theirs}.q_a_layernorm.weight",))
    order = _apart(config.num_heads, config.head_dim, config.rope_dim)
    _linear(table, f"{ours}.query", f"{theirs}.q_b_proj" if config.query_rank else f"{theirs}.q_proj", order=order)
    _linear(table, f"{ours}.row", f"{theirs}.kv_a_proj_with_mqa", order=_apart(1, config.rank, config.rope_dim))
    table[f"{ours}.row_norm.scale"] = Entry((f"{theirs}.kv_a_layernorm.weight",))
    _linear(table, f"{ours}.expand", f"{theirs}.kv_b_proj")
    _linear(table, f"{ours}.out", f"{theirs}.o_proj")


def _apart(num_heads: int, num_plain: int, num_turned: int) -> tuple[int, ...]:
    """Rows of heads of `num_plain` numbers and `num_turned` behind them, of which the second of each two neighbours
    comes behind the first ones."""
    end = num_plain + num_turned
    head = [*range(num_plain), *range(num_plain, end, 2), *range(num_plain + 1, end, 2)]
    return tuple(number * end + row for number in range(num_heads) for row in head)


def _decoder(layers: Sequence[LayerConfig]) -> Table:
    table: Table = {
        "embedding.embedding": Entry(("model.embed_tokens.weight",)),
        "norm.scale": Entry(("model.norm.weight",)),
    }
    for index, layer in enumerate(layers):
        config: Any = layer.config
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        table[f"{ours}.mixer_norm.scale"] = Entry((f"{theirs}.input_layernorm.weight",))
        table[f"{ours}.mlp_norm.scale"] = Entry((f"{theirs}.post_attention_layernorm.weight",))
        if isinstance(config, LatentConfig):
            _latent(table, f"{ours}.mixer", f"{theirs}.self_attn", config)
        else:
            _attention(table, f"{ours}.mixer", f"{theirs}.self_attn", config)
        both = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
        table[f"{ours}.mlp.gate_up.kernel"] = Entry(both, SIDE_BY_SIDE)
        _linear(table, f"{ours}.mlp.down", f"{theirs}.mlp.down_proj")
    return table


def _mamba2(layers: Sequence[LayerConfig]) -> Table:
    table: Table = {
        "embedding.embedding": Entry(("backbone.embeddings.weight",)),
        "norm.scale": Entry(("backbone.norm_f.weight",)),
    }
    for index in range(len(layers)):
        ours, theirs = f"blocks.{index}.mixer", f"backbone.layers.{index}.mixer"
        table[f"blocks.{index}.mixer_norm.scale"] = Entry((f"backbone.layers.{index}.norm.weight",))
        _linear(table, f"{ours}.split", f"{theirs}.in_proj")
        _linear(table, f"{ours}.out", f"{theirs}.out_proj")
        table[f"{ours}.conv.kernel"] = Entry((f"{theirs}.conv1d.weight",), CONVOLUTION)
        table[f"{ours}.conv.bias"] = Entry((f"{theirs}.conv1d.bias",))
        for mine, yours in (
            ("dt_bias", "dt_bias"),
            ("log_rate", "A_log"),
            ("skip", "D"),
            ("norm.scale", "norm.weight"),
        ):
            table[f"{ours}.{mine}"] = Entry((f"{theirs}.{yours}",))
    return table


def table_of(family: str, layers: Sequence[LayerConfig], model: ModelConfig) -> Table:
    """Every parameter of a family's model; the head is absent where it is the embedding."""
    table = (_mamba2 if family == "mamba2" else _decoder)(layers)
    if not model.tie_embeddings:
        _linear(table, "head", "lm_head")
    return table
