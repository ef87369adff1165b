"""Records as a table: one row a run, columns that vary first; seeds of one point as mean and interval."""

import json
import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from scipy import stats

from kvlab.config import completed
from kvlab.evaluation.measure import AXES, per_sequence
from kvlab.lab.ceilings import Ceilings, is_discriminative
from kvlab.lab.record import SHOWN, AnyRecord, Done, Unfinished, damaged, read_record
from kvlab.lab.trained import training_directory
from kvlab.training.checkpoint import CheckpointError


def read_records(path: str | Path) -> list[AnyRecord]:
    """Every record under a folder, sorted by run id; runs that were begun and never finished count as `cut`.

    Raises FileNotFoundError when the folder does not exist or holds no run.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of results")
    records = []
    for config_path in sorted(root.rglob("config.yaml")):
        record = _read_record(config_path)
        if record is not None:
            records.append(replace(record, directory=str(config_path.parent)))
    if not records:
        raise FileNotFoundError(f"{root}: holds no run (no config.yaml in any folder below it)")
    return records


def _read_record(config_path: Path) -> AnyRecord | None:
    """The record beside a config, one made up for a run without a readable one; None where the config is not a
    run's."""
    try:
        config = yaml.safe_load(config_path.read_text())
    except yaml.YAMLError:
        return None
    if not isinstance(config, dict) or not {"mixer", "task", "seed", "experiment"} <= set(config):
        return None
    config = completed(config)
    path, run_id = config_path.with_name("record.json"), config_path.parent.name
    if not path.exists():
        known = {"run_id": run_id, "experiment": config["experiment"], "seed": config["seed"], "config": config}
        return Unfinished(**known, status="cut", reason="never finished")
    try:
        return read_record(path)
    except ValueError as error:
        return damaged(error, run_id, config)


def read_metrics(record: AnyRecord) -> list[dict[str, Any]]:
    """The rows of a run's training; a last line that a killed process left half written is left out. None, with a
    warning, where the run's statement of its training is damaged."""
    try:
        path = training_directory(Path(record.directory)) / "metrics.jsonl"
    except CheckpointError as error:
        warnings.warn(f"{error}; its metrics are left out", RuntimeWarning, stacklevel=2)
        return []
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def load(path: str | Path) -> pd.DataFrame:
    """A folder of results as a DataFrame: one row a run; configuration columns that vary come first, then status,
    quality, memory and speed, then the constant ones. Names are dotted paths, such as `mixer.name` and
    `quality.value`."""
    records = read_records(path)
    rows = [_row(record) for record in records]
    frame = pd.DataFrame(rows)
    config_columns = [name for name in frame if name.startswith("config.")]
    frame = frame.rename(columns={name: name.removeprefix("config.") for name in config_columns})
    config_columns = [name.removeprefix("config.") for name in config_columns]
    varying = [name for name in config_columns if len(set(map(str, frame[name]))) > 1]
    named = [name for name in ("mixer.name", "task.type", "seed") if name in varying]
    varying = named + [name for name in varying if name not in named]
    constant = [name for name in config_columns if name not in varying]
    other = [name for name in frame if name not in config_columns]
    return frame.reindex(columns=[*varying, *other, *constant])


def _row(record: AnyRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"run_id": record.run_id, "status": record.status}
    row["reason"] = record.reason if isinstance(record, Unfinished) else None
    if isinstance(record, Done):
        quality, memory = record.quality, record.memory
        row |= {f"quality.{name}": getattr(quality, name) for name in SHOWN}
        row |= {f"quality.{name}": value for name, value in quality.slices.items()}
        row |= {f"quality.{name} turn {k + 1}": v for name, turns in quality.turns.items() for k, v in enumerate(turns)}
        row |= {f"memory.{name}": getattr(memory, name) for name in (*AXES, "context_len", "batch_size")}
        row |= {f"speed.{name}": value for name, value in asdict(record.speed).items()}
        row |= {"num_params": record.num_params, "learning_rate": record.training.learning_rate}
    row |= {"wall_s": record.wall_s, "directory": record.directory}
    return row | flatten(record.config, "config")


