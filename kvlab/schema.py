"""Whatever comes from outside is checked by pydantic here, and every error is a sentence: field, value, what is legal.

Config sections are frozen dataclasses derived from `Schema`; their fields are made by `integer`, `real`, `choice` and
so on, which put pydantic's types in the place of plain annotations. Every error is a `ConfigError`, raised before
anything is compiled or written. The same checks run when a config is built by hand in a notebook. The legal range in
a sentence is read from the JSON schema that editors complete YAML with, so both say the same.
"""

import abc
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    AllowInfNan,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

MAX_SHOWN = 200
"""Characters of a value that a message shows."""


def shown(value: object) -> str:
    """A value as a message shows it: its repr, cut where it is long."""
    words = repr(value)
    return words if len(words) <= MAX_SHOWN else f"{words[:MAX_SHOWN]}..."


class ConfigError(ValueError):
    """A wrong value in a configuration: names the field, the value and what would be legal."""

    def __init__(self, name: str, value: object, legal: str):
        super().__init__(f"{name:.200} = {shown(value)}: {legal:.1500}")
        self.name, self.value, self.legal = name, value, legal

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.value, self.legal)

    def under(self, prefix: str) -> "ConfigError":
        """The same error seen from the parent section `prefix`."""
        return ConfigError(".".join(filter(None, (prefix, self.name))), self.value, self.legal)


def nearest(name: str, legal: Iterable[str]) -> str:
    """The sentence that answers an unknown name: the closest legal ones first, then all of them."""
    names = sorted(set(legal))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}legal: {', '.join(names)}"


# Types. A message reads the range from their JSON schema; a description there takes its place.


def integer_type(low: int, high: int) -> Any:
    """An integer in [low, high]."""
    return Annotated[int, Strict(), Field(ge=low, le=high)]


def real_type(low: float, high: float, *, open_low: bool = False) -> Any:
    """A finite number in [low, high], or (low, high] with `open_low`."""
    bounds = Field(gt=low, le=high) if open_low else Field(ge=low, le=high)
    return Annotated[float, Strict(), AllowInfNan(False), bounds]


def text_type(legal: str | None = None) -> Any:
    """A non-empty string; `legal` says in an error what it must be."""
    return Annotated[str, Strict(), Field(min_length=1, description=legal)]


def list_type(item: Any, min_len: int = 0) -> Any:
    """A list of `item`, kept as a tuple."""
    return Annotated[tuple[item, ...], Field(min_length=min_len)]


# Fields of sections.


def _field(default: object, kind: Any, optional: bool = False) -> Any:
    return field(default=default, metadata={"type": kind | None if optional else kind})


def integer(default: int | None, low: int = 1, high: int = 2**31 - 1, *, optional: bool = False) -> Any:
    """An integer field in [low, high]; `optional` also allows null."""
    return _field(default, integer_type(low, high), optional)


def real(default: float | None, low: float, high: float, *, open_low: bool = False, optional: bool = False) -> Any:
    """A finite number in [low, high], or (low, high] with `open_low`."""
    return _field(None if default is None else float(default), real_type(low, high, open_low=open_low), optional)


def flag(default: bool) -> Any:
    """true or false."""
    return _field(default, Annotated[bool, Strict()])


def choice(default: str, options: Iterable[str], *, auto: Callable[[], str] | None = None) -> Any:
    """One of the named options. With `auto` also that word, which becomes the option that is returned by it."""
    names = tuple(options)
    kind: Any = Literal[names]
    if auto is not None:
        chosen = BeforeValidator(lambda value: auto() if value == "auto" else value)
        kind = Annotated[kind, chosen, WithJsonSchema({"enum": [*names, "auto"], "type": "string"})]
    return _field(default, kind)


def text(default: str | None, *, legal: str | None = None, optional: bool = False) -> Any:
    """A non-empty string; `legal` says in an error what it must be."""
    return _field(default, text_type(legal), optional)


def reals(default: Iterable[float], low: float, high: float, *, open_low: bool = False, min_len: int = 0) -> Any:
    """A list of finite numbers, each in the range."""
    return _field(tuple(map(float, default)), list_type(real_type(low, high, open_low=open_low), min_len))


def integers(default: Iterable[int], low: int, high: int = 2**31 - 1, *, min_len: int = 0) -> Any:
    """A list of integers, each in [low, high]."""
    return _field(tuple(default), list_type(integer_type(low, high), min_len))


def integer_lists(default: Iterable[Iterable[int]], low: int, high: int = 2**31 - 1) -> Any:
    """A list of lists of integers, each in [low, high]."""
    return _field(tuple(map(tuple, default)), list_type(list_type(integer_type(low, high))))


