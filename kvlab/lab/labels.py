"""How people call runs and points among others of their kind: by what their memory does, always, and by the fields that
tell them apart."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from kvlab.config import label_of, trained_words
from kvlab.memory.naming import FULL, choice_of, words_of

APART = ("seed", "results_dir", "hardware", "equal_budget")
"""Of a configuration what the runs of a point need not have in common."""
METHODS = ("compression", "selection")
"""Choices of a memory that have fields of their own, which are compared among runs of the same choice."""

MAX_VALUE = 80
"""Characters of a value in a label."""

type Plain = Mapping[str, Any]


def flatten(value: Any, path: str) -> dict[str, Any]:
    """Nested mappings as dotted names; lists stay whole."""
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat |= flatten(entry, f"{path}.{name}")
    return flat


def in_short(value: Any) -> str:
    """A value as a label shows it."""
    text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


def without_seed(config: Plain) -> dict[str, Any]:
    """What the seeds of a point have in common: neither their number, nor where and in whose company they ran, nor what
    was asked for and what that would be solved for."""
    common = {name: value for name, value in config.items() if name not in APART}
    for section, aside in (("mixer", "knob"), ("train", "vmap")):
        if section in config:
            common[section] = {name: value for name, value in config[section].items() if name != aside}
    return common


def point_labels(configs: Sequence[Plain]) -> list[str]:
    """Names of points by their configurations: "mha snapkv 0.5 int8 page_size=8"."""
    heads = [
        " ".join([config["mixer"]["name"], *trained_words(config), *words_of(_memory(config))]) for config in configs
    ]
    return _told_apart(heads, [_kind(config) for config in configs], [_untold(config) for config in configs])


def run_labels(configs: Sequence[Plain]) -> list[str]:
    """Names of runs by their configurations, `Config.label` first: "mha/text/seed0 snapkv 0.5 int8 page_size=8"."""
    heads = [label_of(config) for config in configs]
    return _told_apart(heads, [_kind(config) for config in configs], [_untold(config) for config in configs])


def deployment_labels(labels: Sequence[str], memories: Sequence[Plain]) -> list[str]:
    """Names of memories that `kvlab capacity` compares, the fields behind their labels that tell those of one label
    apart: "paged policy=s3fifo"."""
    return _told_apart(labels, labels, [flatten({"memory": _untold_memory(memory)}, "") for memory in memories])


def differing_fields(kinds: Sequence[Hashable], configs: Sequence[Plain]) -> list[dict[str, Any]]:
    """Of each configuration the fields in which those of its kind differ, by the shortest names that tell them."""
    fields = [flatten(config, "") for config in configs]
    return _telling(kinds, fields)


def _told_apart(heads: Sequence[str], kinds: Sequence[Hashable], fields: Sequence[Plain]) -> list[str]:
    """Heads, and of each kind the flat fields in which its members differ."""
    found = zip(heads, _telling(kinds, fields), strict=True)
    return [" ".join([head, *(f"{name}={in_short(value)}" for name, value in told.items())]) for head, told in found]


def _telling(kinds: Sequence[Hashable], fields: Sequence[Plain]) -> list[dict[str, Any]]:
    """What tells each from the others of its kind."""
    members: dict[Hashable, list[Plain]] = defaultdict(list)
    for kind, mine in zip(kinds, fields, strict=True):
        members[kind].append(mine)
    telling = {kind: _Telling(alike) for kind, alike in members.items()}
    return [telling[kind].details(mine) for kind, mine in zip(kinds, fields, strict=True)]


def _kind(config: Plain) -> tuple[str, str]:
    return config["mixer"]["name"], config["task"]["type"]


def _memory(config: Plain) -> Plain:
    return config.get("memory") or {}


def _untold(config: Plain) -> dict[str, Any]:
    """The flat fields of a point that no head says."""
    told = {"memory": _untold_memory(_memory(config))}
    if trained_on := config.get("trained_on"):
        task = {name: value for name, value in trained_on["task"].items() if name != "type"}
        told["trained_on"] = {trained_on["task"]["type"]: task}
    return flatten(without_seed(config) | told, "")


def _untold_memory(memory: Plain) -> dict[str, Any]:
    """The fields of a memory that no words say. Those of a method have the method's name in theirs."""
    left = {name: value for name, value in memory.items() if name not in (*FULL, "budget")}
    for kind in METHODS:
        if isinstance(section := memory.get(kind), Mapping):
            fields = {name: value for name, value in section.items() if name != "type"}
            left[kind] = {str(choice_of(section)): fields}
    return left


class _Telling:
    """The fields in which some flat configurations differ."""

    def __init__(self, members: Sequence[Plain]):
        self.names = {name for fields in members for name in fields}
        told: dict[str, set[str]] = defaultdict(set)
        for fields in members:
            for name in self.names:
                if name in fields or not _method_of(name):
                    told[name].add(str(fields.get(name)))
        self.differing = sorted(name for name, values in told.items() if len(values) > 1)

    def details(self, fields: Plain) -> dict[str, Any]:
        """What differs of one of them, by short names."""
        mine = [name for name in self.differing if name in fields or not _method_of(name)]
        return {self._short(name): fields.get(name) for name in mine}

    def _short(self, name: str) -> str:
        """The last words of a dotted name, as many as tell it from the others; a section stands for its `name`. The
        fields of another method need not be told apart: each head names its own."""
        method = _method_of(name)
        others = [other for other in self.names if not method or _method_of(other)[:1] != method[:1]]
        others += [other for other in self.names if method and _method_of(other) == method]
        others = [other for other in others if _method_of(other)[:1] != ["trained_on"] or method == _method_of(other)]
        endings = [other.removeprefix(".").split(".") for other in others]
        words = name.removeprefix(".").split(".")
        for count in range(1, len(words)):
            if sum(other[-count:] == words[-count:] for other in endings) == 1:
                return ".".join(words[-count:]).removesuffix(".name")
        return ".".join(words).removesuffix(".name")


def _method_of(name: str) -> list[str]:
    """The kind of choice and the choice that a flat name is a field of; nothing for any other field. The task of a
    training, beside the one that is scored, is such a choice."""
    _, section, *words = name.split(".")
    if section == "trained_on":
        return [section, *words[:1]]
    return words[:2] if section == "memory" and len(words) > 2 and words[0] in METHODS else []
