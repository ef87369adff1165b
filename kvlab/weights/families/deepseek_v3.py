"""DeepSeek-V3 (arXiv 2412.19437): latent attention. Experts are not built."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from kvlab.mixers.latent import LatentConfig
from kvlab.models.transformer import LayerConfig
from kvlab.rotary import is_yarn
from kvlab.schema import ConfigError, integer_type
from kvlab.weights.config_files import DefaultRope, YarnRope, only, size, value_of
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import Decoder, DecoderFile, rope_values
from kvlab.weights.tables import Entry, Table, linear

COUNT: Any = integer_type(0, 2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class DeepseekFile(DecoderFile):
    """Only dense layers are built: the first `first_k_dense_replace`. Absent means transformers' default, of
    `q_lora_rank` null that queries are not compressed. Its heads share one row."""

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
    num_local_experts: int = value_of(COUNT, 256)


class DeepseekV3(Decoder[DeepseekFile]):
    """Latent attention in every layer. The norms inside have an epsilon of their own, 1e-6, whatever the file says of
    those between layers."""

    model_type = "deepseek_v3"
    transformers_class = "DeepseekV3ForCausalLM"
    File = DeepseekFile
    default_end = 1

    def layers(self, file: DeepseekFile, rope: DefaultRope) -> list[LayerConfig]:
        num_layers, heads = file.num_hidden_layers, file.num_attention_heads
        if file.first_k_dense_replace < num_layers:
            legal = f"must be at least num_hidden_layers = {num_layers}: layers behind it have experts, not built here"
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
            scale=scale_of(file.qk_nope_head_dim + file.qk_rope_head_dim, rope),
        )
        return [LayerConfig("latent", config)] * num_layers

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        first = architecture.layers[0].config
        assert isinstance(first, LatentConfig)
        return {
            **latent_values(first),
            "rope_parameters": rope_values(first.rope_base, first.rope_scaling) | mscale_of(first),
            "first_k_dense_replace": len(architecture.layers),
            "num_nextn_predict_layers": 0,
        }

    def mixer_table(self, ours: str, theirs: str, config: LatentConfig) -> Table:
        return latent_table(ours, theirs, config)


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
