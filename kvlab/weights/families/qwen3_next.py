"""Qwen3-Next (2025): three layers of Gated DeltaNet to one of gated attention, with experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvlab.mixers.linear import LinearConfig
from kvlab.models.experts import ExpertsConfig
from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.schema import ConfigError, flag
from kvlab.weights.config_files import COUNT, DefaultRope, size, value_of
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import Decoder, attention_config, attention_table, attention_values, first_config
from kvlab.weights.families.hybrid import FULL, LINEAR, HybridFile, delta_net, delta_net_values, layer_types, layers_of
from kvlab.weights.mixture import experts_table
from kvlab.weights.tables import CONVOLUTION, LESS_ONE, Entry, Table, linear, rows_by_group


@dataclass(frozen=True, kw_only=True)
class Qwen3NextFile(HybridFile):
    """Its own fields. Absent means transformers' default: of experts that there are 512 in every layer."""

    num_key_value_heads: int = size(2)
    head_dim: int = size(256)
    linear_num_key_heads: int = size(16)
    linear_num_value_heads: int = size(32)
    linear_key_head_dim: int = size(128)
    linear_value_head_dim: int = size(128)
    full_attention_interval: int = size(4)
    num_experts: int = value_of(COUNT, 512)
    num_experts_per_tok: int = size(10)
    moe_intermediate_size: int = size(512)
    shared_expert_intermediate_size: int = size(512)
    norm_topk_prob: bool = flag(True)
    decoder_sparse_step: int = size(1)
    mlp_only_layers: tuple[int, ...] = value_of(tuple[COUNT, ...], ())

    def has_experts(self, layer: int) -> bool:
        """Whether that layer's MLP is a choice of several."""
        is_sparse = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return is_sparse and layer not in self.mlp_only_layers


class Qwen3Next(Decoder[Qwen3NextFile]):
    """Every fourth layer attends, a quarter of each head turned, its outputs gated. Norms are stored less one, but
    those of the linear layers' outputs."""

    model_type = "qwen3_next"
    transformers_class = "Qwen3NextForCausalLM"
    File = Qwen3NextFile
    rope_fraction = 0.25

    def layers(self, file: Qwen3NextFile, rope: DefaultRope) -> list[LayerConfig]:
        num_layers = file.num_hidden_layers
        default = [FULL if layer % file.full_attention_interval == 0 else LINEAR for layer in range(1, num_layers + 1)]
        kinds = {
            LINEAR: delta_net(
                file.linear_num_key_heads,
                file.linear_num_value_heads,
                key_dim=file.linear_key_head_dim,
                value_dim=file.linear_value_head_dim,
                conv_len=file.linear_conv_kernel_dim,
                norm_eps=file.rms_norm_eps,
            ),
            FULL: LayerConfig("attention", attention_config(file, rope, qk_norm=True, output_gate=True)),
        }
        experts = experts_of(file) if any(file.has_experts(layer) for layer in range(num_layers)) else None
        layers = layers_of(file, default, kinds)
        return [replace(layer, mlp=experts if file.has_experts(at) else None) for at, layer in enumerate(layers)]

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        return {
            **attention_values(architecture),
            **delta_net_values(first_config(architecture, LinearConfig)),
            "layer_types": layer_types(architecture),
            **experts_values(architecture),
        }

    def table(self, layers: Sequence[LayerConfig], model: ModelConfig) -> Table:
        table = super().table(layers, model)
        for name, entry in table.items():
            if name == "norm.scale" or name.endswith("_norm.scale"):  # a linear layer's own is mixer.norm
                table[name] = replace(entry, transform=LESS_ONE)
        return table

    def mlp_table(self, ours: str, theirs: str, layer: LayerConfig) -> Table:
        if layer.mlp is None:
            return super().mlp_table(ours, theirs, layer)
        return experts_table(ours, theirs, layer.mlp, shared="shared_expert")

    def is_unread(self, name: str, architecture: Architecture) -> bool:
        return name.startswith("mtp.")  # predicts the token behind the next

    def mixer_name(self, layer: LayerConfig) -> str:
        return "linear_attn" if layer.mixer == "linear" else "self_attn"

    def mixer_table(self, ours: str, theirs: str, config: Any) -> Table:
        if isinstance(config, LinearConfig):
            return linear_table(ours, theirs, config)
        table = attention_table(ours, theirs, config)
        heads, dim = config.num_heads, config.head_dim
        for name, rows in zip(("query", "gate"), rows_by_group(heads, (dim, dim)), strict=True):
            projection = f"{theirs}.q_proj"
            table |= linear(f"{ours}.{name}", projection, bias=config.bias, order=rows, num_rows=2 * heads * dim)
        return table


def experts_of(file: Qwen3NextFile) -> ExpertsConfig:
    """The experts of its sparse layers. Raises ConfigError."""
    num_experts, num_chosen = file.num_experts, file.num_experts_per_tok
    if num_chosen > num_experts:
        raise ConfigError("num_experts_per_tok", num_chosen, f"must be at most num_experts = {num_experts}")
    return ExpertsConfig(
        num_experts=num_experts,
        experts_per_token=num_chosen,
        expert_dim=file.moe_intermediate_size,
        normalised=file.norm_topk_prob,
        shared_dim=file.shared_expert_intermediate_size,
        shared_gate=True,
    )


def experts_values(architecture: Architecture) -> dict[str, Any]:
    """What config.json says of experts, and of the layers that have none."""
    experts = next((layer.mlp for layer in architecture.layers if layer.mlp is not None), None)
    if experts is None:
        return {"num_experts": 0}
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.expert_dim,
        "shared_expert_intermediate_size": experts.shared_dim,
        "norm_topk_prob": experts.normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [at for at, layer in enumerate(architecture.layers) if layer.mlp is None],
    }


def linear_table(ours: str, theirs: str, config: LinearConfig) -> Table:
    """Two products make all that a linear layer takes from its input; their rows come by heads of keys."""
    groups, num_values = config.num_heads, config.heads // config.num_heads
    sizes = (config.key_dim, config.key_dim, num_values * config.value_dim, num_values * config.value_dim)
    queries, keys, values, gate = rows_by_group(groups, sizes)
    beta, step = rows_by_group(groups, (num_values, num_values))
    table = linear(f"{ours}.out", f"{theirs}.out_proj")
    for name, rows in (("split", queries + keys + values), ("gate", gate)):
        table |= linear(f"{ours}.{name}", f"{theirs}.in_proj_qkvz", order=rows, num_rows=groups * sum(sizes))
    for name, rows in (("beta", beta), ("step", step)):
        table |= linear(f"{ours}.{name}", f"{theirs}.in_proj_ba", order=rows, num_rows=2 * config.heads)
    table[f"{ours}.conv.kernel"] = Entry((f"{theirs}.conv1d.weight",), CONVOLUTION)
    for mine, yours in (("dt_bias", "dt_bias"), ("log_rate", "A_log"), ("norm.scale", "norm.weight")):
        table[f"{ours}.{mine}"] = Entry((f"{theirs}.{yours}",))
    return table
