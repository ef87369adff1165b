"""gpt-oss (arXiv 2508.10925): attention with sink logits, every other layer over a window, and experts in every
layer."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kvlab.mixers.attention import AttentionConfig
from kvlab.models.experts import ExpertsConfig
from kvlab.models.transformer import LayerConfig
from kvlab.schema import ConfigError, flag
from kvlab.weights.config_files import DefaultRope, Part, positive, read_rope, size, value_of
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import FULL, SLIDING, Decoder, DecoderFile, attention_layers, attention_values
from kvlab.weights.tables import Entry, Table, linear

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
"""The rotary embedding of a file that names none."""


@dataclass(frozen=True, kw_only=True)
class Quantization(Part):
    """How the experts are stored. Which tensors are, their names say (`kvlab.weights.mxfp4`)."""

    quant_method: str = value_of(str, "")

    def cross_check(self) -> None:
        if self.quant_method != "mxfp4":
            raise ConfigError("quant_method", self.quant_method, "only 'mxfp4' is supported")


@dataclass(frozen=True, kw_only=True)
class GptOssFile(DecoderFile):
    """Its own fields. Absent means transformers' default; a null of heads what it makes of one, no window and as many
    key-value heads as heads. `intermediate_size` is the width of an expert."""

    null_counts: ClassVar[tuple[str, ...]] = ("num_key_value_heads", "head_dim", "sliding_window")

    num_key_value_heads: int | None = size(8, null=True)
    head_dim: int | None = size(64, null=True)
    rms_norm_eps: float = positive(1e-5)
    attention_bias: bool = flag(True)
    sliding_window: int | None = size(128, null=True)
    num_local_experts: int = size(128)
    num_experts_per_tok: int = size(4)
    swiglu_alpha: float = positive(1.702)
    swiglu_limit: float = positive(7.0)
    quantization_config: Quantization | None = None
    rope_parameters: Any = None
    rope_scaling: Any = None
    rope_theta: float = positive(150_000.0)


class GptOss(Decoder[GptOssFile]):
    """Layers with and without a window take turns where `layer_types` says nothing else. Router and experts have
    biases, whatever `attention_bias` says of attention."""

    model_type = "gpt_oss"
    transformers_class = "GptOssForCausalLM"
    File = GptOssFile
    has_rope = False  # of a file without one it is YaRN

    def read(self, file: GptOssFile, rope: DefaultRope, dtype: str) -> Architecture:
        read = super().read(file, _rope(file), dtype)
        return replace(read, model=replace(read.model, mlp_dim=0))

    def layers(self, file: GptOssFile, rope: DefaultRope) -> list[LayerConfig]:
        num_experts, num_chosen = file.num_local_experts, file.num_experts_per_tok
        if num_chosen > num_experts:
            raise ConfigError("num_experts_per_tok", num_chosen, f"must be at most num_local_experts = {num_experts}")
        experts = ExpertsConfig(
            num_experts=num_experts,
            experts_per_token=num_chosen,
            expert_dim=file.intermediate_size,
            limit=file.swiglu_limit,
            gain=file.swiglu_alpha,
            bias=True,
        )
        kinds = file.layer_types
        if kinds is None:
            kinds = [FULL if layer % 2 else SLIDING for layer in range(file.num_hidden_layers)]
        named = replace(file, layer_types=kinds)
        layers = attention_layers(named, rope, window=file.sliding_window, sink_logits=True)
        return [replace(layer, mlp=experts) for layer in layers]

    def write(self, architecture: Architecture) -> dict[str, Any]:
        experts = architecture.layers[0].mlp
        assert experts is not None
        return super().write(architecture) | {
            "intermediate_size": experts.expert_dim,
            "num_local_experts": experts.num_experts,
            "num_experts_per_tok": experts.experts_per_token,
            "swiglu_alpha": experts.gain,
            "swiglu_limit": experts.limit,
        }

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        windows = [layer.config.window for layer in architecture.layers if isinstance(layer.config, AttentionConfig)]
        return attention_values(architecture) | {
            "sliding_window": next(filter(None, windows), None),
            "layer_types": [SLIDING if window else FULL for window in windows],
        }

    def mlp_table(self, ours: str, theirs: str, layer: LayerConfig) -> Table:
        table = linear(f"{ours}.router", f"{theirs}.router", bias=True)
        for mine, yours in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            table[f"{ours}.{mine}.kernel"] = Entry((f"{theirs}.experts.{yours}",))
            table[f"{ours}.{mine}.bias"] = Entry((f"{theirs}.experts.{yours}_bias",))
        return table


def _rope(file: GptOssFile) -> DefaultRope:
    """The rotary embedding. Raises ValueError where it is not built."""
    given = {"rope_theta": file.rope_theta, "rope_parameters": file.rope_parameters, "rope_scaling": file.rope_scaling}
    if not file.rope_parameters and not file.rope_scaling:
        given["rope_scaling"] = ROPE
    found: list[str] = []
    rope = read_rope(given, found)
    if rope is None or found:
        raise ValueError("; ".join(problem.removeprefix("config.json: ") for problem in found))
    return rope
