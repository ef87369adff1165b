"""The command that makes a point again: the choices of its configuration, and every field in which it differs from
them."""

import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import yaml

from kvlab.compose import RUN, composed_of
from kvlab.config import NOT_IDENTITY
from kvlab.lab.labels import flatten
from kvlab.memory.naming import FULL, choice_of
from kvlab.schema import ConfigError
from kvlab.weights.section import DETERMINED

type Flat = dict[str, Any]
"""A configuration by dotted names."""
APART = (*NOT_IDENTITY, "seed", "experiment")
"""What the command says by words of its own, or what changes no result."""


def command(config: Mapping[str, Any], seeds: Sequence[int]) -> str | None:
    """What to type for the seeds of a point, ready for a shell; None where the variant or the task has no choice of its
    name, as in runs that were made in Python."""
    try:
        words = [*words_of(config), f"seed={','.join(map(str, seeds))}"]
    except ConfigError:
        return None
    is_sweep = len(seeds) > 1 or any(word.startswith("experiment=") for word in words)
    return shlex.join(["kvlab", "run", *(["-m"] if is_sweep else []), *words])


def words_of(config: Mapping[str, Any]) -> list[str]:
    """The overrides of `kvlab run` that compose a configuration, as plain data, apart from its seed: those of the
    experiment or the debugging that say most of it, if any. Raises ConfigError where a choice is not one of its
    group."""
    has_weights = (config.get("weights") or {}).get("path") is not None
    left_out = DETERMINED if has_weights else ()  # they say what the model is
    wanted = _fields({name: value for name, value in config.items() if name not in left_out})
    experiment = config.get("experiment", "default")
    starts: list[tuple[str, ...]] = [(), *((f"debug={name}",) for name in RUN.options("debug"))]
    if experiment in RUN.options("experiment"):
        starts.insert(0, (f"experiment={experiment}",))
    found = [words for start in starts if (words := _from(start, config, wanted, is_given=has_weights)) is not None]
    if not found:
        raise ConfigError("mixer.name", config["mixer"]["name"], "is no choice of its group")
    return min(found, key=len)


def _from(start: tuple[str, ...], config: Mapping[str, Any], wanted: Flat, *, is_given: bool) -> list[str] | None:
    """The words from a start; None where the variant has no choice of its name, and the start does not bring it."""
    axes = _axes(start)
    chosen = _choices(config, axes)
    name = config["mixer"]["name"]
    if not is_given and name in RUN.options("mixer"):
        chosen = (f"mixer={name}", *chosen)
    elif not is_given and _base((*start, *chosen)).get("mixer.name") != name:
        return None
    base = _base((*start, *chosen))
    fields = {name: value for name, value in wanted.items() if name not in base or base[name] != value or name in axes}
    # Another machine might choose another type, and with it another point.
    if "model.dtype" in wanted:
        fields["model.dtype"] = wanted["model.dtype"]
    folder = config.get("name") or config.get("experiment", "default")
    if folder != base["experiment"]:
        fields["name"] = folder
    if config.get("results_dir", "results") != "results":
        fields["results_dir"] = config["results_dir"]
    top = ("name", "results_dir")
    return [*start, *chosen, *(f"{'' if n in base or n in top else '++'}{n}={_said(v)}" for n, v in fields.items())]


def _axes(start: tuple[str, ...]) -> tuple[str, ...]:
    """What an experiment sweeps over unless it is given."""
    for word in start:
        group, _, choice = word.partition("=")
        if group == "experiment":
            values = yaml.safe_load(RUN.file_of(group, choice).read_text())
            return tuple(values.get("hydra", {}).get("sweeper", {}).get("params", {}))
    return ()


def _choices(config: Mapping[str, Any], axes: Sequence[str]) -> tuple[str, ...]:
    """The choice of every other group that a configuration names. Raises ConfigError for one that there is not."""
    memory, task = config.get("memory") or {}, config["task"]["type"]
    if task not in RUN.options("task"):
        raise ConfigError("task.type", task, "is no choice of its group")
    found = [f"task={task}"]
    if memory.get("name", "paged") != "paged" and memory["name"] in RUN.options("memory"):
        found.append(f"memory={memory['name']}")
    for group, full in FULL.items():
        choice = choice_of(memory.get(group))
        if choice in full:
            found += [f"{group}={full[-1]}"] if group in axes else []
        elif choice in RUN.options(group):
            found.append(f"{group}={choice}")
    if (path := (config.get("weights") or {}).get("path")) is not None:
        found.append(f"weights.path={_said(path)}")
    return tuple(found)


@cache
def _base(words: tuple[str, ...]) -> Flat:
    """What words compose, by dotted names."""
    values = composed_of(words, RUN)
    return _fields(values) | {"experiment": values.get("experiment")}


def _fields(config: Mapping[str, Any]) -> Flat:
    said = {name: value for name, value in config.items() if name not in APART}
    said["mixer"] = {name: value for name, value in (said.get("mixer") or {}).items() if name != "knob"}
    flat = {name.removeprefix("."): value for name, value in flatten(said, "").items()}
    return {name: value for name, value in flat.items() if name != "mixer"}


def _said(value: Any) -> str:
    """A value as Hydra's overrides have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_said, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}:{_said(each)}' for name, each in value.items())}}}"
    text = str(value)
    if "${" in text:
        raise ConfigError("value", text[:80], "is read as an interpolation")
    if re.fullmatch(r"[A-Za-z/][\w./-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{quoted}'"
