"""What the families of Llama's form share: attention and a gated MLP in every layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvlab.mixers.attention import AttentionConfig
from kvlab.mixers.base import MixerConfig
from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.rotary import YARN, is_yarn
from kvlab.schema import ConfigError, flag
from kvlab.weights.config_files import ConfigFile, DefaultRope, only, positive, size
from kvlab.weights.families.base import Architecture, Family
from kvlab.weights.mixture import experts_table, mlp_table
from kvlab.weights.tables import Entry, Table, linear

FULL, SLIDING = "full_attention", "sliding_attention"
"""The words of `layer_types`."""


@dataclass(frozen=True, kw_only=True)
class DecoderFile(ConfigFile):
    """The fields of Llama and its like."""

    intermediate_size: int = size()
    num_attention_heads: int = size()
    num_key_value_heads: int | None = size(None)
    head_dim: int | None = size(None)
    rms_norm_eps: float = positive(1e-6)
    attention_bias: bool = flag(False)
    mlp_bias: bool = only(False)
    layer_types: list[Any] | None = None


class Decoder[F: DecoderFile](Family[F]):
    """A family of Llama's form. Its layers are `attention`, or what `layers` makes of the file."""

    def read(self, file: F, rope: DefaultRope, dtype: str) -> Architecture:
        model = ModelConfig(
            model_dim=file.hidden_size,
            mlp_dim=file.intermediate_size,
            norm_eps=file.rms_norm_eps,
            tie_embeddings=file.tie_word_embeddings,
            dtype=dtype,
        )
        return Architecture(self.model_type, tuple(self.layers(file, rope)), model, file.vocab_size)

    def layers(self, file: F, rope: DefaultRope) -> list[LayerConfig]:
        """The model's layers. Raises ConfigError for what is not built."""
        return attention_layers(file, rope)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        model = architecture.model
        values = {"intermediate_size": model.mlp_dim, "hidden_act": "silu", "rms_norm_eps": model.norm_eps}
        return values | self.write_layers(architecture)

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        """The fields that say what the layers are."""
        return attention_values(architecture)

    def table(self, layers: Sequence[LayerConfig], model: ModelConfig) -> Table:
        table: Table = {
            "embedding.embedding": Entry(("model.embed_tokens.weight",)),
            "norm.scale": Entry(("model.norm.weight",)),
        }
        for index, layer in enumerate(layers):
            ours, theirs = f"blocks.{index}", f"model.layers.{index}"
            table |= self.norms_table(ours, theirs, layer)
            table |= self.mixer_table(f"{ours}.mixer", f"{theirs}.{self.mixer_name(layer)}", layer.config)
            table |= self.mlp_table(f"{ours}.mlp", f"{theirs}.mlp", layer)
        return table

    def norms_table(self, ours: str, theirs: str, layer: LayerConfig) -> Table:
        """The norms of one layer's block."""
        return {
            f"{ours}.mixer_norm.scale": Entry((f"{theirs}.input_layernorm.weight",)),
            f"{ours}.mlp_norm.scale": Entry((f"{theirs}.post_attention_layernorm.weight",)),
        }

    def mixer_name(self, layer: LayerConfig) -> str:
        """What the file calls the layer's mixer."""
        return "self_attn"

    def mixer_table(self, ours: str, theirs: str, config: Any) -> Table:
        """The tensors of one layer's mixer."""
        return attention_table(ours, theirs, config)

    def mlp_table(self, ours: str, theirs: str, layer: LayerConfig) -> Table:
        """The tensors of what stands behind one layer's mixer."""
        return mlp_table(ours, theirs) if layer.mlp is None else experts_table(ours, theirs, layer.mlp)


