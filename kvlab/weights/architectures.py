"""What a checkpoint's config.json says, in kvlab's words; and back. Whatever is not understood is refused, all at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvlab.mixers.attention import AttentionConfig
from kvlab.mixers.mamba2 import Mamba2Config
from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.schema import ConfigError, nearest


@dataclass(frozen=True)
class Architecture:
    """A model as its layers; `family` names the table of its tensors."""

    family: str
    layers: tuple[LayerConfig, ...]
    model: ModelConfig
    vocab_size: int


MAX_LAYERS = 10_000


class Fields:
    """A config.json being read: every value is asked for once, every problem is kept."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.problems: list[str] = []

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; null counts as absent."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            self.problems.append(f"config.json: {name} = {value!r}: must be a positive integer")
            return 1
        if name == "num_hidden_layers" and value > MAX_LAYERS:
            self.problems.append(f"config.json: {name} = {value}: must be at most {MAX_LAYERS}")
            return 1
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            self.problems.append(f"config.json: {name} = {value!r}: must be a positive number")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null counts as absent."""
        value = default if self.values.get(name) is None else self.values[name]
        if not isinstance(value, bool):
            self.problems.append(f"config.json: {name} = {value!r}: must be true or false")
        return bool(value)

    def require(self, name: str, *legal: Any) -> None:
        """An option that may be absent or null, and otherwise is one of those that are built."""
        if self.values.get(name) is not None and self.values[name] not in legal:
            self.problems.append(f"config.json: {name} = {self.values[name]!r}: only {legal[0]!r} is supported")


def _rope(fields: Fields) -> dict[str, Any]:
    """Base and scaling, in the old spelling (rope_theta, rope_scaling) or the new (rope_parameters)."""
    given = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        fields.problems.append(f"config.json: rope_parameters = {given!r}: must be an object")
        given = {}
    both = [fields.values.get(name) for name in ("rope_parameters", "rope_scaling")]
    if all(both) and both[0] != both[1]:
        fields.problems.append("config.json: rope_parameters and rope_scaling: must not contradict each other")
    inner = Fields({"rope_theta": fields.values.get("rope_theta"), **given})
    kind = given.get("rope_type", given.get("type", "default"))
    scaling: tuple[float, ...] = ()
    if kind == "linear":
        scaling = (inner.real("factor"),)
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = tuple(inner.real(name) for name in names)
    elif kind != "default":
        fields.problems.append(f"config.json: rope_type = {kind!r}: must be one of default, linear, llama3")
    inner.require("partial_rotary_factor", 1.0)
    base = inner.real("rope_theta", 10_000.0)
    fields.problems += inner.problems
    return {"rope_base": base, "rope_scaling": scaling}


def _decoder(fields: Fields, **attention: Any) -> tuple[list[LayerConfig], dict[str, Any]]:
    """The family of Llama: attention and gated MLP in every layer; a window where `layer_types` says so."""
    model_dim, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_layers, eps = fields.integer("num_hidden_layers"), fields.real("rms_norm_eps", 1e-6)
    fields.require("hidden_act", "silu")
    fields.require("mlp_bias", False)
    window = attention.pop("window", None)
    kinds = fields.values.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * num_layers
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or set(kinds) - {"full_attention", "sliding_attention"}
        or ("sliding_attention" in kinds and window is None)
    ):
        legal = f"must be {num_layers} of full_attention and, with a window, sliding_attention"
        fields.problems.append(f"config.json: layer_types = {kinds!r}: {legal}")
        kinds = []
    shared = {
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("num_key_value_heads", num_heads),
        "head_dim": fields.integer("head_dim", max(1, model_dim // num_heads)),
        "bias": fields.flag("attention_bias", False),
        "norm_eps": eps,
        **_rope(fields),
        **attention,
    }
    model = {"model_dim": model_dim, "mlp_dim": fields.integer("intermediate_size"), "norm_eps": eps}
    if fields.problems:
        return [], model
    layers = [
        LayerConfig("attention", AttentionConfig(**shared, window=window if kind == "sliding_attention" else None))
        for kind in kinds
    ]
    return layers, model


def _llama(fields: Fields) -> tuple[list[LayerConfig], dict[str, Any]]:
    fields.require("pretraining_tp", 1)
    return _decoder(fields)


def _mistral(fields: Fields) -> tuple[list[LayerConfig], dict[str, Any]]:
    # transformers masks keys at distance `sliding_window` and beyond: the current token counts, as here.
    # Absent means transformers' default, null none.
    window = fields.integer("sliding_window", 4096) if fields.values.get("sliding_window", 4096) is not None else None
    return _decoder(fields, window=window)


def _qwen3(fields: Fields) -> tuple[list[LayerConfig], dict[str, Any]]:
    fields.require("use_sliding_window", False)
    if fields.values.get("head_dim") is None:
        fields.values = {**fields.values, "head_dim": 128}
    return _decoder(fields, qk_norm=True)


def _mamba2(fields: Fields) -> tuple[list[LayerConfig], dict[str, Any]]:
    model_dim, eps = fields.integer("hidden_size"), fields.real("layer_norm_epsilon", 1e-5)
    num_heads, head_dim = fields.integer("num_heads"), fields.integer("head_dim")
    fields.require("hidden_act", "silu")
    fields.require("use_bias", False)
    fields.require("use_conv_bias", True)
    limits = fields.values.get("time_step_limit")
    if limits is not None and tuple(float(one) for one in limits) != (0.0, float("inf")):
        fields.problems.append(f"config.json: time_step_limit = {limits!r}: only (0, inf) is supported")
    if num_heads * head_dim != fields.integer("expand", 2) * model_dim:
        fields.problems.append(
            f"config.json: num_heads * head_dim = {num_heads * head_dim}: must be expand * hidden_size"
        )
    mixer = {
        "state_dim": fields.integer("state_size", 128),
        "num_heads": num_heads,
        "head_dim": head_dim,
        "num_groups": fields.integer("n_groups", 8),
        "conv_len": fields.integer("conv_kernel", 4),
        "chunk_len": fields.integer("chunk_size", 256),
        "norm_eps": eps,
    }
    model = {"model_dim": model_dim, "norm_eps": eps}
    if fields.problems:
        return [], model
    return [LayerConfig("mamba2", Mamba2Config(**mixer))] * fields.integer("num_hidden_layers"), model


FAMILIES: dict[str, Callable[[Fields], tuple[list[LayerConfig], dict[str, Any]]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen3": _qwen3,
    "mamba2": _mamba2,
}
"""Readers of config.json by its `model_type`."""


def read_architecture(values: Mapping[str, Any], dtype: str) -> tuple[Architecture | None, list[str]]:
    """The architecture of a config.json, or every reason why it cannot be built."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        return None, [f"config.json: model_type = {family!r}: {nearest(str(family), FAMILIES)}"]
    fields = Fields(values)
    if values.get("quantization_config") is not None:
        fields.problems.append("config.json: quantization_config: quantised weights are not read")
    fields.require("partial_rotary_factor", 1.0)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        fields.require(name, 0)
    try:
        layers, model = FAMILIES[family](fields)
        tied, vocab_size = fields.flag("tie_word_embeddings", False), fields.integer("vocab_size")
        if fields.problems:
            return None, fields.problems
        return Architecture(
            family, tuple(layers), ModelConfig(**model, tie_embeddings=tied, dtype=dtype), vocab_size
        ), []
    except (ConfigError, TypeError, ValueError) as error:
        return None, [*fields.problems, f"config.json: {error}"]


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
        assert isinstance(first, AttentionConfig)
        windows = [one.config.window for one in architecture.layers if isinstance(one.config, AttentionConfig)]
        rope: dict[str, Any] = {"rope_theta": first.rope_base, "rope_type": "default"}
        if len(first.rope_scaling) == 1:
            rope |= {"rope_type": "linear", "factor": first.rope_scaling[0]}
        elif first.rope_scaling:
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            rope |= {"rope_type": "llama3", **dict(zip(names, first.rope_scaling, strict=True))}
        values |= {
            "intermediate_size": model.mlp_dim,
            "num_attention_heads": first.num_heads,
            "num_key_value_heads": first.num_kv_heads,
            "head_dim": first.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "attention_bias": first.bias,
            "rope_parameters": rope,
        }
        if architecture.family == "mistral":
            values["sliding_window"] = next((one for one in windows if one), None)
    restored, problems = read_architecture(values, model.dtype)
    if restored != architecture:
        reasons = "; ".join(problems) or "some options of its layers have no field there"
        raise ValueError(f"family = {architecture.family!r}: its config.json cannot say what this model is ({reasons})")
    return values


NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}
