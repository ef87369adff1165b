"""The inverse question: the best quality that fits a budget, and the least bytes that reach a quality, of results at
hand. Bytes are those held, never those asked for."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.compression.budget import Budget
from kvlab.evaluation.measure import AXES, AXIS_WORDS
from kvlab.lab.ceilings import Ceilings
from kvlab.lab.choose import conditions, differences, matching
from kvlab.lab.record import Done
from kvlab.lab.results import Point, points, read_records
from kvlab.schema import ConfigError, nearest
from kvlab.tasks.metrics import METRICS, Metric
from kvlab.units import counted, human_bytes

NOT_KNOBS = ("page_size", "chunk_len", "name", "type")
"""Fields of the memory that choose no point of a variant's curve."""


@dataclass(frozen=True)
class Interpolated:
    """A variant's quality at bytes that none of its points holds, between `below` and `above`, whose intervals are
    interpolated as their means are (null: one of them is of one seed and has none)."""

    below: Point
    above: Point
    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Answer:
    """What the points say, in terms of `axis`.

    Of a budget: `best`, the best quality that fits (of equals the smaller), and `above`, what is nearest above it. Of a
    quality: `least`, the fewest bytes that reach it (of equals the better), and `nearest`, the best that does not.
    `between` reads every variant with points on both sides at exactly the budget.
    """

    axis: str
    metric: Metric
    num_points: int
    budget: float | None = None
    best: Point | None = None
    above: Point | None = None
    between: tuple[Interpolated, ...] = ()
    floor: float | None = None
    least: Point | None = None
    nearest: Point | None = None

    @property
    def is_found(self) -> bool:
        """Whether all that was asked has an answer."""
        return (self.budget is None or self.best is not None) and (self.floor is None or self.least is not None)


def ask(words: Sequence[str]) -> Answer:
    """Answers "budget=64KiB task=mqar results/mqar": what is asked, conditions on runs, and a folder of results (by
    default results). Raises ConfigError for what cannot be asked, FileNotFoundError for a folder without runs."""
    folders, asked, others = [word for word in words if "=" not in word], {}, []
    for word in words:
        name, _, value = word.partition("=")
        if name in ("budget", "floor", "axis"):
            asked[name] = value
        elif word not in folders:
            others.append(word)
    if len(folders) > 1:
        raise ConfigError("results", " ".join(folders), "must be one folder")
    budget, floor = asked.get("budget"), asked.get("floor")
    records = read_records(folders[0] if folders else "results")
    chosen = [record for record in matching(records, conditions(others, records)) if isinstance(record, Done)]
    if not chosen:
        raise ConfigError("runs", " ".join(others) or "all", "no finished run is so")
    return answer(
        points(chosen, Ceilings(records)),
        axis=asked.get("axis", "allocated_bytes"),
        budget=None if budget is None else _bytes(budget),
        floor=None if floor is None else _number(floor),
    )


def _bytes(text: str) -> int:
    """A budget as `memory.budget` is written, of bytes alone."""
    num_bytes = Budget.of(text).num_bytes
    if num_bytes is None:
        raise ConfigError("budget", text, "must be bytes a sequence, such as 64KiB or 65536B")
    return num_bytes


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError("floor", text, "must be a finite number, a value of the task's metric")
    return value


