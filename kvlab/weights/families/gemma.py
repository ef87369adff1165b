"""Gemma (arXiv 2403.08295): wide heads, embeddings times sqrt(E), norms stored less one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.schema import flag
from kvlab.weights.config_files import DefaultRope, only, size, value_of
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import Decoder, DecoderFile
from kvlab.weights.tables import Table, less_one

GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class GemmaFile(DecoderFile):
    """Its own fields; absent means transformers' defaults. The published files say "gelu" and mean its tanh form;
    `hidden_activation`, which some have beside it, is not read."""

    num_attention_heads: int = size(16)
    num_key_value_heads: int | None = size(16)
    head_dim: int | None = size(256)
    tie_word_embeddings: bool = flag(True)
    hidden_act: str = value_of(Literal["gelu_pytorch_tanh", "gelu"], GELU)
    use_bidirectional_attention: bool = only(False)


class Gemma(Decoder[GemmaFile]):
    """Attention and a gated MLP with gelu in every layer."""

    model_type = "gemma"
    transformers_class = "GemmaForCausalLM"
    File = GemmaFile
    default_end = 1

    def read(self, file: GemmaFile, rope: DefaultRope, dtype: str) -> Architecture:
        read = super().read(file, rope, dtype)
        return replace(read, model=replace(read.model, activation="gelu", embed_scale=file.hidden_size**0.5))

    def write(self, architecture: Architecture) -> dict[str, Any]:
        return super().write(architecture) | {"hidden_act": GELU, "hidden_activation": GELU}

    def table(self, layers: Sequence[LayerConfig], model: ModelConfig) -> Table:
        return less_one(super().table(layers, model))
