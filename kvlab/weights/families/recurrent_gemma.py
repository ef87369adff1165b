"""RecurrentGemma (arXiv 2404.07839): Griffin's layers (arXiv 2402.19427), RG-LRU and attention over a window."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes

from kvlab.mixers.attention import AttentionConfig
from kvlab.mixers.rglru import RGLRUConfig
from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.schema import flag, list_type
from kvlab.weights.config_files import DefaultRope, only, positive, size, value_of
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import (
    Decoder,
    DecoderFile,
    attention_config,
    attention_table,
    attention_values,
    first_config,
)
from kvlab.weights.mixture import mlp_table
from kvlab.weights.tables import CONVOLUTION, Entry, Table, Transform, less_one, linear

BLOCKS: Any = list_type(Literal["recurrent", "attention"], 1)
GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class RecurrentGemmaFile(DecoderFile):
    """Its own fields; absent means transformers' defaults. `block_types` are repeated over the layers, and
    `intermediate_size` is twice the MLP's. `hidden_act` is not read: the activation has another name here."""

    intermediate_size: int = size(7680)
    num_attention_heads: int = size(10)
    lru_width: int | None = size(None)
    attention_window_size: int = size(2048)
    conv1d_width: int = size(4)
    logits_soft_cap: float = positive(30.0)
    tie_word_embeddings: bool = flag(True)
    block_types: tuple[str, ...] = value_of(BLOCKS, ("recurrent", "recurrent", "attention"))
    hidden_act: Any = None
    hidden_activation: str = only(GELU)


class RecurrentGemma(Decoder[RecurrentGemmaFile]):
    """An MLP with biases behind every mixer. Embeddings are scaled by sqrt(E), rounded to bfloat16 whatever the model
    computes in; attention turns half of each head and has a bias at its output."""

    model_type = "recurrent_gemma"
    transformers_class = "RecurrentGemmaForCausalLM"
    File = RecurrentGemmaFile
    default_end = 1
    context_field = None
    rope_fraction = 0.5

    def read(self, file: RecurrentGemmaFile, rope: DefaultRope, dtype: str) -> Architecture:
        read = super().read(file, rope, dtype)
        model = replace(
            read.model,
            mlp_dim=file.intermediate_size // 2,
            mlp_bias=True,
            activation="gelu",
            embed_scale=float(ml_dtypes.bfloat16(file.hidden_size**0.5)),
            logit_cap=file.logits_soft_cap,
        )
        return replace(read, model=model)

    def layers(self, file: RecurrentGemmaFile, rope: DefaultRope) -> list[LayerConfig]:
        window, out_bias = file.attention_window_size, not file.attention_bias
        attention = LayerConfig("attention", attention_config(file, rope, window=window, out_bias=out_bias))
        recurrent = RGLRUConfig(
            width=file.lru_width or file.hidden_size,
            num_heads=file.num_attention_heads,
            conv_len=file.conv1d_width,
            norm_eps=file.rms_norm_eps,
        )
        kinds = itertools.islice(itertools.cycle(file.block_types), file.num_hidden_layers)
        return [attention if kind == "attention" else LayerConfig("rglru", recurrent) for kind in kinds]

    def write(self, architecture: Architecture) -> dict[str, Any]:
        model = architecture.model
        values = {key: value for key, value in super().write(architecture).items() if key != "hidden_act"}
        own = {"intermediate_size": 2 * model.mlp_dim, "hidden_activation": GELU, "logits_soft_cap": model.logit_cap}
        return values | own

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        kinds = ["recurrent" if layer.mixer == "rglru" else "attention" for layer in architecture.layers]
        values: dict[str, Any] = {"block_types": kinds}
        if "recurrent" in kinds:
            recurrent = first_config(architecture, RGLRUConfig)
            values |= {"lru_width": recurrent.width, "conv1d_width": recurrent.conv_len}
            values |= {"num_attention_heads": recurrent.num_heads}
        if "attention" in kinds:
            window = first_config(architecture, AttentionConfig).window
            values |= attention_values(architecture) | {"attention_window_size": window}
        return values

    def table(self, layers: Sequence[LayerConfig], model: ModelConfig) -> Table:
        table: Table = {
            "embedding.embedding": Entry(("model.embed_tokens.weight",)),
            "norm.scale": Entry(("model.final_norm.weight",)),
        }
        for index, layer in enumerate(layers):
            ours, theirs = f"blocks.{index}", f"model.layers.{index}"
            table[f"{ours}.mixer_norm.scale"] = Entry((f"{theirs}.temporal_pre_norm.weight",))
            table[f"{ours}.mlp_norm.scale"] = Entry((f"{theirs}.channel_pre_norm.weight",))
            table |= self.mixer_table(f"{ours}.mixer", f"{theirs}.temporal_block", layer.config)
            table |= mlp_table(f"{ours}.mlp", f"{theirs}.mlp_block", bias=True)
        return less_one(table)

    def mixer_table(self, ours: str, theirs: str, config: Any) -> Table:
        if isinstance(config, AttentionConfig):
            return attention_table(ours, theirs, config)
        return rglru_table(ours, theirs, config)


def rglru_table(ours: str, theirs: str, config: RGLRUConfig) -> Table:
    """The tensors of one recurrent layer. The file has the biases of the gates by block."""
    table: Table = {
        f"{ours}.conv.kernel": Entry((f"{theirs}.conv_1d.weight",), CONVOLUTION),
        f"{ours}.conv.bias": Entry((f"{theirs}.conv_1d.bias",)),
        f"{ours}.lambda_": Entry((f"{theirs}.rg_lru.recurrent_param",)),
    }
    for mine, yours in (("inputs", "linear_x"), ("gate", "linear_y"), ("out", "linear_out")):
        table |= linear(f"{ours}.{mine}", f"{theirs}.{yours}", bias=True)
    by_block = Transform(
        lambda parts: parts[0].reshape(config.width), lambda whole: [whole.reshape(config.num_heads, -1)]
    )
    for mine, yours in (("decay_gate", "recurrent_gate"), ("input_gate", "input_gate")):
        table[f"{ours}.{mine}.kernel"] = Entry((f"{theirs}.rg_lru.{yours}_weight",))
        table[f"{ours}.{mine}.bias"] = Entry((f"{theirs}.rg_lru.{yours}_bias",), by_block)
    return table
