"""Configuration fields that know their legal range, and the one builder that turns mappings into frozen dataclasses.

Every error is a `ConfigError`, a sentence of the form "field = value: what is legal", raised before anything is compiled
or written. The same checks run when a config is built by hand in a notebook.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Self, cast


class ConfigError(ValueError):
    """A wrong value in a configuration: names the field, the value and what would be legal."""

    def __init__(self, name: str, value: object, legal: str):
        super().__init__(f"{name} = {value!r}: {legal}")
        self.name, self.value, self.legal = name, value, legal

    def under(self, prefix: str) -> "ConfigError":
        """The same error seen from the parent section `prefix`."""
        return ConfigError(f"{prefix}.{self.name}" if prefix else self.name, self.value, self.legal)


def nearest(name: str, legal: Iterable[str]) -> str:
    """The sentence that answers an unknown name: the closest legal ones first, then all of them."""
    names = sorted(set(legal))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}legal: {', '.join(names)}"


@dataclass(frozen=True)
class Check:
    """Parses one value or raises: `parse` returns the typed value, or None when `value` is illegal."""

    legal: str
    parse: Callable[[object], object | None]
    optional: bool = False

    def __call__(self, name: str, value: object) -> object:
        if value is None and self.optional:
            return None
        parsed = None if value is None else self.parse(value)
        if parsed is None:
            raise ConfigError(name, value, f"must be {self.legal}{' or null' if self.optional else ''}")
        return parsed


def _as_int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _field(default: object, check: Check) -> Any:
    if isinstance(default, list | tuple):
        return field(default_factory=lambda: tuple(default), metadata={"check": check})
    return field(default=default, metadata={"check": check})


def _integer_check(low: int, high: int, optional: bool = False) -> Check:
    def parse(value: object) -> int | None:
        number = _as_int(value)
        return number if number is not None and low <= number <= high else None

    return Check(f"an integer in [{low}, {high}]", parse, optional)


def _real_check(low: float, high: float, *, open_low: bool = False, optional: bool = False) -> Check:
    def parse(value: object) -> float | None:
        number = _as_float(value)
        inside = number is not None and (low < number if open_low else low <= number) and number <= high
        return number if inside else None

    return Check(f"a finite number in {'(' if open_low else '['}{low:g}, {high:g}]", parse, optional)


def integer(default: int | None, low: int = 1, high: int = 2**31 - 1, *, optional: bool = False) -> Any:
    """An integer field in [low, high]; `optional` also allows null."""
    return _field(default, _integer_check(low, high, optional))


def real(default: float | None, low: float, high: float, *, open_low: bool = False, optional: bool = False) -> Any:
    """A finite number in [low, high], or (low, high] with `open_low`."""
    return _field(default, _real_check(low, high, open_low=open_low, optional=optional))


def flag(default: bool) -> Any:
    """true or false."""
    return _field(default, Check("true or false", lambda v: v if isinstance(v, bool) else None))


def choice(default: str, options: Iterable[str], *, auto: Callable[[], str] | None = None) -> Any:
    """One of the named options. With `auto` also that word, which becomes the option that is returned by it."""
    names = tuple(options)
    legal = [*names, *(("auto",) if auto else ())]

    def parse(value: object) -> object | None:
        return auto() if auto and value == "auto" else value if value in names else None

    return _field(default, Check(f"one of {', '.join(legal)}", parse))


def text(default: str | None, *, legal: str = "a non-empty string", optional: bool = False) -> Any:
    """A non-empty string."""
    return _field(default, Check(legal, lambda v: v if isinstance(v, str) and v else None, optional))


def _sequence(item: Check, default: Iterable[object], min_len: int) -> Any:
    def parse(value: object) -> tuple[object, ...] | None:
        if not isinstance(value, list | tuple) or len(value) < min_len:
            return None
        parsed = tuple(item.parse(one) for one in value)
        return None if any(one is None for one in parsed) else parsed

    return _field(
        tuple(default), Check(f"a list{f' of at least {min_len}' if min_len else ''}, each {item.legal}", parse)
    )


def reals(default: Iterable[float], low: float, high: float, *, open_low: bool = False, min_len: int = 0) -> Any:
    """A list of finite numbers, each in the range."""
    return _sequence(_real_check(low, high, open_low=open_low), default, min_len)


def integers(default: Iterable[int], low: int, high: int = 2**31 - 1, *, min_len: int = 0) -> Any:
    """A list of integers, each in [low, high]."""
    return _sequence(_integer_check(low, high), default, min_len)


def texts(default: Iterable[str], *, min_len: int = 0) -> Any:
    """A list of non-empty strings."""
    item = Check("a non-empty string", lambda v: v if isinstance(v, str) and v else None)
    return _sequence(item, default, min_len)


@dataclass(frozen=True)
class Schema:
    """Base of every config section: a frozen dataclass whose fields are checked when it is made."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            check = item.metadata.get("check")
            if check is not None:
                object.__setattr__(self, item.name, check(item.name, getattr(self, item.name)))
        self.cross_check()

    def cross_check(self) -> None:
        """Rules between fields of this section; raises `ConfigError`."""

    @classmethod
    def defaults(cls) -> dict[str, object]:
        """The section's default values as plain YAML-able data."""
        return to_plain(cls())

    @classmethod
    def build(cls, values: object, path: str = "") -> Self:
        """The section from a mapping (YAML, JSON or Hydra); `path` is its place in the whole config.

        Raises `ConfigError` for an unknown, missing, ill-typed or out-of-range field, under its full name.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(path or cls.__name__, values, "must be a mapping of fields")
        given = cast(Mapping[str, object], values)
        legal = {item.name: item for item in dataclasses.fields(cls) if item.init}
        for name in given:
            if name not in legal:
                unknown = ConfigError(str(name), given[name], f"no such field; {nearest(str(name), legal)}")
                raise unknown.under(path)
        for name, item in legal.items():
            if name not in given and item.default is MISSING and item.default_factory is MISSING:
                raise ConfigError(name, None, "is missing and has no default").under(path)
        try:
            checks = {name: legal[name].metadata.get("check") for name in given}
            return cls(**{name: check(name, given[name]) if check else given[name] for name, check in checks.items()})
        except ConfigError as error:
            raise error.under(path) from None


def to_plain(value: object) -> Any:
    """Nested dataclasses, tuples and mappings as dicts and lists: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(one) for one in value]
    return value
