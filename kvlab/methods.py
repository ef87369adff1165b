"""Fields of a method beside a sweep over methods: each takes those that it has."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvlab.compression import COMPRESSIONS
from kvlab.schema import ConfigError, Schema, nearest
from kvlab.selection import SELECTIONS

METHODS: dict[str, Mapping[str, type[Schema]]] = {"compression": COMPRESSIONS, "selection": SELECTIONS}
"""Groups whose choices have fields of their own, in a section of the memory of the group's name."""


def fields_for_some(words: Sequence[str], swept: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Overrides that give a field of a method of which some that are `swept`, by group, lack it, and what Hydra takes
    instead: it adds the field to all of them, and `fitting` removes it where it does not belong. Raises ConfigError for
    a field that none of them has."""
    found: dict[str, str] = {}
    for group, names in swept.items():
        fields = [_fields(METHODS[group].get(name)) for name in names]
        for word in words:
            key, equals, value = word.lstrip("+").partition("=")
            if not equals or not key.startswith(f"memory.{group}."):
                continue
            field = key.split(".")[2]
            if not any(field in own for own in fields):
                legal = nearest(field, {name for own in fields for name in own})
                raise ConfigError(key, value, f"no field of {', '.join(names)}; {legal}")
            if not all(field in own for own in fields):
                found[word] = f"++{word.lstrip('+')}"
    return found


def for_their_methods(jobs: Sequence[Sequence[str]], groups: Sequence[str]) -> list[list[str]]:
    """The words of a sweep's jobs in which a method is a word, without the fields that a job's own method lacks and
    another's has. Raises ConfigError for a field that none of them has."""
    swept = {group: [_chosen(job, group) for job in jobs] for group in groups}
    for job in jobs:
        fields_for_some(job, {group: names for group, names in swept.items() if any(names)})

    def fits(word: str, job: Sequence[str]) -> bool:
        parts = word.partition("=")[0].split(".")
        if len(parts) < 3 or parts[1] not in groups or not any(swept[parts[1]]):
            return True
        return parts[2] in _fields(METHODS[parts[1]].get(_chosen(job, parts[1])))

    return [[word for word in job if fits(word, job)] for job in jobs]


def _chosen(job: Sequence[str], group: str) -> str:
    """The method that a job names by a word alone; empty: none, or a section."""
    chosen = [word.partition("=")[2] for word in job if word.startswith(f"memory.{group}=")]
    return chosen[-1] if chosen and chosen[-1] in METHODS[group] else ""


def fitting(values: Mapping[str, Any], for_some: Collection[str] | None = None) -> dict[str, Any]:
    """Composed values without the fields that their methods lack: without those of `for_some`, by dotted names, or
    without any (null)."""
    memory = dict(values["memory"])
    for group, registry in METHODS.items():
        section = memory.get(group)
        if not isinstance(section, Mapping) or section.get("type", None) not in (None, *registry):
            continue
        own = _fields(registry.get(section.get("type", "")))
        foreign = [name for name in section if name not in own]
        if for_some is not None:
            foreign = [name for name in foreign if f"memory.{group}.{name}" in for_some]
        memory[group] = {name: value for name, value in section.items() if name not in foreign} or None
    return {**values, "memory": memory}


def _fields(method: type[Schema] | None) -> set[str]:
    """What a method's section may have; nothing where there is no method."""
    return set() if method is None else {"type", *method.defaults()}
