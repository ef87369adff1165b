"""Runs chosen on a command line: by folder, by run id, or by what their configuration says."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from kvlab.lab.labels import flatten, without_seed
from kvlab.lab.record import AnyRecord, Done, Unfinished
from kvlab.lab.results import read_records
from kvlab.memory.naming import FULL, name_of
from kvlab.schema import ConfigError, nearest


@dataclass(frozen=True)
class Condition:
    """A field of the configuration, by a dotted name, that has one of some values, as Hydra reads them; a
    section is named by its `type` or `name`, and what holds and reads everything by the choices of its group, such as
    compression=none or selection=all."""

    field: str
    values: tuple[str, ...]

    def holds(self, fields: Mapping[str, Any]) -> bool:
        """Whether it is so in a configuration of dotted names; a field that is not there has no value."""
        if self.field not in fields:
            return False
        value, full = fields[self.field], FULL.get(self.field.rpartition(".")[2], ())
        return any(_is_said(value, text) or (value in full and text in full) for text in self.values)


def _is_said(value: Any, text: str) -> bool:
    if str(value) == text:
        return True
    said = said_by_hydra(text)
    return said == value and isinstance(said, bool) == isinstance(value, bool)


@cache
def said_by_hydra(text: str) -> Any:
    """A value as it would be read behind the equals sign of an override: 1e-5 is a number and 010 is none, unlike in
    YAML 1.1. What cannot be read there is text."""
    try:
        (override,) = OverridesParser.create().parse_overrides([f"value={text}"])
        return override.value()
    except HydraException:
        return text


def split_conditions(words: str) -> list[tuple[str, tuple[str, ...]]]:
    """ "mixer=gqa,seed=0,1" as [("mixer", ("gqa",)), ("seed", ("0", "1"))]. Raises ConfigError."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for part in words.split(","):
        name, equals, value = part.partition("=")
        if equals and name.strip():
            found.append((name.strip(), (value.strip(),)))
        elif found and not equals:
            found[-1] = (found[-1][0], (*found[-1][1], part.strip()))
        else:
            raise ConfigError("runs", words, "must be field=value, several of them separated by commas")
    return found


def conditions(words: Iterable[str], records: Sequence[AnyRecord]) -> list[Condition]:
    """Conditions whose fields some record has. A field may be named by the end of its dotted name where that is clear.
    Raises ConfigError."""
    names = sorted({name for record in records for name in fields_of(record.config)})
    return [Condition(_full_name(name, names), values) for each in words for name, values in split_conditions(each)]


def with_ending(names: Sequence[str], name: str) -> list[str]:
    """The dotted names that end with a name; those of the training of runs that are scored on something else only where
    there are no others."""
    ending = [full for full in names if full.endswith(f".{name}")]
    return [full for full in ending if not full.startswith("trained_on.")] or ending


def _full_name(name: str, names: Sequence[str]) -> str:
    if name in names:
        return name
    ending = with_ending(names, name)
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise ConfigError(name, None, f"is ambiguous; legal: {', '.join(ending)}")
    raise ConfigError(name, None, f"no field of these runs; {nearest(name, names)}")


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration by dotted names; a section that has a `type` or a `name` is there by that, too."""
    fields = flatten(dict(config), "") | dict(_named_sections(config, ""))
    return {name.removeprefix("."): value for name, value in fields.items()}


def _named_sections(value: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    for name, section in value.items():
        if isinstance(section, Mapping):
            if (word := name_of(section)) is not None:
                yield f"{path}.{name}", word
            yield from _named_sections(section, f"{path}.{name}")


def matching(records: Iterable[AnyRecord], wanted: Sequence[Condition]) -> list[AnyRecord]:
    """The records of which all conditions hold."""
    return [record for record in records if all(condition.holds(fields_of(record.config)) for condition in wanted)]


class Runs:
    """All runs at hand: those of a folder of results, as far as it exists, and those beside every folder that is
    named."""

    def __init__(self, results: Path):
        self.results = results
        self.records: list[AnyRecord] = []
        self._folders: set[Path] = set()
        if results.is_dir():
            self._read(results)

    def _read(self, folder: Path) -> None:
        for record in read_records(folder):
            place = Path(record.directory).resolve()
            if place not in self._folders:
                self._folders.add(place)
                self.records.append(record)

    def point(self, words: str) -> list[Done]:
        """The finished runs of one point, its seeds: by folder, run id (or its beginning) or conditions.

        Raises ConfigError when there are none, or several points among them, and FileNotFoundError for a folder
        without runs.
        """
        found = self.named(words)
        done = [record for record in found if isinstance(record, Done)]
        unfinished = [record for record in found if isinstance(record, Unfinished)]
        if not done and unfinished:
            raise ConfigError("runs", words, f"has not finished: {unfinished[0].status}, {unfinished[0].reason}")
        if not done:
            raise ConfigError("runs", words, f"no run of {self.results} is so; `kvlab show {self.results}` lists them")
        if several := differences([without_seed(record.config) for record in done]):
            said = "; ".join(f"{name}={', '.join(values)}" for name, values in several.items())
            raise ConfigError("runs", words, f"must be one point with its seeds; these runs differ in {said}")
        return sorted(done, key=lambda record: record.seed)

    def named(self, words: str) -> list[AnyRecord]:
        """The runs that words name: a folder, an id or its beginning, or conditions as of `matching`."""
        folder = Path(words)
        if folder.is_dir():
            chosen = read_records(folder)
            self._read(folder.parent if (folder / "config.yaml").exists() else folder)
            return chosen
        if "=" in words:
            return matching(self.records, conditions([words], self.records)) if self.records else []
        found = [record for record in self.records if record.run_id.startswith(words)]
        exact = [record for record in found if record.run_id == words]
        if len({record.run_id for record in exact or found}) > 1:
            raise ConfigError("runs", words, f"begins several: {', '.join(sorted(each.run_id for each in found))}")
        return exact or found


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The dotted fields in which configurations differ, with their values. Of sections that are different choices the
    names, and not the fields that only one of them has."""
    flat = [fields_of(config) for config in configs]
    names = sorted({name for fields in flat for name in fields})
    values = {name: sorted({str(fields.get(name)) for fields in flat}) for name in names}
    values = {name: different for name, different in values.items() if len(different) > 1}

    def is_said(name: str) -> bool:
        """Whether the name of a section around it says so already."""
        parts = name.split(".")
        around = {".".join(parts[:end]) for end in range(1, len(parts))} & values.keys()
        is_of_one = any(name not in fields for fields in flat)
        return any(is_of_one or name in (f"{section}.type", f"{section}.name") for section in around)

    return {name: different for name, different in values.items() if not is_said(name)}