def texts(default: Iterable[str], *, min_len: int = 0) -> Any:
    """A list of non-empty strings."""
    return _field(tuple(default), list_type(text_type(), min_len))


def added(declared: Any, *, aside: bool = False) -> Any:
    """The same field, marked as younger than runs that are kept: `identity` leaves it out at its default, so that those
    runs keep their hashes. Its default must mean what they did. One `aside` changes no result, and is always left
    out."""
    assert declared.default is not dataclasses.MISSING
    return field(default=declared.default, metadata={**declared.metadata, "added": True, "aside": aside})


def with_added(kind: type["Schema"], values: Mapping[str, Any]) -> dict[str, Any]:
    """A section as plain data that may be older than some of its fields: those that were `added` since stand there at
    their defaults."""
    complete = dict(values)
    for item in dataclasses.fields(kind):
        if "added" in item.metadata and item.name not in values:
            complete[item.name] = to_plain(item.default)
        inner = complete.get(item.name)
        if isinstance(inner, Mapping) and (chosen := item.metadata.get("registry", {}).get(inner.get("type"))):
            complete[item.name] = with_added(chosen, inner)
    return complete


def plain(default: int | float | str | None, legal: str) -> Any:
    """A number, a string or null; the section itself checks it. `legal` says in an error what it must be."""
    kinds = Annotated[int, Strict()] | Annotated[float, Strict()] | Annotated[str, Strict()]
    return _field(default, Annotated[kinds, Field(union_mode="left_to_right", description=legal)], True)


class _Checked(abc.ABCMeta):
    """Making a section by hand validates its arguments as building it from a mapping does."""

    def __call__[T](cls: type[T], *args: object, **kwargs: object) -> T:
        names = [item.name for item in dataclasses.fields(cast(Any, cls)) if item.init]
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or given.keys() & kwargs.keys():
            raise TypeError(f"{cls.__name__} takes each of its fields once: {', '.join(names)}")
        return validated(cls, given | kwargs)


@dataclass(frozen=True)
class Schema(metaclass=_Checked):
    """Base of every config section: a frozen dataclass that pydantic validates whenever one is made."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", validate_default=True)

    def __init_subclass__(cls) -> None:
        for name, declared in list(vars(cls).items()):
            if isinstance(declared, dataclasses.Field) and "type" in declared.metadata:
                cls.__annotations__[name] = declared.metadata["type"]

    @model_validator(mode="after")
    def _cross_checked(self) -> Self:
        self.cross_check()
        return self

    def cross_check(self) -> None:
        """Rules between fields of this section; raises `ConfigError`."""

    @classmethod
    def defaults(cls) -> dict[str, object]:
        """The default of every field that has one, as plain YAML-able data."""
        found: dict[str, object] = {}
        for item in dataclasses.fields(cls):
            if item.default_factory is not dataclasses.MISSING:
                found[item.name] = item.default_factory()
            elif item.default is not dataclasses.MISSING:
                found[item.name] = item.default
        return to_plain(found)

    @classmethod
    def build(cls, values: object, path: str = "") -> Self:
        """The section from a mapping (YAML, JSON or Hydra); `path` is its place in the whole config.

        Raises `ConfigError` for an unknown, missing, ill-typed or out-of-range field, under its full name.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(path or cls.__name__, values, f"must be {legal_of(json_schema(cls))}")
        return validated(cls, dict(values), path)


def validated[T](kind: type[T], values: object, path: str = "") -> T:
    """`values` as the type `kind`, whatever pydantic can check. Raises the first `ConfigError`, named under `path`."""
    try:
        return adapter(kind).validate_python(values)
    except ValidationError as error:
        raise problems(error, kind, values, path)[0] from None


def check_ends(field: str, ends: Sequence[float], *, below: float | None = None) -> None:
    """Raises ConfigError unless these are the two ends of a range, in order, and the upper one `below` a number."""
    if len(ends) != 2 or ends[0] > ends[1] or (below is not None and ends[1] >= below):
        limit = "" if below is None else f" < {below:g}"
        raise ConfigError(field, list(ends), f"must be two numbers [low, high] with low <= high{limit}")


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Pydantic's validator of a type, made when it is first needed."""
    return TypeAdapter(kind)


def json_schema(kind: Any) -> dict[str, Any]:
    """The JSON schema of a type, as editors and messages read it."""
    return adapter(kind).json_schema()


UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden", "invalid_key")
MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")


def problems(error: ValidationError, kind: Any, values: object, path: str = "") -> list[ConfigError]:
    """Everything that pydantic found wrong with `values`, as sentences: unknown fields first, then missing ones."""
    found = error.errors(include_url=False)
    found.sort(key=lambda item: 0 if item["type"] in UNKNOWN else 1 if item["type"] in MISSING else 2)
    schema = json_schema(kind)
    return [_sentence(item, schema, values).under(path) for item in found]