def answer(
    found: Sequence[Point], *, axis: str = "allocated_bytes", budget: float | None = None, floor: float | None = None
) -> Answer:
    """Answers for points of one task, context and batch; `axis` is one of `AXES` or a word for it. Raises ConfigError
    where they mix several, where nothing is asked, and for an axis that these points do not have."""
    if budget is None and floor is None:
        raise ConfigError("budget", None, "must be given, such as budget=64KiB, or a quality, such as floor=0.95")
    axis = AXIS_WORDS.get(axis, axis)
    if axis not in AXES:
        raise ConfigError("axis", axis, nearest(axis, (*AXIS_WORDS, *AXES)))
    _check_alike(found)
    found = [point for point in found if axis in point.bytes_per_sequence]
    if not found:
        raise ConfigError("axis", axis, "no finished run that is asked for has it")
    metric = METRICS.get(found[0].metric)
    if metric is None:
        raise ConfigError("metric", found[0].metric, f"must be one of {', '.join(METRICS)}")

    def size(point: Point) -> float:
        return point.bytes_per_sequence[axis]

    def cost(point: Point) -> float:
        return -point.value if metric.higher_is_better else point.value

    fields: dict[str, Any] = {}
    if budget is not None:
        fits, others = _parted(found, [size(point) <= budget for point in found])
        fields |= {
            "budget": budget,
            "best": min(fits, key=lambda point: (cost(point), size(point)), default=None),
            "above": min(others, key=lambda point: (size(point), cost(point)), default=None),
            "between": tuple(read for curve in curves(found) if (read := _read(curve, budget, axis))),
        }
    if floor is not None:
        reach, others = _parted(found, [metric.has_reached(point.value, floor) for point in found])
        fields |= {
            "floor": floor,
            "least": min(reach, key=lambda point: (size(point), cost(point)), default=None),
            "nearest": min(others, key=lambda point: (cost(point), size(point)), default=None),
        }
    return Answer(axis, metric, len(found), **fields)


def _parted(found: Sequence[Point], is_in: Sequence[bool]) -> tuple[list[Point], list[Point]]:
    pairs = list(zip(found, is_in, strict=True))
    return [point for point, chosen in pairs if chosen], [point for point, chosen in pairs if not chosen]


def _check_alike(found: Sequence[Point]) -> None:
    """Raises ConfigError, naming the field, unless quality and bytes of all points mean the same."""
    for name, values in (
        ("task", {point.task for point in found}),
        ("measure.context_len", {point.context_len for point in found}),
        ("measure.batch_size", {point.batch_size for point in found}),
    ):
        if len(values) > 1:
            raise _mixed(name, values)
    for name, values in differences([point.config["task"] for point in found]).items():
        raise _mixed(f"task.{name}", values)


def _mixed(name: str, values: Any) -> ConfigError:
    legal = f"must be one: points that differ in it cannot be ranked; choose with {name}=..."
    return ConfigError(name, ", ".join(map(str, sorted(values))), legal)


def curves(found: Sequence[Point]) -> list[list[Point]]:
    """Points of the same variant: alike in everything but the numbers of their mixer and memory."""
    groups: dict[str, list[Point]] = {}
    for point in found:
        alike = {name: _without_numbers(name, value) for name, value in point.config.items()}
        groups.setdefault(json.dumps([point.task, alike], sort_keys=True), []).append(point)
    return list(groups.values())


def _without_numbers(section: str, value: Any) -> Any:
    """A section of a configuration without the numbers that choose a point of a curve."""
    if section == "budget":
        return None
    if section not in ("mixer", "memory", "compression", "selection"):
        return value
    if not isinstance(value, Mapping):
        return None if isinstance(value, int | float) and not isinstance(value, bool) else value
    kept = {name: each if name in NOT_KNOBS else _without_numbers(section, each) for name, each in value.items()}
    return {name: None if name == "budget" else each for name, each in kept.items()}


def interpolate(curve: Sequence[Point], num_bytes: float, axis: str = "allocated_bytes") -> Interpolated | None:
    """A variant's quality at `num_bytes` a sequence, linear in log bytes between the neighbouring points; None below
    its smallest and above its largest: nothing is extrapolated.

    Raises ValueError for points of several variants or tasks, and where two of them hold the same bytes.
    """
    if len({(point.variant, point.task, point.context_len, point.batch_size) for point in curve}) > 1:
        raise ValueError("points of several variants, tasks, contexts or batches are no curve")
    ordered = sorted(curve, key=lambda point: point.bytes_per_sequence[axis])
    sizes = [point.bytes_per_sequence[axis] for point in ordered]
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"{ordered[0].variant}: two points hold the same {axis}: there is no one curve through them")
    for below, above in zip(ordered, ordered[1:] or ordered, strict=False):
        low, high = below.bytes_per_sequence[axis], above.bytes_per_sequence[axis]
        if low <= num_bytes <= high:
            share = math.log(num_bytes / low) / math.log(high / low) if high > low else 0.0
            ends = [(below.value, above.value)]
            if below.interval and above.interval:
                ends += zip(below.interval, above.interval, strict=True)
            value, *interval = ((1 - share) * first + share * second for first, second in ends)
            return Interpolated(below, above, value, (interval[0], interval[1]) if interval else None)
    return None


