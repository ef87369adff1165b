"""DeepSeek-V3 (arXiv 2412.19437): latent attention, and experts behind the first layers."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from kvlab.mixers.latent import LatentConfig
from kvlab.models.experts import ExpertsConfig
from kvlab.models.transformer import LayerConfig
from kvlab.rotary import is_yarn
from kvlab.schema import ConfigError, flag
from kvlab.weights.config_files import COUNT, DefaultRope, YarnRope, only, positive, size, value_of
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import Decoder, DecoderFile, rope_values
from kvlab.weights.tables import Entry, Table, linear

V3_LAYERS = 61
"""Layers of DeepSeek-V3 and R1: their files have one more, which predicts the token behind the next."""


@dataclass(frozen=True, kw_only=True)
class DeepseekFile(DecoderFile):
    """Layers from `first_k_dense_replace` on have experts. Absent means transformers' default, of `q_lora_rank` null
    that queries are not compressed. Its heads share one row."""

    null_counts: ClassVar[tuple[str, ...]] = ("q_lora_rank",)

    kv_lora_rank: int = size()
    q_lora_rank: int | None = size(1536, null=True)
    qk_nope_head_dim: int = size()
    qk_rope_head_dim: int = size()
    v_head_dim: int = size()
    rope_interleave: bool = only(True)
    attention_bias: bool = only(False)
    first_k_dense_replace: int = value_of(COUNT, 3)
    n_routed_experts: int = value_of(COUNT, 256)
    num_local_experts: int = value_of(COUNT, 0)
    num_experts_per_tok: int = size(8)
    moe_intermediate_size: int = size(2048)
    n_shared_experts: int = size(1)
    n_group: int = size(8)
    topk_group: int = size(4)
    norm_topk_prob: bool = flag(True)
    routed_scaling_factor: float = positive(2.5)
    topk_method: str = only("noaux_tc")
    scoring_func: str = only("sigmoid")
    moe_layer_freq: int = only(1)


class DeepseekV3(Decoder[DeepseekFile]):
    """Latent attention in every layer. The norms inside have an epsilon of their own, 1e-6, whatever the file says of
    those between layers."""

    model_type = "deepseek_v3"
    transformers_class = "DeepseekV3ForCausalLM"
    File = DeepseekFile
    default_end = 1

    def layers(self, file: DeepseekFile, rope: DefaultRope) -> list[LayerConfig]:
        num_layers, heads = file.num_hidden_layers, file.num_attention_heads
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
            scale=scale_of(file.qk_nope_head_dim + file.qk_rope_head_dim, rope),
        )
        num_dense = min(file.first_k_dense_replace, num_layers)
        layers = [LayerConfig("latent", config)] * num_dense
        if num_dense < num_layers:
            layers += [LayerConfig("latent", config, mlp=experts_of(file))] * (num_layers - num_dense)
        return layers

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        first = architecture.layers[0].config
        assert isinstance(first, LatentConfig)
        return {
            **latent_values(first),
            "rope_parameters": rope_values(first.rope_base, first.rope_scaling) | mscale_of(first),
            **experts_values(architecture),
            "num_nextn_predict_layers": 0,
        }

    def is_unread(self, name: str, architecture: Architecture) -> bool:
        return len(architecture.layers) == V3_LAYERS and name.startswith(f"model.layers.{V3_LAYERS}.")

    def mixer_table(self, ours: str, theirs: str, config: LatentConfig) -> Table:
        return latent_table(ours, theirs, config)


def experts_of(file: DeepseekFile) -> ExpertsConfig:
    """The experts of its later layers. Raises ConfigError."""
    if file.num_local_experts not in (0, file.n_routed_experts):
        legal = f"must be n_routed_experts = {file.n_routed_experts}, or absent"
        raise ConfigError("num_local_experts", file.num_local_experts, legal)
    num_experts, num_groups, num_open = file.n_routed_experts, file.n_group, file.topk_group
    if num_experts % num_groups or num_experts < 2 * num_groups:
        legal = f"must divide n_routed_experts = {num_experts} into groups of two or more"
        raise ConfigError("n_group", num_groups, legal)
    if num_open > num_groups:
        raise ConfigError("topk_group", num_open, f"must be at most n_group = {num_groups}")
    if file.num_experts_per_tok > (most := num_experts // num_groups * num_open):
        legal = f"must be at most {most}, the experts of {num_open} in {num_groups} groups"
        raise ConfigError("num_experts_per_tok", file.num_experts_per_tok, legal)
    return ExpertsConfig(
        num_experts=num_experts,
        experts_per_token=file.num_experts_per_tok,
        expert_dim=file.moe_intermediate_size,
        scores="sigmoid",
        normalised=file.norm_topk_prob,
        share_scale=file.routed_scaling_factor,
        choice_bias=True,
        num_groups=num_groups,
        groups_per_token=num_open,
        shared_dim=file.moe_intermediate_size * file.n_shared_experts,
    )


def experts_values(architecture: Architecture) -> dict[str, Any]:
    """What config.json says of experts, and how many layers before them have none."""
    first = next((at for at, layer in enumerate(architecture.layers) if layer.mlp), len(architecture.layers))
    if first == len(architecture.layers):
        return {"first_k_dense_replace": first}
    experts = architecture.layers[first].mlp
    assert experts is not None
    return {
        "first_k_dense_replace": first,
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.expert_dim,
        "n_shared_experts": experts.shared_dim // experts.expert_dim,
        "n_group": experts.num_groups,
        "topk_group": experts.groups_per_token,
        "norm_topk_prob": experts.normalised,
        "routed_scaling_factor": experts.share_scale,
    }


def scale_of(dim: int, rope: DefaultRope) -> float | None:
    """What scores are multiplied with, of keys of so many numbers; None: what they always are."""
    more = rope.of_scores if isinstance(rope, YarnRope) else 1.0
    return None if more == 1 else dim**-0.5 * more


def mscale_of(config: LatentConfig) -> dict[str, float]:
    """What `rope_parameters` says of a `scale`."""
    if config.scale is None:
        return {}
    longer = math.sqrt(config.scale) * (config.head_dim + config.rope_dim) ** 0.25
    if not is_yarn(config.rope_scaling) or config.rope_scaling[0] == 1:
        legal = "must be null without a `rope_scaling` after YaRN: its config.json has no other place for it"
        raise ConfigError("scale", config.scale, legal)
    return {"mscale_all_dim": 10 * (longer - 1) / math.log(config.rope_scaling[0])}


def latent_values(config: LatentConfig) -> dict[str, Any]:
    """What config.json says of latent attention."""
    return {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "kv_lora_rank": config.rank,
        "q_lora_rank": config.query_rank or None,
        "qk_nope_head_dim": config.head_dim,
        "qk_rope_head_dim": config.rope_dim,
        "v_head_dim": config.value_dim,
    }


def latent_table(ours: str, theirs: str, config: LatentConfig) -> Table:
    """The file turns neighbours, here numbers half of `rope_dim` apart are turned: rows of what is turned are put so,
    of each head's queries and of the shared key behind the compressed row. Without rope all rows stay."""
    table: Table = {}
    if config.query_rank:
        table |= linear(f"{ours}.compress", f"{theirs}.q_a_proj")
        table[f"{ours}.query_norm.scale"] = Entry((f"{theirs}.q_a_layernorm.weight",))
    of_queries = _apart(config.num_heads, config.head_dim, config.rope_dim) if config.rope else None
    of_row = _apart(1, config.rank, config.rope_dim) if config.rope else None
    query = f"{theirs}.q_b_proj" if config.query_rank else f"{theirs}.q_proj"
    table |= linear(f"{ours}.query", query, order=of_queries)
    table |= linear(f"{ours}.row", f"{theirs}.kv_a_proj_with_mqa", order=of_row)
    table[f"{ours}.row_norm.scale"] = Entry((f"{theirs}.kv_a_layernorm.weight",))
    return table | linear(f"{ours}.expand", f"{theirs}.kv_b_proj") | linear(f"{ours}.out", f"{theirs}.o_proj")


def _apart(num_heads: int, num_plain: int, num_turned: int) -> tuple[int, ...]:
    """Rows of heads of `num_plain` numbers and `num_turned` behind them, of which the second of each two neighbours
    comes behind the first ones."""
    end = num_plain + num_turned
    head = [*range(num_plain), *range(num_plain, end, 2), *range(num_plain + 1, end, 2)]
    return tuple(number * end + row for number in range(num_heads) for row in head)
