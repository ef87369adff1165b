"""Granite 4's hybrid: Mamba-2 (arXiv 2405.21060) with some layers of attention. Experts are not built."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvlab.mixers.attention import AttentionConfig
from kvlab.mixers.mamba2 import Mamba2Config
from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.schema import ConfigError, integer_type
from kvlab.weights.config_files import SIZE, DefaultRope, only, positive, size, value_of
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import Decoder, DecoderFile, attention_config, attention_table, attention_values
from kvlab.weights.families.mamba2 import mamba2_table
from kvlab.weights.tables import TRANSPOSED, Entry, Table, linear

MAMBA = ("linear_attention", "mamba")
ATTENTION = ("full_attention", "attention")
"""What a layer is called in config.json, by transformers 5.23 and before; the latter is written, which all read."""


@dataclass(frozen=True, kw_only=True)
class GraniteHybridFile(DecoderFile):
    """Its own fields. Absent means transformers' defaults, of `num_local_experts` 8; `shared_intermediate_size` is the
    MLP of a dense model, `intermediate_size` that of the experts."""

    intermediate_size: int = size(11008)
    shared_intermediate_size: int = size(1024)
    num_local_experts: int = value_of(integer_type(0, 2**31 - 1), 8)
    position_embedding_type: str | None = value_of(Literal["rope", "nope"] | None, None)
    embedding_multiplier: float = positive(1.0)
    residual_multiplier: float = positive(1.0)
    attention_multiplier: float = positive(1.0)
    logits_scaling: float = positive(1.0)
    mamba_n_heads: int = size(128)
    mamba_n_groups: int = size(1)
    mamba_d_state: int = size(256)
    mamba_d_head: int | str = value_of(SIZE | Literal["auto"], "auto")
    mamba_d_conv: int = size(4)
    mamba_expand: int = size(2)
    mamba_chunk_size: int = size(256)
    mamba_conv_bias: bool = only(True)
    mamba_proj_bias: bool = only(False)
    time_step_limit: tuple[float, float] = only((0.0, math.inf))


class GraniteHybrid(Decoder[GraniteHybridFile]):
    """Every layer has a gated MLP behind its mixer, and what mixer and MLP give is scaled."""

    model_type = "granitemoehybrid"
    transformers_class = "GraniteMoeHybridForCausalLM"
    File = GraniteHybridFile
    default_end = 2

    def read(self, file: GraniteHybridFile, rope: DefaultRope, dtype: str) -> Architecture:
        if file.num_local_experts:
            raise ConfigError("num_local_experts", file.num_local_experts, "must be 0: experts are not built here")
        read = super().read(file, rope, dtype)
        model = replace(
            read.model,
            mlp_dim=file.shared_intermediate_size,
            embed_scale=file.embedding_multiplier,
            residual_scale=file.residual_multiplier,
            logit_divisor=file.logits_scaling,
        )
        return replace(read, model=model)

    def layers(self, file: GraniteHybridFile, rope: DefaultRope) -> list[LayerConfig]:
        num_layers = file.num_hidden_layers
        kinds = [MAMBA[0]] * num_layers if file.layer_types is None else file.layer_types
        if len(kinds) != num_layers or any(kind not in (*MAMBA, *ATTENTION) for kind in kinds):
            legal = f"must be {num_layers} of {', '.join((*MAMBA, *ATTENTION))}"
            raise ConfigError("layer_types", kinds, legal)
        has_rope = file.position_embedding_type == "rope"
        attention = attention_config(file, rope, scale=file.attention_multiplier, rope=has_rope)
        mixers = LayerConfig("mamba2", _mamba2(file)), LayerConfig("attention", attention)
        return [mixers[kind in ATTENTION] for kind in kinds]

    def write(self, architecture: Architecture) -> dict[str, Any]:
        model = architecture.model
        return super().write(architecture) | {
            "shared_intermediate_size": model.mlp_dim,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "embedding_multiplier": model.embed_scale,
            "residual_multiplier": model.residual_scale,
            "logits_scaling": model.logit_divisor,
        }

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        kinds = [MAMBA[1] if layer.mixer == "mamba2" else ATTENTION[1] for layer in architecture.layers]
        attention = [layer.config for layer in architecture.layers if isinstance(layer.config, AttentionConfig)]
        mamba = [layer.config for layer in architecture.layers if isinstance(layer.config, Mamba2Config)]
        values: dict[str, Any] = {"layer_types": kinds, "num_attention_heads": 1}
        if attention:
            positions = "rope" if attention[0].rope else None
            values |= attention_values(architecture)
            values |= {"attention_multiplier": attention[0].scale, "position_embedding_type": positions}
        return values | (_mamba_values(mamba[0], architecture.model) if mamba else {})

    def table(self, layers: Sequence[LayerConfig], model: ModelConfig) -> Table:
        table = super().table(layers, model)
        for index in range(len(layers)):
            ours, theirs = f"blocks.{index}.mlp", f"model.layers.{index}.shared_mlp"
            table[f"{ours}.gate_up.kernel"] = Entry((f"{theirs}.input_linear.weight",), TRANSPOSED)
            table |= linear(f"{ours}.down", f"{theirs}.output_linear")
        return table

    def mixer_name(self, layer: LayerConfig) -> str:
        return "mamba" if layer.mixer == "mamba2" else "self_attn"

    def mixer_table(self, ours: str, theirs: str, config: Any) -> Table:
        if isinstance(config, AttentionConfig):
            return attention_table(ours, theirs, config)
        return mamba2_table(ours, theirs)


def _mamba2(file: GraniteHybridFile) -> Mamba2Config:
    """A layer of Mamba-2. Raises ConfigError where its heads are not all of its channels."""
    width = file.mamba_expand * file.hidden_size
    head_dim = width // file.mamba_n_heads if file.mamba_d_head == "auto" else file.mamba_d_head
    assert isinstance(head_dim, int)
    if head_dim * file.mamba_n_heads != width:
        legal = f"must be mamba_expand * hidden_size = {width}"
        raise ConfigError("mamba_n_heads * mamba_d_head", head_dim * file.mamba_n_heads, legal)
    return Mamba2Config(
        state_dim=file.mamba_d_state,
        num_heads=file.mamba_n_heads,
        head_dim=head_dim,
        num_groups=file.mamba_n_groups,
        conv_len=file.mamba_d_conv,
        chunk_len=file.mamba_chunk_size,
        norm_eps=file.rms_norm_eps,
    )


def _mamba_values(config: Mamba2Config, model: ModelConfig) -> dict[str, Any]:
    """What config.json says of layers of Mamba-2."""
    return {
        "mamba_n_heads": config.num_heads,
        "mamba_n_groups": config.num_groups,
        "mamba_d_state": config.state_dim,
        "mamba_d_head": config.head_dim,
        "mamba_d_conv": config.conv_len,
        "mamba_chunk_size": config.chunk_len,
        "mamba_expand": config.num_heads * config.head_dim // model.model_dim,
    }
