"""Gemma 3n's text model: Gemma 3's attention, of which the upper layers read the keys and values of lower ones, behind
several residual streams (AltUp), a residual of low rank (LAuReL) and an embedding of the token for every layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kvlab.mixers.attention import AttentionConfig
from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.schema import ConfigError, integer_type, list_type, real_type
from kvlab.weights.config_files import MAX_LAYERS, POSITIVE, SIZE, DefaultRope, only, size, value_of
from kvlab.weights.families.base import Architecture
from kvlab.weights.families.decoder import FULL, SLIDING, Decoder, mlp_table
from kvlab.weights.families.gemma3 import GELU, Gemma3File, four_norms, two_kinds, two_kinds_values
from kvlab.weights.tables import Entry, Table, linear

SPARSE_LAYERS, SPARSITY = 10, 0.95
"""The first layers, and their share of gates that are cut off, where a file with more layers does not say."""
WIDTHS: Any = SIZE | list_type(SIZE, 1)
SHARES: Any = list_type(real_type(0.0, 1 - 1e-6)) | None


@dataclass(frozen=True, kw_only=True)
class Gemma3nFile(Gemma3File):
    """Its own fields; absent means transformers' defaults. Scores are not scaled, whatever `query_pre_attn_scalar` of
    the hub's files says. `altup_coef_clip` is for training alone and not read. A `final_logit_softcapping` of null caps
    nothing."""

    null_counts: ClassVar[tuple[str, ...]] = ("final_logit_softcapping",)

    intermediate_size: Any = value_of(WIDTHS)  # noqa: RUF009
    num_key_value_heads: int | None = size(2)
    query_pre_attn_scalar: Any = None
    sliding_window: int | None = size(512)
    sliding_window_pattern: Any = None
    final_logit_softcapping: float | None = value_of(POSITIVE | None, 30.0)
    vocab_size_per_layer_input: int = size(262_144)
    hidden_size_per_layer_input: int = size(256)
    altup_num_inputs: int = value_of(integer_type(2, 64), 4)
    altup_active_idx: int = value_of(integer_type(0, 2**31 - 1), 0)
    altup_correct_scale: bool = only(True)
    num_kv_shared_layers: int = value_of(integer_type(0, MAX_LAYERS), 15)
    laurel_rank: int = size(64)
    activation_sparsity_pattern: tuple[float, ...] | None = value_of(SHARES, None)

    @property
    def kinds(self) -> list[Any]:
        """What kind of attention each layer has."""
        if self.layer_types is not None:
            return self.layer_types
        return [FULL if (index + 1) % 5 == 0 else SLIDING for index in range(self.num_hidden_layers)]

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden units of each layer's MLP. Raises ConfigError for a list of another length."""
        given, num_layers = self.intermediate_size, self.num_hidden_layers
        return (given,) * num_layers if isinstance(given, int) else _by_layer("intermediate_size", given, num_layers)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The share of each layer's gates that is cut off. Raises ConfigError for a list of another length."""
        given, num_layers = self.activation_sparsity_pattern, self.num_hidden_layers
        if given is not None:
            return _by_layer("activation_sparsity_pattern", given, num_layers)
        num_sparse = SPARSE_LAYERS if num_layers > SPARSE_LAYERS else 0
        return (SPARSITY,) * num_sparse + (0.0,) * (num_layers - num_sparse)


