"""What a checkpoint's config.json says, in kvlab's words; and back. Whatever is not understood is refused, all at
once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvlab.mixers.attention import AttentionConfig
from kvlab.mixers.latent import LatentConfig
from kvlab.mixers.mamba2 import Mamba2Config
from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.schema import ConfigError, nearest, shown
from kvlab.weights.config_files import (
    ConfigFile,
    DecoderFile,
    DeepseekFile,
    DefaultRope,
    LlamaFile,
    Mamba2File,
    MistralFile,
    Qwen3File,
    read_part,
    read_rope,
)


@dataclass(frozen=True)
class Architecture:
    """A model as its layers; `family` names the table of its tensors."""

    family: str
    layers: tuple[LayerConfig, ...]
    model: ModelConfig
    vocab_size: int


def _decoder_layers(file: DecoderFile, rope: DefaultRope, window: int | None = None, **more: Any) -> list[LayerConfig]:
    """Attention in every layer, through the window where `layer_types`, or for want of them the window itself, says
    so."""
    num_layers, kinds = file.num_hidden_layers, file.layer_types
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * num_layers
    legal_kinds = ("full_attention", "sliding_attention") if window else ("full_attention",)
    if len(kinds) != num_layers or any(kind not in legal_kinds for kind in kinds):
        legal = f"must be {num_layers} of full_attention and, with a window, sliding_attention"
        raise ConfigError("layer_types", kinds, legal)
    config = AttentionConfig(
        num_heads=file.num_attention_heads,
        num_kv_heads=file.num_key_value_heads or file.num_attention_heads,
        head_dim=file.head_dim or max(1, file.hidden_size // file.num_attention_heads),
        bias=file.attention_bias,
        norm_eps=file.rms_norm_eps,
        rope_base=rope.rope_theta,
        rope_scaling=rope.scaling,
        **more,
    )
    local = replace(config, window=window)
    return [LayerConfig("attention", local if kind == "sliding_attention" else config) for kind in kinds]


def _latent_layers(file: DeepseekFile, rope: DefaultRope) -> list[LayerConfig]:
    """Latent attention in every layer. The norms inside have an epsilon of their own, 1e-6, whatever the file says of
    those between layers."""
    num_layers, heads = file.num_hidden_layers, file.num_attention_heads
    if file.first_k_dense_replace < num_layers:
        legal = f"must be at least num_hidden_layers = {num_layers}: layers behind it have experts, which are not built"
        raise ConfigError("first_k_dense_replace", file.first_k_dense_replace, legal)
    if file.num_key_value_heads not in (None, heads):
        legal = f"must be num_attention_heads = {heads}, or null: all of them read one row"
        raise ConfigError("num_key_value_heads", file.num_key_value_heads, legal)
    config = LatentConfig(
        num_heads=heads,
        rank=file.kv_lora_rank,
        rope_dim=file.qk_rope_head_dim,
        head_dim=file.qk_nope_head_dim,
        value_dim=file.v_head_dim,
        query_rank=file.q_lora_rank or 0,
        rope_base=rope.rope_theta,
        rope_scaling=rope.scaling,
    )
    return [LayerConfig("latent", config)] * num_layers


def _mamba2_layers(file: Mamba2File) -> list[LayerConfig]:
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
    return [LayerConfig("mamba2", config)] * file.num_hidden_layers


FAMILIES: dict[str, type[ConfigFile]] = {
    "llama": LlamaFile,
    "mistral": MistralFile,
    "qwen3": Qwen3File,
    "deepseek_v3": DeepseekFile,
    "mamba2": Mamba2File,
}
"""What config.json may say, by its `model_type`."""


def read_architecture(values: Mapping[str, Any], dtype: str) -> tuple[Architecture | None, list[str]]:
    """The architecture of a config.json, or every reason why it cannot be built."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        return None, [f"config.json: model_type = {shown(family)}: {nearest(str(family), FAMILIES)}"]
    found: list[str] = []
    file = read_part(FAMILIES[family], values, found)
    rope = DefaultRope() if family == "mamba2" else read_rope(values, found)
    if file is None or rope is None or found:
        return None, found
    try:
        return _architecture(family, file, rope, dtype), []
    except (ConfigError, TypeError, ValueError) as error:
        return None, [f"config.json: {error}"]