def flatten(value: Any, path: str) -> dict[str, Any]:
    """Nested mappings as dotted names; lists stay whole."""
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat |= flatten(entry, f"{path}.{name}")
    return flat


@dataclass(frozen=True)
class Point:
    """Several seeds of one configuration. `low` and `high` bound the mean's 95% interval (Student t; none for one
    seed). `fidelity` is what else of `Quality` is shown of points: what the memory had to agree with, and what it
    costs. `ceiling` is the mean of the full memory's scores with the same weights, where every seed has one at hand;
    `turns` the metric of each turn over the slices that have several. `config` is what the seeds have in common."""

    name: str
    variant: str
    task: str
    metric: str
    higher_is_better: bool
    value: float
    low: float
    high: float
    num_seeds: int
    bytes_per_sequence: dict[str, float]
    context_len: int
    slices: dict[str, float]
    learning_rates: list[float]
    num_params: int
    speeds: dict[str, float | None]
    layers: tuple[dict[str, Any], ...]
    run_ids: list[str]
    fidelity: dict[str, Any]
    is_lossy: bool
    batch_size: int
    turns: list[float | None]
    ceiling: float | None
    is_discriminative: bool | None
    config: dict[str, Any]


def points(records: Iterable[AnyRecord], ceilings: Ceilings | None = None) -> list[Point]:
    """Done runs grouped by everything but the seed, in order of task and bytes. Memory is exact, so it must not differ
    between seeds; speeds are medians over seeds. `ceilings` are by default those among these runs."""
    groups: dict[str, list[Done]] = {}
    records = list(records)
    ceilings = ceilings or Ceilings(records)
    for record in records:
        if isinstance(record, Done):
            groups.setdefault(json.dumps(without_seed(record.config), sort_keys=True), []).append(record)
    labels = labels_of([json.loads(config) for config in groups])
    found = [_point(label, group, ceilings) for label, group in zip(labels, groups.values(), strict=True)]
    return sorted(found, key=lambda point: (point.task, point.bytes_per_sequence["allocated_bytes"], point.name))


def without_seed(config: dict[str, Any]) -> dict[str, Any]:
    """What the seeds of a point have in common: neither their number, nor where they ran, nor what was asked for and
    what that would be solved for."""
    apart = ("seed", "results_dir", "hardware", "equal_budget")
    common = {name: value for name, value in config.items() if name not in apart}
    return common | {"mixer": {name: value for name, value in config["mixer"].items() if name != "knob"}}


def labels_of(configs: list[dict[str, Any]]) -> list[str]:
    """The variant's name, with what tells points of one variant and task apart where there are several. Where methods
    of compression vary, the method and its budget say that, and of its fields those in which it varies itself; so where
    selections vary."""
    named: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for config in configs:
        named.setdefault((config["mixer"]["name"], config["task"]["type"]), []).append(config)
    labels = []
    for config in configs:
        alike = named[config["mixer"]["name"], config["task"]["type"]]
        varying = [kind for kind in METHODS if len({_method(each, kind) for each in alike}) > 1]
        words = [word for kind in varying if _method(config, kind) for word in _in_words(config, kind, alike)]
        own, *fields = [flatten(_without_methods(each, varying), "") for each in (config, *alike)]
        labels.append(" ".join([config["mixer"]["name"], *words, *_details(own, fields)]))
    return labels


METHODS = {"compression": ("compression", "budget"), "selection": ("selection",)}
"""Choices of a memory that labels name where they vary, and its fields that their words say."""


def _details(own: dict[str, Any], alike: list[dict[str, Any]]) -> list[str]:
    """The fields of flat configurations that differ, as field=value of one of them."""
    keys = {key for fields in alike for key in fields}
    differing = sorted(key for key in keys if len({str(fields.get(key)) for fields in alike}) > 1)
    return [f"{_short(key, keys)}={own.get(key)}" for key in differing]


def _method(config: dict[str, Any], kind: str) -> str:
    """The name of a configuration's compression or selection; empty: none."""
    chosen = (config.get("memory") or {}).get(kind)
    return str(chosen["type"]) if isinstance(chosen, dict) and "type" in chosen else ""