class Gemma3n(Decoder[Gemma3nFile]):
    """Attention and MLP between norms on both sides; queries, keys and values normed; embeddings times sqrt(E)."""

    model_type = "gemma3n_text"
    transformers_class = "Gemma3nForCausalLM"
    File = Gemma3nFile
    default_end = 1
    has_rope = False  # one for each kind of layer

    def read(self, file: Gemma3nFile, rope: DefaultRope, dtype: str) -> Architecture:
        if file.altup_active_idx >= file.altup_num_inputs:
            legal = f"must be in [0, {file.altup_num_inputs - 1}], one of altup_num_inputs = {file.altup_num_inputs}"
            raise ConfigError("altup_active_idx", file.altup_active_idx, legal)
        model = ModelConfig(
            model_dim=file.hidden_size,
            mlp_dim=file.widths[0],
            norm_eps=file.rms_norm_eps,
            tie_embeddings=file.tie_word_embeddings,
            dtype=dtype,
            activation="gelu",
            embed_scale=file.hidden_size**0.5,
            logit_cap=file.final_logit_softcapping,
            num_streams=file.altup_num_inputs,
            active_stream=file.altup_active_idx,
            layer_embed_dim=file.hidden_size_per_layer_input,
            layer_embed_vocab=file.vocab_size_per_layer_input,
            laurel_rank=file.laurel_rank,
        )
        return Architecture(self.model_type, tuple(self.layers(file, rope)), model, file.vocab_size)

    def layers(self, file: Gemma3nFile, rope: DefaultRope) -> list[LayerConfig]:
        layers = two_kinds(file, file.kinds, qk_norm=True, norms="both", scale=1.0)
        first_shared = len(layers) - file.num_kv_shared_layers
        lower = set(file.kinds[: max(0, first_shared)])
        if missing := set(file.kinds) - lower:
            legal = f"must leave a layer of each kind below; none of {', '.join(sorted(missing))}"
            raise ConfigError("num_kv_shared_layers", file.num_kv_shared_layers, legal)
        found = []
        for index, (layer, width, sparsity) in enumerate(zip(layers, file.widths, file.sparsities, strict=True)):
            shares = index >= first_shared
            config = replace(layer.config, shares_kv=shares, value_norm=not shares)
            own = None if width == file.widths[0] else width
            found.append(replace(layer, config=config, mlp_dim=own, mlp_sparsity=sparsity))
        return found

    def write(self, architecture: Architecture) -> dict[str, Any]:
        model = architecture.model
        values = {key: value for key, value in super().write(architecture).items() if key != "hidden_act"}
        return values | {
            "intermediate_size": [layer.width_of_mlp(model) for layer in architecture.layers],
            "activation_sparsity_pattern": [layer.mlp_sparsity for layer in architecture.layers],
            "hidden_activation": GELU,
            "final_logit_softcapping": model.logit_cap,
            "vocab_size_per_layer_input": model.layer_embed_vocab,
            "hidden_size_per_layer_input": model.layer_embed_dim,
            "altup_num_inputs": model.num_streams,
            "altup_active_idx": model.active_stream,
            "altup_correct_scale": True,
            "laurel_rank": model.laurel_rank,
        }

    def write_layers(self, architecture: Architecture) -> dict[str, Any]:
        sharing = [_shares(layer) for layer in architecture.layers]
        return two_kinds_values(architecture) | {"num_kv_shared_layers": sum(sharing)}

    def table(self, layers: Sequence[LayerConfig], model: ModelConfig) -> Table:
        table: Table = {
            "embedding.embedding": Entry(("model.embed_tokens.weight",)),
            "norm.scale": Entry(("model.norm.weight",)),
            "streams.embedding.embedding": Entry(("model.embed_tokens_per_layer.weight",)),
            "streams.norm.scale": Entry(("model.per_layer_projection_norm.weight",)),
            **linear("streams.projection", "model.per_layer_model_projection"),
        }
        for index in range(model.num_streams - 1):
            table |= linear(f"streams.spread.{index}", f"model.altup_projections.{index}")
            table |= linear(f"streams.gather.{index}", f"model.altup_unembed_projections.{index}")
        for index, layer in enumerate(layers):
            ours, theirs = f"blocks.{index}", f"model.layers.{index}"
            table |= four_norms(f"{ours}.block", theirs) | mlp_table(f"{ours}.block.mlp", f"{theirs}.mlp")
            table |= self.mixer_table(f"{ours}.block.mixer", f"{theirs}.self_attn", layer.config)
            table |= _streams_table(ours, theirs)
        return table

    def is_unread(self, name: str, architecture: Architecture) -> bool:
        """Keys and values of layers that read others': transformers 4 made and saved them."""
        kinds = ("k_proj.weight", "v_proj.weight", "k_norm.weight", "v_norm.weight", "k_proj.bias", "v_proj.bias")
        sharing = [index for index, layer in enumerate(architecture.layers) if _shares(layer)]
        return name in {f"model.layers.{index}.self_attn.{kind}" for index in sharing for kind in kinds}


def _shares(layer: LayerConfig) -> bool:
    return isinstance(layer.config, AttentionConfig) and layer.config.shares_kv


def _by_layer(name: str, given: Sequence[Any], num_layers: int) -> tuple[Any, ...]:
    """A list with an item for each layer. Raises ConfigError for one of another length."""
    if len(given) != num_layers:
        raise ConfigError(name, list(given), f"must have an item for each of num_hidden_layers = {num_layers}")
    return tuple(given)


def _streams_table(ours: str, theirs: str) -> Table:
    """What one layer has around its block, and Laurel within it."""
    table: Table = {
        f"{ours}.scale_of_active": Entry((f"{theirs}.altup.correct_output_scale",)),
        f"{ours}.router_norm.scale": Entry((f"{theirs}.altup.router_norm.weight",)),
        f"{ours}.out_norm.scale": Entry((f"{theirs}.post_per_layer_input_norm.weight",)),
        f"{ours}.block.laurel.norm.scale": Entry((f"{theirs}.laurel.post_laurel_norm.weight",)),
    }
    pairs = {
        "router": "altup.modality_router",
        "prediction": "altup.prediction_coefs",
        "correction": "altup.correction_coefs",
        "gate": "per_layer_input_gate",
        "out": "per_layer_projection",
        "block.laurel.down": "laurel.linear_left",
        "block.laurel.up": "laurel.linear_right",
    }
    for mine, yours in pairs.items():
        table |= linear(f"{ours}.{mine}", f"{theirs}.{yours}")
    return table
