"""Qwen 3 (arXiv 2505.09388): queries and keys are normed."""

from dataclasses import dataclass
from typing import ClassVar

from kvlab.models.transformer import LayerConfig
from kvlab.weights.config_files import DefaultRope, only, size
from kvlab.weights.families.decoder import Decoder, DecoderFile, attention_layers


@dataclass(frozen=True, kw_only=True)
class Qwen3File(DecoderFile):
    """Its own fields. Absent means transformers' default, null as many key-value heads as heads."""

    null_counts: ClassVar[tuple[str, ...]] = ("num_key_value_heads",)

    num_key_value_heads: int | None = size(32, null=True)
    head_dim: int = size(128)
    use_sliding_window: bool = only(False)


class Qwen3(Decoder[Qwen3File]):
    """Attention with normed queries and keys in every layer."""

    model_type = "qwen3"
    transformers_class = "Qwen3ForCausalLM"
    File = Qwen3File

    def layers(self, file: Qwen3File, rope: DefaultRope) -> list[LayerConfig]:
        return attention_layers(file, rope, qk_norm=True)
