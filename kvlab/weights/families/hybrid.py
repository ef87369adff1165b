"""What families share of which some layers are linear attention and the others attend to every token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.mixers.linear import LinearConfig
from kvlab.models.transformer import LayerConfig
from kvlab.schema import ConfigError
from kvlab.weights.config_files import size
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import DecoderFile
from kvlab.weights.tables import CONVOLUTION, TRANSPOSED, Entry, Table, joined, linear

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class HybridFile(DecoderFile):
    """The fields of layers of Gated DeltaNet (arXiv 2412.06464). They have heads of their own."""

    linear_num_key_heads: int | None = size(None)
    linear_num_value_heads: int | None = size(None)
    linear_key_head_dim: int | None = size(None)
    linear_value_head_dim: int | None = size(None)
    linear_conv_kernel_dim: int = size(4)


def layers_of(file: DecoderFile, default: Sequence[str], kinds: dict[str, LayerConfig]) -> list[LayerConfig]:
    """Each layer as its kind, which is that of `layer_types` or else of `default`. Raises ConfigError for other kinds,
    and where one of the two is missing: config.json could not describe it when it is written."""
    names = default if file.layer_types is None else file.layer_types
    is_known = all(name in list(kinds) for name in names) and all(kind in names for kind in kinds)
    if len(names) != file.num_hidden_layers or not is_known:
        legal = f"must be {file.num_hidden_layers} of {' and '.join(kinds)}, each at least once"
        raise ConfigError("layer_types", list(names), legal)
    return [kinds[name] for name in names]


def layer_types(architecture: Architecture) -> list[str]:
    """The kind of every layer."""
    return [LINEAR if layer.mixer == "linear" else FULL for layer in architecture.layers]


def delta_net(
    num_key_heads: int, num_value_heads: int, key_dim: int, value_dim: int, conv_len: int, **more: Any
) -> LayerConfig:
    """A layer of Gated DeltaNet. Raises ConfigError where value heads do not come in groups."""
    if num_value_heads % num_key_heads:
        legal = f"must be a multiple of linear_num_key_heads = {num_key_heads}"
        raise ConfigError("linear_num_value_heads", num_value_heads, legal)
    config = LinearConfig(
        num_heads=num_key_heads,
        num_value_heads=0 if num_value_heads == num_key_heads else num_value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        conv_len=conv_len,
        conv_bias=False,
        **more,
    )
    return LayerConfig("linear", config)


def delta_table(ours: str, theirs: str, config: LinearConfig) -> Table:
    """What the files of both OLMo-Hybrid and Kimi Linear have of a delta rule: projections and convolutions of
    queries, keys and values by themselves."""
    keys, values = config.num_heads * config.key_dim, config.heads * config.value_dim
    widths = (keys, keys, values)
    table: Table = {
        f"{ours}.split.kernel": Entry(tuple(f"{theirs}.{x}_proj.weight" for x in "qkv"), joined(TRANSPOSED, widths)),
        f"{ours}.conv.kernel": Entry(tuple(f"{theirs}.{x}_conv1d.weight" for x in "qkv"), joined(CONVOLUTION, widths)),
    }
    for mine, yours in (("dt_bias", "dt_bias"), ("log_rate", "A_log"), ("norm.scale", "o_norm.weight")):
        table[f"{ours}.{mine}"] = Entry((f"{theirs}.{yours}",))
    return table | linear(f"{ours}.beta", f"{theirs}.b_proj") | linear(f"{ours}.out", f"{theirs}.o_proj")


def delta_net_values(config: LinearConfig) -> dict[str, Any]:
    """What config.json says of such a layer."""
    return {
        "linear_num_key_heads": config.num_heads,
        "linear_num_value_heads": config.heads,
        "linear_key_head_dim": config.key_dim,
        "linear_value_head_dim": config.value_dim,
        "linear_conv_kernel_dim": config.conv_len,
    }
