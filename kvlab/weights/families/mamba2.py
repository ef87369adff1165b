"""Mamba-2 (arXiv 2405.21060)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.mixers.mamba2 import Mamba2Config
from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.schema import ConfigError
from kvlab.weights.config_files import ConfigFile, DefaultRope, only, positive, size
from kvlab.weights.families.base import Architecture, Family
from kvlab.weights.tables import CONVOLUTION, Entry, Table, linear


@dataclass(frozen=True, kw_only=True)
class Mamba2File(ConfigFile):
    """Its fields."""

    num_heads: int = size()
    head_dim: int = size()
    expand: int = size(2)
    state_size: int = size(128)
    n_groups: int = size(8)
    conv_kernel: int = size(4)
    chunk_size: int = size(256)
    layer_norm_epsilon: float = positive(1e-5)
    use_bias: bool = only(False)
    use_conv_bias: bool = only(True)
    time_step_limit: tuple[float, float] = only((0.0, math.inf))


class Mamba2(Family[Mamba2File]):
    """State-space layers without MLPs."""

    model_type = "mamba2"
    transformers_class = "Mamba2ForCausalLM"
    File = Mamba2File
    default_end = 2
    context_field = None
    has_rope = False

    def read(self, file: Mamba2File, rope: DefaultRope, dtype: str) -> Architecture:
        width = file.num_heads * file.head_dim
        if width != file.expand * file.hidden_size:
            raise ConfigError("num_heads * head_dim", width, "must be expand * hidden_size")
        config = Mamba2Config(
            state_dim=file.state_size,
            num_heads=file.num_heads,
            head_dim=file.head_dim,
            num_groups=file.n_groups,
            conv_len=file.conv_kernel,
            chunk_len=file.chunk_size,
            norm_eps=file.layer_norm_epsilon,
        )
        model = ModelConfig(
            model_dim=file.hidden_size,
            norm_eps=file.layer_norm_epsilon,
            tie_embeddings=file.tie_word_embeddings,
            dtype=dtype,
        )
        layers = (LayerConfig("mamba2", config),) * file.num_hidden_layers
        return Architecture(self.model_type, layers, model, file.vocab_size)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        first, model = architecture.layers[0].config, architecture.model
        assert isinstance(first, Mamba2Config)
        return {
            "state_size": first.state_dim,
            "num_heads": first.num_heads,
            "head_dim": first.head_dim,
            "n_groups": first.num_groups,
            "conv_kernel": first.conv_len,
            "chunk_size": first.chunk_len,
            "expand": first.num_heads * first.head_dim // model.model_dim,
            "layer_norm_epsilon": model.norm_eps,
        }

    def table(self, layers: Sequence[LayerConfig], model: ModelConfig) -> Table:
        table: Table = {
            "embedding.embedding": Entry(("backbone.embeddings.weight",)),
            "norm.scale": Entry(("backbone.norm_f.weight",)),
        }
        for index in range(len(layers)):
            theirs = f"backbone.layers.{index}"
            table[f"blocks.{index}.mixer_norm.scale"] = Entry((f"{theirs}.norm.weight",))
            table |= mamba2_table(f"blocks.{index}.mixer", f"{theirs}.mixer")
        return table


def mamba2_table(ours: str, theirs: str) -> Table:
    """The tensors of one layer."""
    table = linear(f"{ours}.split", f"{theirs}.in_proj") | linear(f"{ours}.out", f"{theirs}.out_proj")
    table[f"{ours}.conv.kernel"] = Entry((f"{theirs}.conv1d.weight",), CONVOLUTION)
    table[f"{ours}.conv.bias"] = Entry((f"{theirs}.conv1d.bias",))
    for mine, yours in (("dt_bias", "dt_bias"), ("log_rate", "A_log"), ("skip", "D"), ("norm.scale", "norm.weight")):
        table[f"{ours}.{mine}"] = Entry((f"{theirs}.{yours}",))
    return table
