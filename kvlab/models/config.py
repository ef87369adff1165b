"""What a model is told to be: its widths, its head, what published families have besides; and each of its layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from kvlab.mixers import MixerConfig
from kvlab.models.experts import ExpertsConfig
from kvlab.schema import ConfigError, Schema, added, choice, flag, integer, real, to_plain


def dtype_for(platform: str) -> str:
    """What `model.dtype` "auto" stands for on a platform of JAX: what its kernels read. The tensor cores of a GPU
    refuse pages of float32; a CPU has nothing faster."""
    return "float32" if platform == "cpu" else "bfloat16"


@dataclass(frozen=True)
class ModelConfig(Schema):
    """Everything of a model but its mixers. `num_layers` tiles the pattern (null: once); `mlp_dim` 0 is no MLP, but in
    layers that have experts. `dtype` "auto" is looked up when the config is made (`dtype_for` this process' first
    device): a config never holds the word.

    What some published families have besides: an MLP with another `activation` ("gelu" is its tanh form) or with
    biases, embeddings times `embed_scale`, what a layer adds times `residual_scale`, logits over `logit_divisor`, then
    c tanh(logits / c) with `logit_cap` = c.

    With `num_streams` the residual stream is several, of which a layer computes the `active_stream` (AltUp,
    `kvlab.models.altup`); every layer then may have an embedding of the token of its own, `layer_embed_dim` wide, of
    the first `layer_embed_vocab` tokens (null: all). A `laurel_rank` is that of a product beside the mixer
    (`kvlab.models.laurel`). 0 is none of these.
    """

    model_dim: int = integer(64, 1, 65536)
    num_layers: int | None = integer(None, 1, 1024, optional=True)
    mlp_dim: int = integer(0, 0, 262144)
    tie_embeddings: bool = flag(True)
    norm_eps: float = real(1e-6, 0.0, 1.0, open_low=True)
    dtype: str = choice("float32", ("float32", "bfloat16"), auto=lambda: dtype_for(jax.default_backend()))
    activation: str = added(choice("silu", ("silu", "gelu")))
    embed_scale: float = added(real(1.0, 0.0, 1e6, open_low=True))
    residual_scale: float = added(real(1.0, 0.0, 1e6, open_low=True))
    logit_divisor: float = added(real(1.0, 0.0, 1e6, open_low=True))
    logit_cap: float | None = added(real(None, 0.0, 1e6, open_low=True, optional=True))
    mlp_bias: bool = added(flag(False))
    num_streams: int = added(integer(0, 0, 64))
    active_stream: int = added(integer(0, 0, 63))
    layer_embed_dim: int = added(integer(0, 0, 65536))
    layer_embed_vocab: int | None = added(integer(None, 1, optional=True))
    laurel_rank: int = added(integer(0, 0, 65536))

    def cross_check(self) -> None:
        if self.num_streams == 1:
            raise ConfigError("num_streams", 1, "must be 0 (the residual stream alone) or in [2, 64]")
        if self.active_stream and self.active_stream >= self.num_streams:
            legal = f"must be in [0, {max(0, self.num_streams - 1)}], with num_streams = {self.num_streams}"
            raise ConfigError("active_stream", self.active_stream, legal)
        if self.layer_embed_dim and not self.num_streams:
            raise ConfigError("layer_embed_dim", self.layer_embed_dim, "must be 0 without num_streams")
        if self.layer_embed_vocab is not None and not self.layer_embed_dim:
            raise ConfigError("layer_embed_vocab", self.layer_embed_vocab, "must be null without layer_embed_dim")


@dataclass(frozen=True)
class OwnMLP(Schema):
    """The MLP of one layer: its width where that is not the model's, and the share of its gates that are cut off."""

    mlp_dim: int | None = integer(None, 0, 262144, optional=True)
    mlp_sparsity: float = real(0.0, 0.0, 0.999999)


@dataclass(frozen=True)
class LayerConfig:
    """One layer: a mixer's registered name and its config; the width of its MLP where that is not the model's, and the
    share of the MLP's gates that are cut off (`kvlab.models.mlp.gaussian_top_k`; 0: none); or the experts `mlp` that
    stand in the MLP's place."""

    mixer: str
    config: MixerConfig
    mlp_dim: int | None = None
    mlp_sparsity: float = 0.0
    mlp: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not 0 <= self.mlp_sparsity < 1:
            raise ConfigError("mlp_sparsity", self.mlp_sparsity, "must be in [0, 1)")
        if self.mlp is not None and self.mlp_dim is not None:
            raise ConfigError("mlp_dim", self.mlp_dim, "must be null beside mlp, whose experts stand in its place")
        if self.mlp is not None and self.mlp_sparsity:
            raise ConfigError("mlp_sparsity", self.mlp_sparsity, "must be 0 beside mlp: experts have no such gates")

    def width_of_mlp(self, model: ModelConfig) -> int:
        """Hidden units of the layer's MLP; 0: it has none."""
        return model.mlp_dim if self.mlp_dim is None else self.mlp_dim

    def as_dict(self, plain: Callable[[object], Any] = to_plain) -> dict[str, Any]:
        """{type: attention, ...}, with what differs from the model's MLP where anything does; `plain` makes it of each
        config."""
        own = {"mlp_dim": self.mlp_dim, "mlp_sparsity": self.mlp_sparsity or None}
        own |= {"mlp": None if self.mlp is None else plain(self.mlp)}
        return {"type": self.mixer, **plain(self.config), **{name: it for name, it in own.items() if it is not None}}
