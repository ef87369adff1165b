"""OLMo Hybrid (2026): layers of Gated DeltaNet with norms before them, and of attention with norms behind, mostly
without positions."""

from dataclasses import dataclass
from typing import Any, ClassVar

from kvlab.mixers.attention import AttentionConfig
from kvlab.mixers.linear import LinearConfig
from kvlab.models.transformer import LayerConfig
from kvlab.schema import flag
from kvlab.weights.config_files import POSITIVE, DefaultRope, value_of
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import Decoder, attention_config, attention_table, attention_values, first_config
from kvlab.weights.families.hybrid import (
    FULL,
    LINEAR,
    HybridFile,
    delta_net,
    delta_net_values,
    delta_table,
    layer_types,
    layers_of,
)
from kvlab.weights.tables import Entry, Table, linear

LINEAR_NORM_EPS = 1e-5
"""Of the outputs of a linear layer, whatever the file says of the other norms."""


@dataclass(frozen=True, kw_only=True)
class OlmoHybridFile(HybridFile):
    """Its own fields. A base of null is none: nothing is turned. Absent it is transformers' default; so are heads of
    linear layers, which follow from those of attention and from the width."""

    null_counts: ClassVar[tuple[str, ...]] = ("rope_theta",)

    linear_allow_neg_eigval: bool = flag(True)
    rope_theta: float | None = value_of(POSITIVE | None, 10_000.0)
    rope_parameters: Any = None
    rope_scaling: Any = None

    @property
    def has_rope(self) -> bool:
        """Whether attention knows positions."""
        given = self.rope_parameters or self.rope_scaling or {}
        return given.get("rope_theta", self.rope_theta) is not None


class OlmoHybrid(Decoder[OlmoHybridFile]):
    """Every fourth layer attends, the others may overshoot (negative eigenvalues). Queries and keys of all heads are
    normed as one vector."""

    model_type = "olmo_hybrid"
    transformers_class = "OlmoHybridForCausalLM"
    File = OlmoHybridFile
    default_end = 100257

    def layers(self, file: OlmoHybridFile, rope: DefaultRope) -> list[LayerConfig]:
        num_layers = file.num_hidden_layers
        default = [FULL if layer % 4 == 0 else LINEAR for layer in range(1, num_layers + 1)]
        if FULL not in default:
            default[-1] = FULL
        num_key_heads = file.linear_num_key_heads or file.num_attention_heads
        key_dim = file.linear_key_head_dim or max(1, int(0.75 * file.hidden_size / num_key_heads))
        delta = delta_net(
            num_key_heads,
            file.linear_num_value_heads or file.num_attention_heads,
            key_dim=key_dim,
            value_dim=file.linear_value_head_dim or 2 * key_dim,
            conv_len=file.linear_conv_kernel_dim,
            negative_eigenvalues=file.linear_allow_neg_eigval,
            norm_eps=LINEAR_NORM_EPS,
        )
        turned = rope if file.has_rope else DefaultRope()
        norms = {"norms": "after", "qk_norm": True, "qk_norm_over": "all"}
        attention = attention_config(file, turned, rope=file.has_rope, **norms)
        return layers_of(file, default, {LINEAR: delta, FULL: LayerConfig("attention", attention)})

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        delta = first_config(architecture, LinearConfig)
        values = attention_values(architecture) | delta_net_values(delta)
        if not first_config(architecture, AttentionConfig).rope:
            values["rope_parameters"] = {"rope_theta": None, "rope_type": "default"}
        kinds = layer_types(architecture)
        return {
            **values,
            "layer_types": kinds,
            "linear_allow_neg_eigval": delta.negative_eigenvalues,
        }

    def norms_table(self, ours: str, theirs: str, layer: LayerConfig) -> Table:
        names = {"mixer_norm_after": "post_attention_layernorm", "mlp_norm_after": "post_feedforward_layernorm"}
        if layer.mixer == "linear":
            names = {"mixer_norm": "attention_layer_norm", "mlp_norm": "feedforward_layer_norm"}
        return {f"{ours}.{mine}.scale": Entry((f"{theirs}.{yours}.weight",)) for mine, yours in names.items()}

    def mixer_name(self, layer: LayerConfig) -> str:
        return "linear_attn" if layer.mixer == "linear" else "self_attn"

    def mixer_table(self, ours: str, theirs: str, config: Any) -> Table:
        if not isinstance(config, LinearConfig):
            return attention_table(ours, theirs, config)
        table = delta_table(ours, theirs, config)
        return table | linear(f"{ours}.step", f"{theirs}.a_proj") | linear(f"{ours}.gate", f"{theirs}.g_proj")
