"""What is chosen by name: ours, and what packages outside bring by their entry points.

    [project.entry-points."kvlab.mixers"]
    average = "my_package.average:Average"

Names are known without importing anything; what a name stands for is imported when it is asked for.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Annotated, Any, cast

from pydantic import BeforeValidator

from kvlab import outside
from kvlab.schema import ConfigError, Schema, json_schema, nearest


class Registry[T](MutableMapping[str, T]):
    """Things by name: `ours`, and those that packages outside name in the `group` of entry points.

    An entry point names a class derived from `kind`, or with `is_made` an object of that kind. `called` is the
    attribute that must be its name, where there is one; `made` makes of it what is kept.

    Iterating knows every name and imports nothing. `registry[name]` raises KeyError for a name that nobody has, and
    ConfigError for one that two have, that cannot be imported, or that is not of the kind. `get` has its default for
    all of these.
    """

    def __init__(
        self,
        group: str,
        kind: type,
        ours: Mapping[str, T],
        *,
        is_made: bool = False,
        called: str = "",
        made: Callable[[Any], T] | None = None,
        field: str = "type",
    ):
        self.group, self.field = group, field
        self._kind, self._is_made, self._called, self._made = kind, is_made, called, made
        self._ours, self._had = dict(ours), dict[EntryPoint, T | str]()

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self._ours, *(entry.name for entry in outside.entry_points(self.group))])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._ours or any(entry.name == name for entry in outside.entry_points(self.group))

    def __getitem__(self, name: str) -> T:
        found = self._entries(name)
        if not found:
            return self._ours[name]
        owners = [*(["kvlab"] if name in self._ours else []), *map(outside.package_of, found)]
        if len(owners) > 1:
            legal = f"is a name of {' and of '.join(owners)} ({self.group}); uninstall one of them, or rename its own"
            raise ConfigError(self.field, name, legal)
        (entry,) = found
        if entry not in self._had:
            self._had[entry] = self._imported(entry)
        had = self._had[entry]
        if isinstance(had, str):
            raise ConfigError(self.field, name, had)
        return had

    def __setitem__(self, name: str, value: T) -> None:
        self._ours[name] = value

    def __delitem__(self, name: str) -> None:
        del self._ours[name]

    def get(self, name: Any, default: Any = None) -> Any:
        """What a name stands for, or the default where that cannot be had."""
        try:
            return self[name]
        except (KeyError, ConfigError):
            return default

    def package(self, name: str) -> str | None:
        """Name and version of the package outside that brings a name; None: it is ours, or nobody's."""
        found = self._entries(name)
        return outside.package_of(found[0]) if found else None

    def usable(self) -> dict[str, T]:
        """All that can be had, imported. What cannot be stops nobody who does not ask for it."""
        found = dict[str, T]()
        for name in self:
            with suppress(ConfigError):
                found[name] = self[name]
        return found

    def _entries(self, name: str) -> list[EntryPoint]:
        return [entry for entry in outside.entry_points(self.group) if entry.name == name]

    def _imported(self, entry: EntryPoint) -> T | str:
        """What an entry point names, or in a sentence why that cannot be had."""
        said = f"{outside.package_of(entry)} ({self.group}: {entry.name} = {entry.value})"
        try:
            found: Any = entry.load()
        except Exception as error:  # whatever a module does when it is imported
            return f"cannot be imported from {said}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        is_legal = isinstance(found, self._kind) if self._is_made else _is_derived(found, self._kind)
        if not is_legal:
            noun = f"is no {self._kind.__name__}" if self._is_made else f"is no class of {self._kind.__name__}"
            return f"{noun}: what {said} names is {found!r:.80}"
        own = getattr(found, self._called, None) if self._called else entry.name
        if own != entry.name:
            return f"must be called as its `{self._called}`, {own!r:.80}, in {said}"
        return found if self._made is None else self._made(found)


def _is_derived(found: object, kind: type) -> bool:
    return isinstance(found, type) and issubclass(found, kind)


def registered(registry: Registry[Any], noun: str, nothing: Sequence[str] = ("none",)) -> Any:
    """A section {type: name, ...} whose `type` is one of a registry's names, such a name alone, or null, which a word
    of `nothing` says as well."""

    def chosen(value: object) -> object:
        if value is None or value in nothing or isinstance(value, Schema):
            return None if value in nothing else value
        values: Any = {"type": value} if isinstance(value, str) else value
        if not isinstance(values, Mapping):
            raise ConfigError("", value, f"must be null, or a mapping with the type of {noun}")
        fields = dict(cast(Mapping[str, object], values))
        name = fields.pop("type", None)
        if not isinstance(name, str) or name not in registry:
            raise ConfigError("type", name, nearest(str(name), registry))
        return registry[name].build(fields)

    def schema() -> dict[str, Any]:
        options = []
        for name, kind in registry.usable().items():
            option = json_schema(kind)
            option["properties"] = {"type": {"const": name}} | option["properties"]
            options.append(option | {"required": ["type"]})
        names = {"type": "string", "enum": [*nothing, *registry]}
        return {
            "anyOf": [*options, names, {"type": "null"}],
            "description": f"null, or a mapping with the type of {noun}",
        }

    kind: Any = Annotated[Any, BeforeValidator(chosen), _LazySchema(schema)]
    return field(default=None, metadata={"type": kind, "registry": registry})


@dataclass(frozen=True)
class _LazySchema:
    """A JSON schema that is made when it is asked for: registries may grow after a section was declared."""

    make: Callable[[], dict[str, Any]]

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return self.make()