def _sentence(item: Any, schema: dict[str, Any], values: object) -> ConfigError:
    """One of pydantic's errors. A list is answered as a whole, a union too."""
    reason = item.get("ctx", {}).get("error")
    place = [str(part) for part in item["loc"]]
    if isinstance(reason, ConfigError):
        return reason.under(".".join(place))
    if item["type"] in UNKNOWN:
        parent, _ = _walk(schema, schema, values, item["loc"][:-1])[1:]
        legal = f"no such field; {nearest(place[-1], parent.get('properties', {}))}"
        return ConfigError(".".join(place), item["input"], legal)
    if item["type"] in MISSING:
        return ConfigError(".".join(place), None, "is missing and has no default")
    names, node, value = _walk(schema, schema, values, item["loc"])
    return ConfigError(".".join(names), value, str(reason) if reason else f"must be {legal_of(node, schema)}")


def _walk(
    schema: Mapping[str, Any], node: dict[str, Any], value: Any, place: Sequence[str | int]
) -> tuple[list[str], dict[str, Any], Any]:
    """Down from a node of the schema to `place`, or as far as there are fields: names, node and value there."""
    names: list[str] = []
    for part in place:
        inner = _inner(node, schema, part)
        if inner is None or not isinstance(value, Mapping):
            break
        names.append(str(part))
        node, value = inner, value.get(part)
    return names, _resolved(node, schema), value


def _inner(node: dict[str, Any], schema: Mapping[str, Any], name: str | int) -> dict[str, Any] | None:
    """The node of a mapping's field, or of its values where any name is legal; None where there are no fields."""
    node = _resolved(node, schema)
    for option in (node, *(_resolved(option, schema) for option in node.get("anyOf", ()))):
        inner = option.get("properties", {}).get(name, option.get("additionalProperties"))
        if isinstance(inner, dict):
            return inner
    return None


def _resolved(node: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node


def legal_of(node: dict[str, Any], schema: Mapping[str, Any] | None = None) -> str:
    """What a node of a JSON schema (by default the whole) allows, in words: "an integer in [1, 4096] or null"."""
    schema = node if schema is None else schema
    node = _resolved(node, schema)
    if "properties" in node:
        return f"a mapping of its fields: {', '.join(node['properties'])}"
    if "description" in node:
        return node["description"]
    if "anyOf" in node:
        return " or ".join(legal_of(option, schema) for option in node["anyOf"])
    if "enum" in node or "const" in node:
        return f"one of {', '.join(map(str, node.get('enum', [node.get('const')])))}"
    kind = node.get("type")
    if kind in ("integer", "number"):
        return _range(node)
    if kind == "array":
        least = f" of at least {node['minItems']}" if node.get("minItems") else ""
        return f"a list{least}, each {legal_of(node.get('items', {}), schema)}"
    words = {"boolean": "true or false", "null": "null", "object": "a mapping"}
    return words.get(str(kind), "a non-empty string" if node.get("minLength") else "a string")


def _range(node: Mapping[str, Any]) -> str:
    whole = node["type"] == "integer"
    low = node.get("minimum", node.get("exclusiveMinimum"))
    high = node.get("maximum", node.get("exclusiveMaximum"))
    noun = "an integer" if whole else "a finite number"
    if low is None or high is None:
        return noun if low is None else f"{noun} of at least {low}"
    ends = (f"{low}", f"{high}") if whole else (f"{low:g}", f"{high:g}")
    return f"{noun} in {'(' if 'exclusiveMinimum' in node else '['}{', '.join(ends)}]"


def to_plain(value: object) -> Any:
    """Nested dataclasses, tuples and mappings as dicts and lists: what YAML and JSON can hold."""
    return _plain(value, lambda section: dataclasses.fields(section))


def identity(value: object) -> Any:
    """As `to_plain`, without the fields that are `added` and at their default, or `aside`: what hashes are made of."""
    return _plain(value, _identifying)


def _identifying(section: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a section that are part of an identity."""
    fields = [item for item in dataclasses.fields(section) if not item.metadata.get("aside")]
    return [item for item in fields if "added" not in item.metadata or getattr(section, item.name) != item.default]


def _plain(value: object, fields_of: Callable[[Any], Iterable[dataclasses.Field[Any]]]) -> Any:
    if isinstance(value, Schema) and (made := getattr(value, "plain", None)) is not None:
        names = {"type", *(item.name for item in fields_of(value))}  # a choice of a registry: its type comes first
        return _plain({name: inner for name, inner in made().items() if name in names}, fields_of)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name), fields_of) for item in fields_of(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, fields_of) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, fields_of) for inner in value]
    return value