def attention_layers(
    file: DecoderFile, rope: DefaultRope, *, window: int | None = None, **more: Any
) -> list[LayerConfig]:
    """Attention in every layer, through the window where `layer_types`, or for want of them the window itself, says
    so. `more` are fields of `AttentionConfig`."""
    num_layers, kinds = file.num_hidden_layers, file.layer_types
    if kinds is None:
        kinds = [SLIDING if window else FULL] * num_layers
    legal_kinds = (FULL, SLIDING) if window else (FULL,)
    if len(kinds) != num_layers or any(kind not in legal_kinds for kind in kinds):
        legal = f"must be {num_layers} of full_attention and, with a window, sliding_attention"
        raise ConfigError("layer_types", kinds, legal)
    config = attention_config(file, rope, **more)
    local = replace(config, window=window)
    return [LayerConfig("attention", local if kind == SLIDING else config) for kind in kinds]


def attention_config(file: DecoderFile, rope: DefaultRope, /, **more: Any) -> AttentionConfig:
    """Full attention as the file has it."""
    head_dim = file.head_dim or max(1, file.hidden_size // file.num_attention_heads)
    if int(head_dim * rope.partial_rotary_factor) % 2:
        legal = f"must turn an even part of a head of {head_dim}"
        raise ConfigError("partial_rotary_factor", rope.partial_rotary_factor, legal)
    return AttentionConfig(
        num_heads=file.num_attention_heads,
        num_kv_heads=file.num_key_value_heads or file.num_attention_heads,
        head_dim=head_dim,
        bias=file.attention_bias,
        norm_eps=file.rms_norm_eps,
        rope_base=rope.rope_theta,
        rope_fraction=rope.partial_rotary_factor,
        rope_scaling=rope.scaling,
        **more,
    )


def attention_values(architecture: Architecture) -> dict[str, Any]:
    """What config.json says of layers of attention."""
    first = first_config(architecture, AttentionConfig)
    return {
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "attention_bias": first.bias,
        "rope_parameters": rope_values(first.rope_base, first.rope_scaling, first.rope_fraction),
    }


def first_config[C: MixerConfig](architecture: Architecture, kind: type[C]) -> C:
    """The first layer's config of that kind; files describe one for all. Raises ValueError where there is none."""
    for layer in architecture.layers:
        if isinstance(layer.config, kind):
            return layer.config
    legal = f"its config.json cannot say a model without {kind.__name__}"
    raise ValueError(f"family = {architecture.family!r}: {legal}")


def rope_values(base: float, scaling: Sequence[float], fraction: float = 1.0) -> dict[str, Any]:
    """`rope_parameters` of a rotary embedding."""
    rope: dict[str, Any] = {"rope_theta": base, "rope_type": "default"}
    if fraction != 1:
        rope["partial_rotary_factor"] = fraction
    if len(scaling) == 1:
        rope |= {"rope_type": "linear", "factor": scaling[0]}
    elif is_yarn(scaling):
        names = ("factor", "beta_slow", "beta_fast", "original_max_position_embeddings", "attention_factor")
        rope |= {"rope_type": "yarn", **dict(zip(names, scaling[:YARN], strict=True))}
        if len(scaling) > YARN:
            rope["truncate"] = False
    elif scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": "llama3", **dict(zip(names, scaling, strict=True))}
    if len(scaling) >= 4 and scaling[3].is_integer():
        rope["original_max_position_embeddings"] = int(scaling[3])
    return rope


def attention_table(ours: str, theirs: str, config: AttentionConfig) -> Table:
    """Projections, and the norms of queries and keys and the logits of sinks where there are any."""
    table: Table = {}
    for mine, yours in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        has_bias = config.bias or (config.out_bias if mine == "out" else config.qkv_bias)
        table |= linear(f"{ours}.{mine}", f"{theirs}.{yours}_proj", bias=has_bias)
    if config.qk_norm:
        table[f"{ours}.query_norm.scale"] = Entry((f"{theirs}.q_norm.weight",))
        table[f"{ours}.key_norm.scale"] = Entry((f"{theirs}.k_norm.weight",))
    if config.sink_logits:
        table[f"{ours}.sink_logits"] = Entry((f"{theirs}.sinks",))
    return table
