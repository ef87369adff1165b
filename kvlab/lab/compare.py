"""Two runs on the same examples: paired differences, their intervals, and the labels that flipped.

A run here is its record and its scores by example. Runs are paired by seed; each pair must have scored the same
examples, or the comparison is refused. An interval is the percentile bootstrap of the difference: seeds are drawn with
replacement, then in each drawn seed the examples of each slice, the same ones for both runs.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvlab.lab.ceilings import Ceilings, is_discriminative
from kvlab.lab.examples import read_examples
from kvlab.lab.record import Done
from kvlab.schema import ConfigError
from kvlab.tasks.metrics import METRICS, ExampleScores, ManySums, Metric

NUM_RESAMPLES = 10_000
LEVEL = 0.95
MEAN = "mean"
"""The row over all slices: their plain mean, as the papers average."""
BLOCK = 1 << 21
"""Numbers of one block of resamples in memory."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A run and its scores by slice."""

    record: Done
    examples: Mapping[str, ExampleScores]

    @classmethod
    def of(cls, record: Done) -> "Scored":
        """The run of a record that was read from its folder. Raises `ExamplesError`."""
        return cls(record, read_examples(record))


@dataclass(frozen=True)
class Flips:
    """How many of `num_labels` labels were right in the first run and wrong in the second, and the other way; and so of
    whole examples, which are right where all of their labels are."""

    lost: int = 0
    won: int = 0
    num_labels: int = 0
    lost_examples: int = 0
    won_examples: int = 0
    num_examples: int = 0

    def __add__(self, other: "Flips") -> "Flips":
        return Flips(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One slice (`MEAN`: their mean) and turn (counted from 1; null: all): the metric of both runs, `difference` =
    second less first with its 95% interval, flips, and each run's ceiling where it is at hand.

    Means are over seeds. A cell that is not `discriminative` tells nothing: the full memory does not reach the floor
    there, or chance does; null: not known.
    """

    slice: str
    turn: int | None
    first: float
    second: float
    difference: float
    low: float
    high: float
    flips: Flips
    ceilings: tuple[float | None, float | None]
    discriminative: bool | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two points of one task, cell by cell; `unpaired` are the seeds that only one of them has."""

    names: tuple[str, str]
    task: str
    metric: str
    higher_is_better: bool
    seeds: tuple[int, ...]
    unpaired: tuple[int, ...]
    run_ids: tuple[tuple[str, ...], tuple[str, ...]]
    cells: tuple[Cell, ...]


def compare(
    first: Sequence[Scored],
    second: Sequence[Scored],
    *,
    names: tuple[str, str],
    ceilings: Ceilings,
    floor: float | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """The second point less the first, each given as the runs of its seeds.

    Raises ConfigError, naming the field, where no two runs scored the same examples.
    """
    pairs, unpaired = paired(first, second)
    record = pairs[0][0].record
    metric = METRICS.get(record.quality.metric)
    if metric is None:
        raise ConfigError("metric", record.quality.metric, f"must be one of {', '.join(METRICS)}")
    draws = resampled(pairs, metric, num_resamples, np.random.default_rng(seed))
    cells = []
    for place, drawn in draws.items():
        first_value, second_value = (_value([pair[side] for pair in pairs], metric, place) for side in (0, 1))
        low, high = interval(drawn)
        tops = [_ceiling([pair[side].record for pair in pairs], ceilings, place) for side in (0, 1)]
        said = [is_discriminative(metric.name, top, record.quality.chance, floor) for top in tops]
        cells.append(
            Cell(
                slice=place[0],
                turn=place[1],
                first=first_value,
                second=second_value,
                difference=second_value - first_value,
                low=low,
                high=high,
                flips=flips(pairs, place),
                ceilings=(tops[0], tops[1]),
                discriminative=False if False in said else None if None in said else True,
            )
        )
    return Comparison(
        names=names,
        task=record.config["task"]["type"],
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        seeds=tuple(pair[0].record.seed for pair in pairs),
        unpaired=unpaired,
        run_ids=(
            tuple(ours.record.run_id for ours, _ in pairs),
            tuple(theirs.record.run_id for _, theirs in pairs),
        ),
        cells=tuple(cells),
    )


type Pair = tuple[Scored, Scored]
type Place = tuple[str, int | None]
"""A slice and a turn of it, counted from 1; None: all turns."""


def paired(first: Sequence[Scored], second: Sequence[Scored]) -> tuple[list[Pair], tuple[int, ...]]:
    """Runs of the same seed, in order of seeds, and the seeds that have no partner. Raises ConfigError, naming the
    field, where the two did not score the same examples."""
    sides = [{run.record.seed: run for run in side} for side in (first, second)]
    common, every = sorted(sides[0].keys() & sides[1].keys()), sides[0].keys() | sides[1].keys()
    task = [side[0].record.config["task"]["type"] for side in (first, second)]
    if task[0] != task[1]:
        raise _differs("task.type", *task)
    if not common:
        seeds = (", ".join(map(str, sorted(side))) for side in sides)
        raise _differs("seed", *seeds)
    pairs = [(sides[0][seed], sides[1][seed]) for seed in common]
    for ours, theirs in pairs:
        _check_same_examples(ours, theirs)
    return pairs, tuple(sorted(every - set(common)))


def _differs(name: str, ours: Any, theirs: Any) -> ConfigError:
    legal = "must be the same in both: only the same examples can be compared one by one"
    return ConfigError(name, f"{ours} and {theirs}", legal)


def _check_same_examples(ours: Scored, theirs: Scored) -> None:
    """By the digests of the examples themselves; a difference is named by what explains it."""
    digests = [run.record.examples.data_sha256 if run.record.examples else {} for run in (ours, theirs)]
    if digests[0] != digests[1]:
        data = [run.record.training.data_sha256 for run in (ours, theirs)]
        if data[0] != data[1]:
            raise _differs("data", *(str(digest)[:10] for digest in data))
        tasks = [run.record.config["task"] for run in (ours, theirs)]
        for name in sorted(tasks[0].keys() | tasks[1].keys()):
            if tasks[0].get(name) != tasks[1].get(name):
                raise _differs(f"task.{name}", tasks[0].get(name), tasks[1].get(name))
        raise _differs("examples", *(f"those of run {run.record.run_id}" for run in (ours, theirs)))
    for name, examples in ours.examples.items():
        other = theirs.examples[name]
        if examples.num_labels.shape != other.num_labels.shape or (examples.num_labels != other.num_labels).any():
            raise _differs(f"turns of slice {name}", examples.num_turns, other.num_turns)


def places(examples: Mapping[str, ExampleScores]) -> Iterator[Place]:
    """The cells of a task: the mean over slices first, where there are several; of each, all turns and then every turn
    that has labels."""
    if len(examples) > 1:
        yield MEAN, None
        for turn in range(max(each.num_turns for each in examples.values())):
            if any(_has(each, turn) for each in examples.values()):
                yield MEAN, turn + 1
    for name, each in examples.items():
        yield name, None
        yield from ((name, turn + 1) for turn in range(each.num_turns) if _has(each, turn))


def _has(examples: ExampleScores, turn: int) -> bool:
    """Whether a turn, counted from 0, is scored apart: there are several, and it has labels."""
    return examples.num_turns > turn and examples.num_turns > 1 and bool(examples.weight[:, turn].any())


def _members(examples: Mapping[str, ExampleScores], place: Place) -> list[str]:
    """The slices that a cell is the mean of."""
    name, turn = place
    if name in examples:
        return [name]
    return [each for each, scores in examples.items() if turn is None or _has(scores, turn - 1)]


def _value(runs: Sequence[Scored], metric: Metric, place: Place) -> float:
    """The metric of a cell, over seeds."""
    turn = None if place[1] is None else place[1] - 1
    return statistics.fmean(
        metric.mean([run.examples[name].sums(turn) for name in _members(run.examples, place)]) for run in runs
    )


def _ceiling(records: Sequence[Done], ceilings: Ceilings, place: Place) -> float | None:
    """The metric of the full memory in a cell, over seeds; None where a seed has no such run."""
    tops = [full for record in records if (full := ceilings.of(record))]
    values = [value for full in tops if (value := _recorded(full, place)) is not None]
    return statistics.fmean(values) if len(values) == len(records) else None


def _recorded(record: Done, place: Place) -> float | None:
    """The metric of a cell as a record has it, without its examples."""
    name, turn = place
    if turn is None:
        return record.quality.value if name == MEAN else record.quality.slices.get(name)
    turns = [each for part, each in record.quality.turns.items() if name in (part, MEAN)]
    known = [value for each in turns if len(each) >= turn and (value := each[turn - 1]) is not None]
    return statistics.fmean(known) if known else None


def flips(pairs: Sequence[Pair], place: Place) -> Flips:
    """What flipped from the first run to the second, of all seeds; over all slices where the cell is their mean."""
    total = Flips()
    for ours, theirs in pairs:
        for name in _members(ours.examples, place):
            total += _flips(ours.examples[name], theirs.examples[name], place[1])
    return total


def _flips(ours: ExampleScores, theirs: ExampleScores, turn: int | None) -> Flips:
    num_turns = ours.num_turns
    owner = np.repeat(np.arange(ours.num_labels.size), ours.num_labels.ravel())
    chosen = np.ones(len(owner), bool) if turn is None else owner % num_turns == turn - 1
    before, after, example = ours.right[chosen], theirs.right[chosen], owner[chosen] // num_turns
    num_labels, num_before, num_after = (
        np.bincount(example, weights, ours.num_examples) for weights in (None, before, after)
    )
    was, stays = num_before == num_labels, num_after == num_labels
    return Flips(
        lost=int((before & ~after).sum()),
        won=int((~before & after).sum()),
        num_labels=len(before),
        lost_examples=int((was & ~stays).sum()),
        won_examples=int((~was & stays).sum()),
        num_examples=int((num_labels > 0).sum()),
    )


def resampled(
    pairs: Sequence[Pair], metric: Metric, num_resamples: int, rng: np.random.Generator
) -> dict[Place, np.ndarray]:
    """Differences [num_resamples] of every cell: seeds drawn with replacement, then examples within each; a resample
    in which a cell has no label is NaN there."""
    cells = list(places(pairs[0][0].examples))
    totals = {place: np.zeros(num_resamples) for place in cells}
    for chosen in rng.integers(0, len(pairs), (len(pairs), num_resamples)):
        for number, pair in enumerate(pairs):
            rows = np.flatnonzero(chosen == number)
            drawn = {name: _drawn_sums(pair, name, len(rows), rng) for name in pair[0].examples}
            for place in cells:
                members = [_differences(drawn[name], metric, place[1]) for name in _members(pair[0].examples, place)]
                totals[place][rows] += np.mean(members, axis=0)
    return {place: total / len(pairs) for place, total in totals.items()}


def _drawn_sums(pair: Pair, name: str, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Sums over as many examples of a slice as it has, drawn with replacement, the same ones in both runs:
    [num_draws, runs, (nll, correct, weight), turns]."""
    values = np.stack([[run.examples[name].nll, run.examples[name].correct, run.examples[name].weight] for run in pair])
    runs, kinds, num_examples, num_turns = values.shape
    flat = np.moveaxis(values, 2, 0).reshape(num_examples, -1)
    even, step = np.full(num_examples, 1 / num_examples), max(1, BLOCK // num_examples)
    blocks = [
        rng.multinomial(num_examples, even, min(step, num_draws - start)) @ flat for start in range(0, num_draws, step)
    ]
    sums = np.concatenate(blocks) if blocks else np.zeros((0, flat.shape[1]))
    return sums.reshape(num_draws, runs, kinds, num_turns)


def _differences(sums: np.ndarray, metric: Metric, turn: int | None) -> np.ndarray:
    """The metric of the second run less that of the first [num_draws]."""
    chosen = sums.sum(axis=3) if turn is None else sums[..., turn - 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        first, second = (metric.of_many(ManySums(*chosen[:, run].T)) for run in (0, 1))
        return second - first


def interval(drawn: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of resampled values, those that are NaN left out."""
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
