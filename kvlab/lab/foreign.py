"""What is read back of a folder of results, which may be damaged or anybody's: plain data within bounds, and the
parts of a configuration that tables, pages and labels rely on."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import from_json

from kvlab.config import SECTIONS
from kvlab.files import read_regular

MAX_JSON_BYTES, MAX_YAML_BYTES = 32 * 2**20, 2**20
MAX_DEPTH, MAX_VALUES, MAX_INTEGER, MAX_TEXT = 40, 200_000, 2**63, 4096
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def read_json(path: Path) -> Any:
    """A JSON file as `plain` data. Raises ValueError, and OSError for what is no readable file."""
    return plain(from_json(read_regular(path, MAX_JSON_BYTES), allow_inf_nan=False))


def read_yaml(path: Path) -> Any:
    """A YAML file as `plain` data, its aliases counted as often as they stand. Raises ValueError, and OSError for what
    is no readable file."""
    try:
        return plain(yaml.safe_load(read_regular(path, MAX_YAML_BYTES)))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())[:200]}") from None


def plain(value: Any) -> Any:
    """Mappings with text as keys, lists, text, booleans, null and finite numbers, of at most `MAX_VALUES` values in at
    most `MAX_DEPTH` levels; characters that steer a terminal are written out, as in "\\x1b",
    and text beyond `MAX_TEXT` characters is cut. Raises ValueError naming
    the place of anything else."""
    left = [MAX_VALUES]

    def walk(value: Any, place: str, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > MAX_DEPTH:
            raise ValueError(f"{place or 'it'}: more than {MAX_VALUES:,} values, or {MAX_DEPTH} levels, are no record")
        if isinstance(value, str):
            return printable(value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]}...")
        if isinstance(value, Mapping):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{place or 'it'}: has the key {wrong[0]!r:.40}, which is no text")
            return {printable(key): walk(inner, f"{place}.{key[:40]}", depth + 1) for key, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, place, depth + 1) for inner in value]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{place}: must be finite")
        if isinstance(value, int) and not -MAX_INTEGER <= value < MAX_INTEGER:
            raise ValueError(f"{place}: must be an integer of 64 bits")
        if value is None or isinstance(value, bool | int | float):
            return value
        raise ValueError(f"{place}: {type(value).__name__} is no plain value")

    return walk(value, "", 0)


def printable(text: str) -> str:
    """Text in which characters that steer a terminal are written out; tabs and ends of lines stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def check_config(config: Any) -> None:
    """Raises ValueError, naming the field, unless a run's configuration as plain data has all that a row is told by:
    a named variant, a task with its type, a seed, and sections that are mappings."""
    if not isinstance(config, Mapping):
        raise ValueError("config: must be a mapping")
    for name, key in (("mixer", "name"), ("task", "type")):
        section = config.get(name)
        if not isinstance(section, Mapping) or not _is_text(section.get(key)):
            raise ValueError(f"config.{name}.{key}: must be a non-empty string")
    if not _is_text(config.get("experiment", "default")):
        raise ValueError("config.experiment: must be a non-empty string")
    seed = config.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError("config.seed: must be an integer")
    trained_on = config.get("trained_on")
    if trained_on is not None:
        task = trained_on.get("task") if isinstance(trained_on, Mapping) else None
        if not isinstance(task, Mapping) or not _is_text(task.get("type")):
            raise ValueError("config.trained_on.task.type: must be a non-empty string")
    for name in SECTIONS:
        if not isinstance(config.get(name, {}), Mapping):
            raise ValueError(f"config.{name}: must be a mapping")
    _check_types(config, "config")


def _check_types(section: Mapping[str, Any], place: str) -> None:
    """Whatever is chosen by its type says so in text."""
    for name, value in section.items():
        if name == "type" and not _is_text(value):
            raise ValueError(f"{place}.type: must be a non-empty string")
        if isinstance(value, Mapping):
            _check_types(value, f"{place}.{name}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
