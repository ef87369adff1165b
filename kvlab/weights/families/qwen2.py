"""Qwen 2 (arXiv 2407.10671): queries, keys and values have biases; of some models the last layers attend over a
window."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kvlab.mixers.attention import AttentionConfig
from kvlab.models.transformer import LayerConfig
from kvlab.schema import flag, integer_type
from kvlab.weights.config_files import DefaultRope, only, size, value_of
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import FULL, SLIDING, Decoder, DecoderFile, attention_layers, attention_values


@dataclass(frozen=True, kw_only=True)
class Qwen2File(DecoderFile):
    """Its own fields. Absent means transformers' default, null as many key-value heads as heads, and no window."""

    null_counts: ClassVar[tuple[str, ...]] = ("num_key_value_heads", "sliding_window")

    num_key_value_heads: int | None = size(32, null=True)
    attention_bias: Any = None  # not read: which projections have biases is fixed
    use_sliding_window: bool = flag(False)
    sliding_window: int | None = size(4096, null=True)
    max_window_layers: int = value_of(integer_type(0, 2**31 - 1), 28)
    use_mrope: bool = only(False)


class Qwen2(Decoder[Qwen2File]):
    """Attention in every layer, over the window from layer `max_window_layers` on where it is used, or in the layers
    that `layer_types` names."""

    model_type = "qwen2"
    transformers_class = "Qwen2ForCausalLM"
    File = Qwen2File

    def layers(self, file: Qwen2File, rope: DefaultRope) -> list[LayerConfig]:
        window, kinds = file.sliding_window if file.use_sliding_window else None, file.layer_types
        if kinds is None:
            num_full = min(file.max_window_layers, file.num_hidden_layers) if window else file.num_hidden_layers
            kinds = [FULL] * num_full + [SLIDING] * (file.num_hidden_layers - num_full)
        named = replace(file, layer_types=kinds, attention_bias=False)
        return attention_layers(named, rope, window=window, qkv_bias=True)

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        values = attention_values(architecture)
        del values["attention_bias"]
        windows = [layer.config.window for layer in architecture.layers if isinstance(layer.config, AttentionConfig)]
        window = next(filter(None, windows), None)
        return values | {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": windows.index(window) if window else len(windows),
            "layer_types": [SLIDING if each else FULL for each in windows],
        }
