"""Gemma 3 (arXiv 2503.19786), its text model: attention over a window between layers of full attention, which turn by
another base."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvlab.mixers.attention import AttentionConfig
from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.schema import ConfigError, flag
from kvlab.weights.config_files import DefaultRope, only, positive, read_rope, size
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import (
    FULL,
    SLIDING,
    Decoder,
    DecoderFile,
    attention_layers,
    attention_values,
    first_config,
    rope_values,
)
from kvlab.weights.tables import Entry, Table, less_one

GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class Gemma3File(DecoderFile):
    """Its own fields, in the old spelling of the hub's files too: a pattern in place of `layer_types`, and the two
    bases in fields of their own. `hidden_act` is not read: the activation has another name here."""

    num_attention_heads: int = size(8)
    num_key_value_heads: int | None = size(4)
    head_dim: int | None = size(256)
    tie_word_embeddings: bool = flag(True)
    hidden_act: Any = None
    hidden_activation: str = only(GELU)
    query_pre_attn_scalar: int = size(256)
    sliding_window: int | None = size(4096)
    sliding_window_pattern: int = size(6)
    final_logit_softcapping: float | None = positive(None)
    attn_logit_softcapping: None = only(None)
    use_bidirectional_attention: bool = only(False)
    rope_parameters: Any = None
    rope_scaling: Any = None
    rope_theta: float = positive(1e6)
    rope_local_base_freq: float = positive(1e4)


class Gemma3(Decoder[Gemma3File]):
    """Attention and MLP between norms on both sides, queries and keys normed, embeddings times sqrt(E)."""

    model_type = "gemma3_text"
    transformers_class = "Gemma3ForCausalLM"
    File = Gemma3File
    default_end = 1
    has_rope = False  # one for each kind of layer

    def read(self, file: Gemma3File, rope: DefaultRope, dtype: str) -> Architecture:
        read = super().read(file, rope, dtype)
        more = {"activation": "gelu", "embed_scale": file.hidden_size**0.5, "logit_cap": file.final_logit_softcapping}
        return replace(read, model=replace(read.model, **more))

    def layers(self, file: Gemma3File, rope: DefaultRope) -> list[LayerConfig]:
        kinds = file.layer_types
        if kinds is None:
            pattern = [*[SLIDING] * (file.sliding_window_pattern - 1), FULL]
            kinds = [kind for kind, _ in zip(itertools.cycle(pattern), range(file.num_hidden_layers), strict=False)]
        return two_kinds(file, kinds, qk_norm=True, norms="both", scale=file.query_pre_attn_scalar**-0.5)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        model = architecture.model
        values = {key: value for key, value in super().write(architecture).items() if key != "hidden_act"}
        return values | {"hidden_activation": GELU, "final_logit_softcapping": model.logit_cap}

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        scale = first_config(architecture, AttentionConfig).scale
        assert scale is not None
        return two_kinds_values(architecture) | {"query_pre_attn_scalar": round(scale**-2)}

    def table(self, layers: Sequence[LayerConfig], model: ModelConfig) -> Table:
        return less_one(super().table(layers, model))

    def norms_table(self, ours: str, theirs: str, layer: LayerConfig) -> Table:
        return four_norms(ours, theirs)


def four_norms(ours: str, theirs: str) -> Table:
    """Norms before and after mixer and MLP."""
    return {
        f"{ours}.mixer_norm.scale": Entry((f"{theirs}.input_layernorm.weight",)),
        f"{ours}.mixer_norm_after.scale": Entry((f"{theirs}.post_attention_layernorm.weight",)),
        f"{ours}.mlp_norm.scale": Entry((f"{theirs}.pre_feedforward_layernorm.weight",)),
        f"{ours}.mlp_norm_after.scale": Entry((f"{theirs}.post_feedforward_layernorm.weight",)),
    }


def two_kinds(file: Gemma3File, kinds: list[Any], **more: Any) -> list[LayerConfig]:
    """Attention of these kinds, with a rotary embedding and a window of each. `more` are fields of `AttentionConfig`.
    Raises ConfigError for other kinds, and ValueError for an embedding that is not built."""
    ropes = _ropes(file)
    layers = attention_layers(replace(file, layer_types=kinds), ropes[FULL], window=file.sliding_window, **more)
    local = {"rope_base": ropes[SLIDING].rope_theta, "rope_scaling": ropes[SLIDING].scaling}
    return [
        replace(layer, config=replace(layer.config, **local)) if kind == SLIDING else layer
        for layer, kind in zip(layers, kinds, strict=True)
    ]


def two_kinds_values(architecture: Architecture) -> dict[str, Any]:
    """What config.json says of such layers."""
    configs = [layer.config for layer in architecture.layers if isinstance(layer.config, AttentionConfig)]
    ropes = {FULL: rope_values(1e6, ()), SLIDING: rope_values(1e4, ())}
    for config in configs:
        ropes[SLIDING if config.window else FULL] = rope_values(config.rope_base, config.rope_scaling)
    return attention_values(architecture) | {
        "sliding_window": next((config.window for config in configs if config.window), None),
        "layer_types": [SLIDING if config.window else FULL for config in configs],
        "rope_parameters": ropes,
    }


def _ropes(file: Gemma3File) -> dict[str, DefaultRope]:
    """The rotary embedding of each kind of layer. Raises ConfigError where one is not built."""
    given, scaling = file.rope_parameters or {}, file.rope_scaling or {}
    parts = [given, scaling, *given.values()] if isinstance(given, Mapping) else [given]
    if not all(part is None or isinstance(part, Mapping) for part in parts) or not given.keys() <= {FULL, SLIDING}:
        raise ConfigError("rope_parameters", given, f"must be an object with {FULL} and {SLIDING}, each an object")
    found: list[str] = []
    ropes = {
        FULL: read_rope(
            {"rope_parameters": {"rope_theta": file.rope_theta, **(given.get(FULL) or {}), **scaling}}, found
        ),
        SLIDING: read_rope(
            {"rope_parameters": {"rope_theta": file.rope_local_base_freq, **(given.get(SLIDING) or {})}}, found
        ),
    }
    if found:
        raise ValueError("; ".join(problem.removeprefix("config.json: ") for problem in found))
    return {kind: rope for kind, rope in ropes.items() if rope is not None}