def _architecture(family: str, file: ConfigFile, rope: DefaultRope, dtype: str) -> Architecture:
    """Raises ConfigError for what the layers do not take."""
    shared = {"model_dim": file.hidden_size, "tie_embeddings": file.tie_word_embeddings, "dtype": dtype}
    if isinstance(file, Mamba2File):
        model = ModelConfig(**shared, norm_eps=file.layer_norm_epsilon)
        return Architecture(family, tuple(_mamba2_layers(file)), model, file.vocab_size)
    assert isinstance(file, DecoderFile)
    if isinstance(file, DeepseekFile):
        layers = _latent_layers(file, rope)
    else:
        window = file.sliding_window if isinstance(file, MistralFile) else None
        layers = _decoder_layers(file, rope, window, qk_norm=isinstance(file, Qwen3File))
    model = ModelConfig(**shared, mlp_dim=file.intermediate_size, norm_eps=file.rms_norm_eps)
    return Architecture(family, tuple(layers), model, file.vocab_size)


def write_architecture(architecture: Architecture) -> dict[str, Any]:
    """The config.json of an architecture. Raises ValueError for what its family cannot say."""
    model, first = architecture.model, architecture.layers[0].config
    values: dict[str, Any] = {
        "model_type": architecture.family,
        "architectures": [NAMES[architecture.family]],
        "vocab_size": architecture.vocab_size,
        "hidden_size": model.model_dim,
        "num_hidden_layers": len(architecture.layers),
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": model.dtype,
    }
    if isinstance(first, Mamba2Config):
        values |= {
            "state_size": first.state_dim,
            "num_heads": first.num_heads,
            "head_dim": first.head_dim,
            "n_groups": first.num_groups,
            "conv_kernel": first.conv_len,
            "chunk_size": first.chunk_len,
            "expand": first.num_heads * first.head_dim // model.model_dim,
            "layer_norm_epsilon": model.norm_eps,
        }
    else:
        assert isinstance(first, AttentionConfig | LatentConfig)
        values |= {
            "intermediate_size": model.mlp_dim,
            "num_attention_heads": first.num_heads,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "rope_parameters": _rope_values(first),
        }
        values |= (
            _latent_values(architecture, first)
            if isinstance(first, LatentConfig)
            else _attention_values(architecture, first)
        )
    restored, problems = read_architecture(values, model.dtype)
    if restored != architecture:
        reasons = "; ".join(problems) or "some options of its layers have no field there"
        raise ValueError(f"family = {architecture.family!r}: its config.json cannot say what this model is ({reasons})")
    return values


def _rope_values(config: AttentionConfig | LatentConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.rope_base, "rope_type": "default"}
    if len(config.rope_scaling) == 1:
        rope |= {"rope_type": "linear", "factor": config.rope_scaling[0]}
    elif config.rope_scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": "llama3", **dict(zip(names, config.rope_scaling, strict=True))}
    return rope


def _attention_values(architecture: Architecture, first: AttentionConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "attention_bias": first.bias,
    }
    if architecture.family == "mistral":
        windows = [layer.config.window for layer in architecture.layers if isinstance(layer.config, AttentionConfig)]
        values["sliding_window"] = next((window for window in windows if window), None)
    return values


def _latent_values(architecture: Architecture, first: LatentConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": first.num_heads,
        "kv_lora_rank": first.rank,
        "q_lora_rank": first.query_rank or None,
        "qk_nope_head_dim": first.head_dim,
        "qk_rope_head_dim": first.rope_dim,
        "v_head_dim": first.value_dim,
        "first_k_dense_replace": len(architecture.layers),
        "num_nextn_predict_layers": 0,
    }


NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}
