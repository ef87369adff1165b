"""Mistral (arXiv 2310.06825): attention over a window."""

from dataclasses import dataclass
from typing import Any, ClassVar

from kvlab.mixers.attention import AttentionConfig
from kvlab.models.transformer import LayerConfig
from kvlab.weights.config_files import DefaultRope, size
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import Decoder, DecoderFile, attention_layers, attention_values


@dataclass(frozen=True, kw_only=True)
class MistralFile(DecoderFile):
    """transformers masks keys at distance `sliding_window` and beyond: the current token counts, as here. Absent means
    transformers' default, null no window, and as many key-value heads as heads."""

    null_counts: ClassVar[tuple[str, ...]] = ("sliding_window", "num_key_value_heads")

    num_key_value_heads: int | None = size(8, null=True)
    sliding_window: int | None = size(4096, null=True)


class Mistral(Decoder[MistralFile]):
    """Attention in every layer, over a window where the file has one."""

    model_type = "mistral"
    transformers_class = "MistralForCausalLM"
    File = MistralFile
    default_end = 2

    def layers(self, file: MistralFile, rope: DefaultRope) -> list[LayerConfig]:
        return attention_layers(file, rope, window=file.sliding_window)

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        windows = [layer.config.window for layer in architecture.layers if isinstance(layer.config, AttentionConfig)]
        return attention_values(architecture) | {"sliding_window": next(filter(None, windows), None)}
