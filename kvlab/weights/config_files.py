"""The config.json of each family of published checkpoints, field by field. Null counts as absent; other fields are
ignored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, AllowInfNan, ConfigDict, Field, Strict, ValidationError

from kvlab.schema import Schema, adapter, flag, integer_type, problems, shown

MAX_LAYERS = 10_000
SIZE: Any = Annotated[integer_type(1, 2**31 - 1), Field(description="a positive integer")]
POSITIVE: Any = Annotated[
    float, Strict(), AllowInfNan(False), Field(gt=0), Field(description="a finite positive number")
]
REQUIRED: Any = object()


def _field(kind: Any, default: Any) -> Any:
    return field(metadata={"type": kind}) if default is REQUIRED else field(default=default, metadata={"type": kind})


def size(default: int | None = REQUIRED) -> Any:
    """A positive integer; with None as its default also absent."""
    return _field(SIZE | None if default is None else SIZE, default)


def positive(default: float = REQUIRED) -> Any:
    """A finite positive number."""
    return _field(POSITIVE, default)


def only(legal: Any) -> Any:
    """An option of which only this value is built: its default."""

    def check(value: Any) -> Any:
        if (tuple(value) if isinstance(value, list) else value) != legal:
            raise ValueError(f"only {legal!r} is supported")
        return legal

    return _field(Annotated[Any, AfterValidator(check)], legal)


@dataclass(frozen=True, kw_only=True)
class Part(Schema):
    """A JSON object of a config.json."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", validate_default=True)


@dataclass(frozen=True, kw_only=True)
class ConfigFile(Part):
    """What every family says."""

    vocab_size: int = size()
    hidden_size: int = size()
    num_hidden_layers: int = _field(integer_type(1, MAX_LAYERS), REQUIRED)
    tie_word_embeddings: bool = flag(False)
    hidden_act: str = only("silu")
    partial_rotary_factor: float = only(1.0)
    quantization_config: None = only(None)
    num_experts: int = only(0)
    num_local_experts: int = only(0)
    n_routed_experts: int = only(0)


@dataclass(frozen=True, kw_only=True)
class DecoderFile(ConfigFile):
    """The family of Llama: attention and gated MLP in every layer."""

    intermediate_size: int = size()
    num_attention_heads: int = size()
    num_key_value_heads: int | None = size(None)
    head_dim: int | None = size(None)
    rms_norm_eps: float = positive(1e-6)
    attention_bias: bool = flag(False)
    mlp_bias: bool = only(False)
    layer_types: list[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class LlamaFile(DecoderFile):
    """Llama."""

    pretraining_tp: int = only(1)


@dataclass(frozen=True, kw_only=True)
class MistralFile(DecoderFile):
    """Mistral. transformers masks keys at distance `sliding_window` and beyond: the current token counts, as here.
    Absent means transformers' default, null none."""

    sliding_window: int | None = _field(SIZE | None, 4096)


@dataclass(frozen=True, kw_only=True)
class Qwen3File(DecoderFile):
    """Qwen 3."""

    head_dim: int = size(128)
    use_sliding_window: bool = only(False)


@dataclass(frozen=True, kw_only=True)
class DeepseekFile(DecoderFile):
    """DeepSeek-V3 (arXiv 2412.19437), of which only dense layers are built: the first `first_k_dense_replace`. Absent
    means transformers' default, of `q_lora_rank` null that queries are not compressed. Its heads share one row."""

    kv_lora_rank: int = size()
    q_lora_rank: int | None = _field(SIZE | None, 1536)
    qk_nope_head_dim: int = size()
    qk_rope_head_dim: int = size()
    v_head_dim: int = size()
    rope_interleave: bool = only(True)
    attention_bias: bool = only(False)
    first_k_dense_replace: int = _field(integer_type(0, 2**31 - 1), 3)
    n_routed_experts: int = _field(integer_type(0, 2**31 - 1), 256)
    num_local_experts: int = _field(integer_type(0, 2**31 - 1), 256)


@dataclass(frozen=True, kw_only=True)
class Mamba2File(ConfigFile):
    """Mamba-2."""

    num_heads: int = size()
    head_dim: int = size()
    expand: int = size(2)
    state_size: int = size(128)
    n_groups: int = size(8)
    conv_kernel: int = size(4)
    chunk_size: int = size(256)
    layer_norm_epsilon: float = positive(1e-5)
    use_bias: bool = only(False)
    use_conv_bias: bool = only(True)
    time_step_limit: tuple[float, float] = only((0.0, math.inf))


@dataclass(frozen=True, kw_only=True)
class DefaultRope(Part):
    """The rotary embedding as it is."""

    rope_theta: float = positive(10_000.0)
    partial_rotary_factor: float = only(1.0)

    @property
    def scaling(self) -> tuple[float, ...]:
        """As `AttentionConfig.rope_scaling` has it."""
        return ()


@dataclass(frozen=True, kw_only=True)
class LinearRope(DefaultRope):
    """Every frequency divided."""

    factor: float = positive()

    @property
    def scaling(self) -> tuple[float, ...]:
        return (self.factor,)


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(DefaultRope):
    """Low frequencies divided, high ones kept."""

    factor: float = positive()
    low_freq_factor: float = positive()
    high_freq_factor: float = positive()
    original_max_position_embeddings: float = positive()

    @property
    def scaling(self) -> tuple[float, ...]:
        return (self.factor, self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings)


ROPES: dict[str, type[DefaultRope]] = {"default": DefaultRope, "linear": LinearRope, "llama3": Llama3Rope}


def read_part[T: Part](kind: type[T], values: Mapping[str, Any], found: list[str]) -> T | None:
    """The values as that part; or None, and everything that is wrong with them added to `found`."""
    keeps_null = ("sliding_window", "q_lora_rank")
    given = {name: value for name, value in values.items() if value is not None or name in keeps_null}
    try:
        return adapter(kind).validate_python(given)
    except ValidationError as error:
        found += [f"config.json: {problem}" for problem in problems(error, kind, given)]
        return None


def read_rope(values: Mapping[str, Any], found: list[str]) -> DefaultRope | None:
    """Base and scaling, in the old spelling (rope_theta, rope_scaling) or the new (rope_parameters)."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if new and old and new != old:
        found.append("config.json: rope_parameters and rope_scaling: must not contradict each other")
    given = new or old or {}
    if not isinstance(given, Mapping):
        found.append(f"config.json: rope_parameters = {shown(given)}: must be an object")
        return None
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPES:
        found.append(f"config.json: rope_type = {shown(kind)}: must be one of {', '.join(ROPES)}")
        return None
    return read_part(ROPES[kind], {"rope_theta": values.get("rope_theta"), **given}, found)