def _in_words(config: dict[str, Any], kind: str, alike: list[dict[str, Any]]) -> list[str]:
    """A method, a compression's budget, and the fields in which the method itself varies."""
    name, section = _method(config, kind), config["memory"][kind]
    budget = [str(config["memory"].get("budget"))] if "budget" in METHODS[kind] else []
    mine = [flatten(each["memory"][kind], "") for each in alike if _method(each, kind) == name]
    return [name, *budget, *_details(flatten(section, ""), mine)]


def _without_methods(config: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """A configuration without what the words of its methods say."""
    said = {name for kind in kinds for name in METHODS[kind]}
    return {**config, "memory": {name: value for name, value in config.get("memory", {}).items() if name not in said}}


def _short(key: str, keys: set[str]) -> str:
    """The last words of a dotted name, as many as tell it from the others; a section stands for its `name`."""
    words = key.removeprefix(".").split(".")
    endings = [".".join(words[start:]) for start in reversed(range(len(words)))]
    is_only = (ending for ending in endings if sum(f".{other}".endswith(f".{ending}") for other in keys) == 1)
    return next(is_only, endings[-1]).removesuffix(".name")


def _point(label: str, group: list[Done], ceilings: Ceilings) -> Point:
    first = group[0]
    values = [record.quality.value for record in group]
    mean = statistics.fmean(values)
    half = interval_half_width(values)
    tops = [full.quality.value for record in group if (full := ceilings.of(record))]
    ceiling = statistics.fmean(tops) if len(tops) == len(group) else None
    return Point(
        name=label,
        variant=first.config["mixer"]["name"],
        task=first.config["task"]["type"],
        metric=first.quality.metric,
        higher_is_better=first.quality.higher_is_better,
        value=mean,
        low=mean - half,
        high=mean + half,
        num_seeds=len(group),
        bytes_per_sequence=per_sequence(first.memory),
        context_len=first.memory.context_len,
        slices={name: statistics.mean(r.quality.slices[name] for r in group) for name in first.quality.slices},
        learning_rates=[record.training.learning_rate for record in group],
        num_params=first.num_params,
        speeds={name: _median([getattr(r.speed, name) for r in group]) for name in asdict(first.speed)},
        layers=first.memory.layers,
        run_ids=[record.run_id for record in group],
        fidelity={
            name: how.over_seeds([getattr(record.quality, name) for record in group])
            for name, how in SHOWN.items()
            if how.over_seeds
        },
        is_lossy=any(record.quality.is_lossy for record in group),
        batch_size=first.memory.batch_size,
        turns=_turns(group),
        ceiling=ceiling,
        is_discriminative=is_discriminative(first.quality.metric, ceiling, first.quality.chance, None),
        config=without_seed(first.config),
    )


def _median(values: list[float | None]) -> float | None:
    """The median of what is known; None where nothing is, such as compactions of a memory that makes none."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _turns(group: list[Done]) -> list[float | None]:
    """The metric of each turn, over the slices that have several, then over seeds; None for a turn without labels."""
    columns = [values for record in group for values in record.quality.turns.values()]
    turns: list[float | None] = []
    for turn in range(max(map(len, columns), default=0)):
        known = [values[turn] for values in columns if len(values) > turn]
        said = [value for value in known if value is not None]
        turns.append(statistics.fmean(said) if said else None)
    return turns


def interval_half_width(values: list[float]) -> float:
    """Half of the 95% confidence interval of the mean: t * s / sqrt(n); 0 for a single value."""
    if len(values) < 2:
        return 0.0
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def non_dominated(found: list[Point], axis: str = "allocated_bytes") -> list[Point]:
    """Points of one task that no other point beats in both bytes and quality, by ascending bytes; of points whose bytes
    on the axis are known."""
    frontier: list[Point] = []
    found = [point for point in found if axis in point.bytes_per_sequence]
    ordered = sorted(found, key=lambda p: (p.bytes_per_sequence[axis], -p.value if p.higher_is_better else p.value))
    for point in ordered:
        if not frontier or (
            (point.value > frontier[-1].value) == point.higher_is_better and (point.value != frontier[-1].value)
        ):
            frontier.append(point)
    return frontier