def _read(curve: Sequence[Point], budget: float, axis: str) -> Interpolated | None:
    """`interpolate` where that is possible and tells more than a point does."""
    sizes = [point.bytes_per_sequence[axis] for point in curve]
    if len(set(sizes)) < len(sizes) or budget in sizes:
        return None
    return interpolate(curve, budget, axis)


def as_text(said: Answer) -> str:
    """The answer in sentences."""
    lines, num_points = [], counted(said.num_points, "point")
    if said.budget is not None:
        within = f"within {human_bytes(said.budget)}"
        if said.best is not None:
            lines.append(f"best {within}: {_told(said.best, said)}")
        else:
            lines.append(f"nothing fits {within}: of {num_points} the smallest is the nearest above")
        lines.append(f"nearest above: {_told(said.above, said) if said.above else 'none, all points fit'}")
        lines += [
            f"interpolated at {human_bytes(said.budget)}: {read.below.name} to {read.above.name}: {said.metric.label} "
            f"{read.value:.4f} ({_interval_words(read.interval)})"
            for read in said.between
        ]
    if said.floor is not None:
        goal = f"{said.metric.label} {said.floor:g}"
        if said.least is not None:
            lines.append(f"least bytes that reach {goal}: {_told(said.least, said)}")
        else:
            lines.append(f"nothing reaches {goal}: of {num_points} the best is the nearest")
        if said.nearest is not None:
            lines.append(f"nearest that does not: {_told(said.nearest, said)}")
    return "\n".join(lines)


def _told(point: Point, said: Answer) -> str:
    held = human_bytes(point.bytes_per_sequence[said.axis])
    seeds = counted(point.num_seeds, "seed")
    seeds = f"{_interval_words(point.interval)} over {seeds}" if point.interval else f"{seeds}, no interval"
    ceiling = "" if point.ceiling is None or not point.is_lossy else f", ceiling {point.ceiling:.4f}"
    return f"{point.name}: {said.metric.label} {point.value:.4f} ({seeds}{ceiling}), {held} {_axis_words(said.axis)}"


def _interval_words(interval: tuple[float, float] | None) -> str:
    return "no interval" if interval is None else f"95% [{interval[0]:.4f}, {interval[1]:.4f}]"


def _axis_words(axis: str) -> str:
    return "a token" if axis == "read_bytes_per_token" else f"a sequence ({axis.removesuffix('_bytes')})"


def as_data(said: Answer) -> dict[str, Any]:
    """The answer as plain data, points with their runs; `low` and `high` are null where there is no interval."""

    def bounds(interval: tuple[float, float] | None) -> dict[str, float | None]:
        low, high = interval or (None, None)
        return {"low": low, "high": high}

    def told(point: Point | None) -> dict[str, Any] | None:
        if point is None:
            return None
        names = ("num_seeds", "ceiling", "run_ids")
        data = {"name": point.name, "value": point.value, **bounds(point.interval)}
        return data | {name: getattr(point, name) for name in names} | {said.axis: point.bytes_per_sequence[said.axis]}

    between = [
        {"value": read.value, **bounds(read.interval), "below": told(read.below), "above": told(read.above)}
        for read in said.between
    ]
    data: dict[str, Any] = {"axis": said.axis, "metric": said.metric.name, "num_points": said.num_points}
    if said.budget is not None:
        data |= {"budget": said.budget, "best": told(said.best), "above": told(said.above), "interpolated": between}
    if said.floor is not None:
        data |= {"floor": said.floor, "least": told(said.least), "nearest": told(said.nearest)}
    return data
