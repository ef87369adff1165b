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
from pydantic_core import from_json

from kvlab.config import completed
from kvlab.evaluation.measure import AXES, per_sequence
from kvlab.files import home_expanded, read_regular
from kvlab.lab.ceilings import Ceilings, is_discriminative
from kvlab.lab.foreign import check_config, plain, printable, read_yaml
from kvlab.lab.labels import flatten, point_labels, without_seed
from kvlab.lab.record import (
    SHOWN,
    UNKNOWN_CONFIG,
    AnyRecord,
    Done,
    Part,
    Unfinished,
    damaged,
    first_error,
    read_record,
    unfinished,
)
from kvlab.lab.trained import METRICS, training_directory
from kvlab.training.checkpoint import CheckpointError
from kvlab.units import counted

RECORD = "record.json"
MAX_METRICS_BYTES = 2**30


def read_records(path: str | Path) -> list[AnyRecord]:
    """Every record under a folder, sorted by run id; runs that were begun and never finished count as `cut`.

    Raises FileNotFoundError when the folder does not exist or holds no run.
    """
    root = home_expanded(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of results")
    folders = {path.parent for name in ("config.yaml", RECORD) for path in root.rglob(name)}
    found = [(folder, record) for folder in sorted(folders) if (record := _record_of(folder)) is not None]
    if not found:
        raise FileNotFoundError(f"{root}: holds no run (no config.yaml in any folder below it)")
    return [replace(record, directory=str(folder)) for folder, record in found]


def _record_of(folder: Path) -> AnyRecord | None:
    """The record of a folder, one made up for a run without a readable one; None where the folder is not a run's."""
    run_id = printable(folder.name)
    try:
        config = read_yaml(folder / "config.yaml")
        is_run = isinstance(config, dict) and {"mixer", "task", "seed", "experiment"} <= set(config)
        if is_run:
            check_config(config)
        wrong, config = "", completed(config) if is_run else UNKNOWN_CONFIG
    except (ValueError, OSError) as error:
        is_run, config, wrong = False, UNKNOWN_CONFIG, f"config.yaml is damaged: {first_error(error)}"
    has_record = (folder / RECORD).exists()
    if not is_run and not has_record and not (wrong and (folder / "status.json").exists()):
        return None
    if not has_record:
        return unfinished("failed" if wrong else "cut", wrong or "never finished", run_id, config)
    try:
        return read_record(folder / RECORD)
    except (ValueError, OSError) as error:
        if not is_run and not (folder / "status.json").exists():
            return None  # a record of something else
        return damaged(error, run_id, config)


def read_metrics(record: AnyRecord) -> list[dict[str, Any]]:
    """`metrics_of` the folder that a record was read from."""
    return metrics_of(Path(record.directory))


def metrics_of(run_directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's training; a last line that a killed process left half written is left out. Other lines that
    are none are left out too, with a warning; so are all where the run's statement of its training is damaged."""
    rows: list[dict[str, Any]] = []
    try:
        directory = training_directory(run_directory)
        # of a finished one the first has all
        paths = [path for path in (directory / METRICS, *sorted(directory.glob("trials/*.jsonl"))) if path.exists()]
        for path in paths:
            lines = read_regular(path, MAX_METRICS_BYTES).split(b"\n")
            found = [row for line in lines if (row := _metrics_row(line)) is not None]
            if wrong := sum(map(bool, lines[:-1])) + bool(lines[-1].endswith(b"}")) - len(found):
                message = f"{path}: {counted(wrong, 'damaged row')}, left out"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            rows += found
    except (CheckpointError, ValueError, OSError) as error:
        warnings.warn(f"{error}; its metrics are left out", RuntimeWarning, stacklevel=2)
    return rows


def _metrics_row(line: bytes) -> dict[str, Any] | None:
    """A row that has what curves are drawn of; None for anything else."""
    try:
        row = plain(from_json(line, allow_inf_nan=False))
    except ValueError:
        return None
    numbers = [row.get(name) for name in ("learning_rate", "step", "loss")] if isinstance(row, dict) else [None]
    return row if all(isinstance(number, int | float) for number in numbers) else None


def load(path: str | Path) -> pd.DataFrame:
    """A folder of results as a DataFrame: one row a run; configuration columns that vary come first, then status,
    quality, memory and speed, then the constant ones. Names are dotted paths, such as `mixer.name` and
    `quality.value`; `memory.*_bytes` are of the whole batch that was measured, `per_sequence.*` of one sequence; the
    seeds of a point have its name in `point`. `frame.attrs` parts the columns: "varied" and "constant" ones of the
    configuration, and what was "measured"."""
    return frame_of(read_records(path))


def frame_of(records: Sequence[AnyRecord]) -> pd.DataFrame:
    """`load` for records at hand."""
    names = point_labels([without_seed(record.config) for record in records])
    known = [{"run_id": record.run_id, "point": name} for name, record in zip(names, records, strict=True)]
    frame = pd.DataFrame([first | _row(record) for first, record in zip(known, records, strict=True)])
    config_columns = [name for name in frame if name.startswith("config.")]
    frame = frame.rename(columns={name: name.removeprefix("config.") for name in config_columns})
    config_columns = [name.removeprefix("config.") for name in config_columns]
    varying = [name for name in config_columns if len(set(map(str, frame[name]))) > 1]
    named = [name for name in ("mixer.name", "task.type", "seed") if name in varying]
    varying = named + [name for name in varying if name not in named]
    constant = [name for name in config_columns if name not in varying]
    other = [name for name in frame if name not in config_columns]
    frame = frame.reindex(columns=[*varying, *other, *constant])
    frame.attrs = {"varied": varying, "constant": constant, "measured": other}
    return frame


def _row(record: AnyRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"run_id": record.run_id, "status": record.status}
    row["reason"] = record.reason if isinstance(record, Unfinished) else None
    if isinstance(record, Done):
        quality, memory = record.quality, record.memory
        row |= {f"quality.{name}": getattr(quality, name) for name in SHOWN}
        row |= {f"quality.{name}": value for name, value in quality.slices.items()}
        row |= {f"quality.{name} turn {k + 1}": v for name, turns in quality.turns.items() for k, v in enumerate(turns)}
        for name, parts in quality.parts.items():
            row |= {f"quality.{name} {part}": each.value for part, each in parts.items()}
            row |= {f"quality.{name} {part} share": each.share for part, each in parts.items()}
        row |= {"dropped": record.dropped}
        row |= {f"memory.{name}": getattr(memory, name) for name in (*AXES, "context_len", "batch_size")}
        row |= {f"per_sequence.{name}": value for name, value in per_sequence(memory).items()}
        row |= {f"speed.{name}": value for name, value in asdict(record.speed).items()}
        row |= {"num_params": record.num_params, "learning_rate": record.training.learning_rate}
    row |= {"wall_s": record.wall_s, "directory": record.directory}
    return row | flatten(record.config, "config")


@dataclass(frozen=True)
class Point:
    """Several seeds of one configuration. `low` and `high` bound the mean's 95% interval (Student t); of one seed there
    is none, and both are its value. `dropped` is the share of tokens that a compression dropped of the slices that were
    scored, the mean over slices and seeds (null: there is no compression, or the record does not say). `fidelity` is
    what else of `Quality` is shown of points: what the memory had to agree with, and what it costs. `ceiling` is the
    mean of the full memory's scores with the same weights, where every seed has one at hand; `turns` the metric of each
    turn over the slices that have several; `parts` that of the parts of labels that the task scores apart, over the
    slices that have them. `config` is what the seeds have in common."""

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
    dropped: float | None
    batch_size: int
    turns: list[float | None]
    parts: dict[str, Part]
    ceiling: float | None
    is_discriminative: bool | None
    config: dict[str, Any]

    @property
    def interval(self) -> tuple[float, float] | None:
        """`low` and `high`; None where one seed says nothing of them."""
        return (self.low, self.high) if self.num_seeds > 1 else None

    @property
    def half_width(self) -> float | None:
        """Half of the interval."""
        return self.interval and self.high - self.value


def points(records: Iterable[AnyRecord], ceilings: Ceilings | None = None) -> list[Point]:
    """Done runs grouped by everything but the seed, in order of task and bytes. Bytes are means over seeds, as quality
    is: they differ only by what compilers of other machines make; speeds are medians. `ceilings` are by default those
    among these runs."""
    groups: dict[str, list[Done]] = {}
    records = list(records)
    ceilings = ceilings or Ceilings(records)
    for record in records:
        if isinstance(record, Done):
            groups.setdefault(json.dumps(without_seed(record.config), sort_keys=True), []).append(record)
    labels = point_labels([json.loads(config) for config in groups])
    found = [_point(label, group, ceilings) for label, group in zip(labels, groups.values(), strict=True)]
    return sorted(found, key=lambda point: (point.task, point.bytes_per_sequence["allocated_bytes"], point.name))


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
        bytes_per_sequence=_bytes(group),
        context_len=first.memory.context_len,
        slices=_slices(group),
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
        dropped=_dropped(group),
        batch_size=first.memory.batch_size,
        turns=_turns(group),
        parts=_parts(group),
        ceiling=ceiling,
        is_discriminative=is_discriminative(first.quality.metric, ceiling, first.quality.chance, None),
        config=without_seed(first.config),
    )


def _bytes(group: list[Done]) -> dict[str, float]:
    """Bytes of a sequence by axis, over seeds; what an older record of theirs does not have is left out."""
    sizes = [per_sequence(record.memory) for record in group]
    return {name: statistics.fmean(each[name] for each in sizes) for name in sizes[0] if all(name in s for s in sizes)}


def _median(values: list[float | None]) -> float | None:
    """The median of what is known; None where nothing is, such as compactions of a memory that makes none."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _slices(group: list[Done]) -> dict[str, float]:
    """Each slice that all seeds have, over them."""
    slices = [record.quality.slices for record in group]
    return {
        name: statistics.mean(each[name] for each in slices) for name in slices[0] if all(name in s for s in slices)
    }


def _dropped(group: list[Done]) -> float | None:
    """The share of tokens that the compression of these seeds dropped; None where one of them does not say."""
    known = [record.dropped for record in group]
    said = [value for value in known if value is not None]
    return statistics.fmean(said) if len(said) == len(known) else None


def _turns(group: list[Done]) -> list[float | None]:
    """The metric of each turn, over the slices that have several, then over seeds; None for a turn without labels."""
    columns = [values for record in group for values in record.quality.turns.values()]
    turns: list[float | None] = []
    for turn in range(max(map(len, columns), default=0)):
        known = [values[turn] for values in columns if len(values) > turn]
        said = [value for value in known if value is not None]
        turns.append(statistics.fmean(said) if said else None)
    return turns


def _parts(group: list[Done]) -> dict[str, Part]:
    """Each part of the labels, over slices and then seeds; an older record of theirs has none."""
    found: dict[str, list[Part]] = {}
    for record in group:
        for parts in record.quality.parts.values():
            for name, part in parts.items():
                found.setdefault(name, []).append(part)
    said = {name: [part.value for part in parts if part.value is not None] for name, parts in found.items()}
    return {
        name: Part(
            value=statistics.fmean(said[name]) if said[name] else None,
            share=statistics.fmean(part.share for part in parts),
        )
        for name, parts in found.items()
    }


def interval_half_width(values: list[float]) -> float:
    """Half of the 95% confidence interval of the mean: t * s / sqrt(n); 0 for a single value."""
    if len(values) < 2:
        return 0.0
    from scipy.special import stdtrit  # scipy.stats takes a second to import, this a fifth of one

    quantile = float(stdtrit(len(values) - 1, 0.975))
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
