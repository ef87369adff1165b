"""The fields of a config.json, and those that every family has. Null counts as absent; other fields are ignored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, AllowInfNan, ConfigDict, Field, Strict, ValidationError

from kvlab.schema import Schema, adapter, flag, integer_type, problems, real_type, shown

MAX_LAYERS = 10_000
SIZE: Any = Annotated[integer_type(1, 2**31 - 1), Field(description="a positive integer")]
COUNT: Any = integer_type(0, 2**31 - 1)
POSITIVE: Any = Annotated[
    float, Strict(), AllowInfNan(False), Field(gt=0), Field(description="a finite positive number")
]
REQUIRED: Any = object()


def value_of(kind: Any, default: Any = REQUIRED) -> Any:
    """A field of that type."""
    return field(metadata={"type": kind}) if default is REQUIRED else field(default=default, metadata={"type": kind})


def size(default: int | None = REQUIRED, *, null: bool = False) -> Any:
    """A positive integer; with None as its default also absent, and with `null` also null (`Part.null_counts`)."""
    return value_of(SIZE | None if default is None or null else SIZE, default)


def positive(default: float | None = REQUIRED) -> Any:
    """A finite positive number; with None as its default also absent."""
    return value_of(POSITIVE | None if default is None else POSITIVE, default)


def only(legal: Any) -> Any:
    """An option of which only this value is built: its default."""

    def check(value: Any) -> Any:
        if (tuple(value) if isinstance(value, list) else value) != legal:
            raise ValueError(f"only {legal!r} is supported")
        return legal

    return value_of(Annotated[Any, AfterValidator(check)], legal)


@dataclass(frozen=True, kw_only=True)
class Part(Schema):
    """A JSON object of a config.json."""

    null_counts: ClassVar[tuple[str, ...]] = ()
    """Fields of which null says something else than nothing at all."""
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", validate_default=True)


FLOATS_ALONE: Any = only(None)
"""`quantization_config` where nothing but floats is read."""


@dataclass(frozen=True, kw_only=True)
class ConfigFile(Part):
    """What every family says."""

    vocab_size: int = size()
    hidden_size: int = size()
    num_hidden_layers: int = value_of(integer_type(1, MAX_LAYERS), REQUIRED)
    tie_word_embeddings: bool = flag(False)
    hidden_act: str = only("silu")
    quantization_config: Part | None = FLOATS_ALONE
    num_experts: int = only(0)
    num_local_experts: int = only(0)
    n_routed_experts: int = only(0)


@dataclass(frozen=True, kw_only=True)
class DefaultRope(Part):
    """The rotary embedding as it is, of that share of each head."""

    rope_theta: float = value_of(real_type(1.0, 1e15), 10_000.0)
    partial_rotary_factor: float = value_of(real_type(0.0, 1.0, open_low=True), 1.0)

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


@dataclass(frozen=True, kw_only=True)
class YarnRope(DefaultRope):
    """YaRN (arXiv 2309.00071): low frequencies divided, and what is turned made longer by `attention_factor`; absent,
    it comes of the factor, and of `mscale` over `mscale_all_dim` where both are there. Without `truncate` the pairs
    between which it blends are not rounded."""

    factor: float = value_of(real_type(1.0, 1e9))
    original_max_position_embeddings: float = positive()
    attention_factor: float | None = positive(None)
    beta_fast: float = positive(32.0)
    beta_slow: float = positive(1.0)
    mscale: float | None = value_of(real_type(0.0, 1e3) | None, None)
    mscale_all_dim: float | None = value_of(real_type(0.0, 1e3) | None, None)
    truncate: bool = flag(True)

    @property
    def scaling(self) -> tuple[float, ...]:
        longer = self.attention_factor
        if longer is None and self.mscale and self.mscale_all_dim:
            longer = lengthened(self.factor, self.mscale) / lengthened(self.factor, self.mscale_all_dim)
        longer = lengthened(self.factor, 1.0) if longer is None else longer
        between = () if self.truncate else (1.0,)
        return (self.factor, self.beta_slow, self.beta_fast, self.original_max_position_embeddings, longer, *between)

    @property
    def of_scores(self) -> float:
        """What latent attention multiplies its scores with beside (DeepSeek)."""
        return lengthened(self.factor, self.mscale_all_dim or 0.0) ** 2


def lengthened(factor: float, mscale: float) -> float:
    """By how much YaRN lengthens what is turned, for a context `factor` times as long."""
    return 1 + 0.1 * mscale * math.log(factor)


ROPES: dict[str, type[DefaultRope]] = {
    "default": DefaultRope,
    "linear": LinearRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
}


def read_part[T: Part](kind: type[T], values: Mapping[str, Any], found: list[str]) -> T | None:
    """The values as that part; or None, and everything that is wrong with them added to `found`."""
    given = {name: value for name, value in values.items() if value is not None or name in kind.null_counts}
    try:
        return adapter(kind).validate_python(given)
    except ValidationError as error:
        found += dict.fromkeys(f"config.json: {problem}" for problem in problems(error, kind, given))
        return None


TAGGED = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def untagged(value: Any) -> Any:
    """A value of a config.json with the numbers that JSON lacks: transformers 5 saves {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [untagged(each) for each in value]
    if isinstance(value, dict) and value.keys() == {"__float__"} and isinstance(value["__float__"], str):
        return TAGGED.get(value["__float__"], value)
    return {name: untagged(each) for name, each in value.items()} if isinstance(value, dict) else value


def read_context(values: Mapping[str, Any], name: str | None, found: list[str]) -> int | None:
    """The context that a field of that name gives; None where there is none."""
    value = values.get(name) if name else None
    if value is None or (type(value) is int and 0 < value < 2**31):
        return value
    found.append(f"config.json: {name} = {shown(value)}: must be a positive integer")
    return None


def older_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 reads in place of `rope_parameters`: base and share at the top, and `rope_scaling`. It knows
    one embedding for all layers, of Gemma 3 the one of full attention."""
    rope = dict(values.get("rope_parameters") or {})
    older: dict[str, Any] = {}
    if "sliding_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    names = {"rope_theta", "partial_rotary_factor"}
    older |= {name: rope[name] for name in names if rope.get(name) is not None}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in rope.items() if name not in names}
    return dict(sorted(older.items()))


def read_rope(values: Mapping[str, Any], found: list[str], fraction: float | None = None) -> DefaultRope | None:
    """Base and scaling, in the old spelling (rope_theta, rope_scaling) or the new (rope_parameters). `fraction` is the
    share of a head that is turned where the file names none; None: another than the whole is refused."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value and not isinstance(value, Mapping):
            found.append(f"config.json: {name} = {shown(value)}: must be an object")
            return None
    if new and old and any(new.get(name, value) != value for name, value in old.items()):
        found.append("config.json: rope_parameters and rope_scaling: must not contradict each other")
    given = {**(new or {}), **(old or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPES:
        found.append(f"config.json: rope_type = {shown(kind)}: must be one of {', '.join(ROPES)}")
        return None
    older = {"rope_theta": values.get("rope_theta"), "partial_rotary_factor": values.get("partial_rotary_factor")}
    given = {"partial_rotary_factor": fraction} | {k: v for k, v in {**older, **given}.items() if v is not None}
    rope = read_part(ROPES[kind], given, found)
    if rope is not None and fraction is None and rope.partial_rotary_factor != 1:
        found.append(f"config.json: partial_rotary_factor = {rope.partial_rotary_factor}: only 1.0 is supported")
    return rope
