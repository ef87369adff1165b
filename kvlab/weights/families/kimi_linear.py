"""Kimi Linear (arXiv 2510.26692): three layers of Kimi Delta Attention to one of latent attention without positions.
Experts are not built."""

from dataclasses import dataclass
from typing import Any

from kvlab.mixers.latent import LatentConfig
from kvlab.mixers.linear import LinearConfig
from kvlab.models.transformer import LayerConfig
from kvlab.schema import ConfigError
from kvlab.weights.config_files import COUNT, DefaultRope, Part, only, positive, size, value_of
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import Decoder, DecoderFile, first_config
from kvlab.weights.families.deepseek_v3 import latent_table, latent_values
from kvlab.weights.families.hybrid import FULL, LINEAR, delta_table, layer_types, layers_of
from kvlab.weights.tables import FLAT, Entry, Table, linear


@dataclass(frozen=True, kw_only=True)
class LinearAttnConfig(Part):
    """What the hub's file says of linear layers. Layers are counted from 1."""

    num_heads: int | None = size(None)
    head_dim: int | None = size(None)
    short_conv_kernel_size: int | None = size(None)
    full_attn_layers: tuple[int, ...] | None = value_of(tuple[COUNT, ...] | None, None)
    kda_layers: tuple[int, ...] | None = value_of(tuple[COUNT, ...] | None, None)


NOTHING = LinearAttnConfig()


@dataclass(frozen=True, kw_only=True)
class KimiLinearFile(DecoderFile):
    """The hub's fields, and those of transformers that stand in the place of `linear_attn_config`. Absent means its
    default."""

    kv_lora_rank: int = size(512)
    q_lora_rank: int | None = size(None)
    qk_nope_head_dim: int = size(128)
    qk_rope_head_dim: int = size(64)
    v_head_dim: int = size(128)
    rms_norm_eps: float = positive(1e-5)
    attention_bias: bool = only(False)
    tie_word_embeddings: bool = only(False)
    mla_use_nope: bool = only(True)
    linear_attn_config: LinearAttnConfig = NOTHING
    linear_num_heads: int = size(32)
    linear_head_dim: int = size(128)
    linear_conv_kernel_dim: int = size(4)
    first_k_dense_replace: int = value_of(COUNT, 1)
    mlp_layer_types: list[Any] | None = None
    num_experts: int = value_of(COUNT, 256)


class KimiLinear(Decoder[KimiLinearFile]):
    """Norms inside latent attention have an epsilon of their own, 1e-6; the others the file's."""

    model_type = "kimi_linear"
    transformers_class = "KimiLinearForCausalLM"
    File = KimiLinearFile
    has_rope = False
    context_field = "model_max_length"
    default_end = 163586

    def layers(self, file: KimiLinearFile, rope: DefaultRope) -> list[LayerConfig]:
        refuse_experts(file)
        heads, linear_attn = file.num_attention_heads, file.linear_attn_config
        if file.num_key_value_heads not in (None, heads):
            legal = f"must be num_attention_heads = {heads}, or null: all of them read one row"
            raise ConfigError("num_key_value_heads", file.num_key_value_heads, legal)
        head_dim = linear_attn.head_dim or file.linear_head_dim
        delta = LinearConfig(
            num_heads=linear_attn.num_heads or file.linear_num_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            decay="channel",
            gate="low_rank",
            conv_len=linear_attn.short_conv_kernel_size or file.linear_conv_kernel_dim,
            conv_bias=False,
            norm_eps=file.rms_norm_eps,
        )
        latent = LatentConfig(
            num_heads=heads,
            rank=file.kv_lora_rank,
            rope_dim=file.qk_rope_head_dim,
            head_dim=file.qk_nope_head_dim,
            value_dim=file.v_head_dim,
            query_rank=file.q_lora_rank or 0,
            rope=False,
        )
        kinds = {LINEAR: LayerConfig("linear", delta), FULL: LayerConfig("latent", latent)}
        return layers_of(file, default_kinds(file), kinds)

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        delta, kinds = first_config(architecture, LinearConfig), layer_types(architecture)
        linear_attn = {
            "num_heads": delta.num_heads,
            "head_dim": delta.key_dim,
            "short_conv_kernel_size": delta.conv_len,
            "full_attn_layers": [layer for layer, kind in enumerate(kinds, 1) if kind == FULL],
            "kda_layers": [layer for layer, kind in enumerate(kinds, 1) if kind == LINEAR],
        }
        return {
            **latent_values(first_config(architecture, LatentConfig)),
            "linear_attn_config": linear_attn,
            "mla_use_nope": True,
            "first_k_dense_replace": len(kinds),
        }

    def mixer_table(self, ours: str, theirs: str, config: Any) -> Table:
        if not isinstance(config, LinearConfig):
            return latent_table(ours, theirs, config)
        table = delta_table(ours, theirs, config)
        table[f"{ours}.log_rate"] = Entry((f"{theirs}.A_log",), FLAT)
        for mine, yours in (("step_in", "f_a"), ("step", "f_b"), ("gate_in", "g_a"), ("gate", "g_b")):
            table |= linear(f"{ours}.{mine}", f"{theirs}.{yours}_proj")
        return table


def refuse_experts(file: KimiLinearFile) -> None:
    """Raises ConfigError where a layer's MLP is not one dense one."""
    num_layers, kinds = file.num_hidden_layers, file.mlp_layer_types
    if kinds is not None and kinds != ["dense"] * num_layers:
        raise ConfigError("mlp_layer_types", kinds, f"must be {num_layers} of dense: experts are not built here")
    if kinds is None and file.first_k_dense_replace < num_layers:
        legal = f"must be at least num_hidden_layers = {num_layers}: layers behind it have experts, not built here"
        raise ConfigError("first_k_dense_replace", file.first_k_dense_replace, legal)


def default_kinds(file: KimiLinearFile) -> list[str]:
    """The kind of every layer as the hub's file lists them, or else as transformers has it. Raises ConfigError for
    lists that leave out a layer or name one twice."""
    full, linear_layers = file.linear_attn_config.full_attn_layers, file.linear_attn_config.kda_layers
    layers = range(1, file.num_hidden_layers + 1)
    if full is None or linear_layers is None:
        return [FULL if layer > 1 and layer % 4 == 1 else LINEAR for layer in layers]
    if sorted(full + linear_layers) != list(layers):
        legal = f"must name, with kda_layers, every layer from 1 to {file.num_hidden_layers} once"
        raise ConfigError("linear_attn_config.full_attn_layers", list(full), legal)
    return [FULL if layer in full else LINEAR for layer in layers]
