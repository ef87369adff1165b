"""Metrics: each is one object that says everything about itself. A new one is one more object, here, or an entry point
of another package.

Scoring sums; a metric makes its number of the sums. Training asks it what is better, evaluation what still counts as
equal, plots and tables how people call it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from kvlab.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over the labels of some sequences: nats, right answers and weights."""

    nll: float
    correct: float
    weight: float


@dataclass(frozen=True, eq=False)
class ManySums:
    """Many such sums at once, as arrays that are alike."""

    nll: np.ndarray
    correct: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleScores:
    """What every example of a slice scored in each of its turns, in order of the task's examples.

    `nll` (nats), `correct` and `weight` are sums over labels, float64 [examples, turns]; `num_labels` counts these,
    int32 [examples, turns]. `right` says of each label whether it was right, bool [labels]: example by example, in each
    by position, and so by turn.
    """

    nll: np.ndarray
    correct: np.ndarray
    weight: np.ndarray
    num_labels: np.ndarray
    right: np.ndarray

    @property
    def num_examples(self) -> int:
        """How many examples there are."""
        return len(self.weight)

    @property
    def num_turns(self) -> int:
        """How many turns each has."""
        return self.weight.shape[1]

    def sums(self, turn: int | None = None) -> Sums:
        """Sums over all examples, of one turn (counted from 0) or of all."""
        chosen = slice(None) if turn is None else slice(turn, turn + 1)
        return Sums(**{name: float(getattr(self, name)[:, chosen].sum()) for name in ("nll", "correct", "weight")})


NO_EXAMPLES = ExampleScores(
    nll=np.zeros((0, 1)),
    correct=np.zeros((0, 1)),
    weight=np.zeros((0, 1)),
    num_labels=np.zeros((0, 1), np.int32),
    right=np.zeros(0, bool),
)
"""Of sums whose examples were not kept."""

TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}
"""By a model's type: how far the memory's form and the parallel form may differ. Their sums differ in the last bits."""


@dataclass(frozen=True)
class Metric:
    """What a task reports: `name` in records, `label` for people, and how it is made from sums: by what numpy computes
    elementwise, so that `ManySums` serve as well.

    `compared` is what must agree between the memory's form and the parallel form, where that is not the metric itself.
    `num_flips` labels of a slice may differ besides: a near tie flips an argmax. `chance` is what a blind guess among
    some number of equally likely labels scores. A comparison tells something only where the full memory reaches
    `floor` (null: is better than chance), and chance does not.
    """

    name: str
    label: str
    higher_is_better: bool
    from_sums: Callable[[Sums], float]
    compared: Callable[[Sums], float] | None = None
    num_flips: int = 0
    chance: Callable[[int], float] | None = None
    floor: float | None = None

    def mean(self, slices: Sequence[Sums]) -> float:
        """The plain mean over slices, as the papers average."""
        return float(np.mean([self.from_sums(sums) for sums in slices]))

    def of_many(self, sums: ManySums) -> np.ndarray:
        """Its number for each of many sums."""
        return np.asarray(self.from_sums(cast(Any, sums)))

    def by_turn(self, examples: ExampleScores) -> list[float | None]:
        """Its number for each turn; None for a turn without labels."""
        sums = map(examples.sums, range(examples.num_turns))
        return [self.from_sums(each) if each.weight else None for each in sums]

    def is_discriminative(self, ceiling: float, chance: float | None, floor: float | None = None) -> bool | None:
        """Whether differences below a ceiling tell something: it reaches the `floor` (by default the metric's own), and
        chance does not. Without a floor it must be better than chance; None where neither is known."""
        floor = self.floor if floor is None else floor
        if floor is None:
            return None if chance is None else self.is_better(ceiling, chance)
        return self.has_reached(ceiling, floor) and (chance is None or self.is_better(floor, chance))

    def is_better(self, value: float, than: float) -> bool:
        """Whether a value is strictly better than another."""
        return value > than if self.higher_is_better else value < than

    def has_reached(self, value: float, goal: float) -> bool:
        """Whether a value is at least as good as another."""
        return value == goal or self.is_better(value, goal)

    def difference(self, ours: Sums, theirs: Sums) -> float:
        """How far two forms of the same model lie apart, in what is compared."""
        compared = self.compared or self.from_sums
        return abs(compared(ours) - compared(theirs))

    def tolerance(self, sums: Sums, dtype: str) -> float:
        """How far they may lie apart in a model that computes in `dtype`."""
        return max(TOLERANCES[dtype], self.num_flips / sums.weight)


def _nats(sums: Any) -> Any:
    return sums.nll / sums.weight


ACCURACY = Metric(
    "accuracy",
    "accuracy",
    True,
    lambda sums: sums.correct / sums.weight,
    num_flips=2,
    chance=lambda num_choices: 1 / num_choices,
    floor=0.75,
)
BITS_PER_BYTE = Metric(
    "bits_per_byte", "bits per byte", False, lambda sums: _nats(sums) / math.log(2), chance=math.log2
)
PERPLEXITY = Metric(
    "perplexity",
    "perplexity",
    False,
    lambda sums: np.exp(np.minimum(_nats(sums), 700.0)),
    compared=_nats,
    chance=float,
)

OURS = {metric.name: metric for metric in (ACCURACY, BITS_PER_BYTE, PERPLEXITY)}
METRICS = Registry[Metric]("kvlab.metrics", Metric, OURS, is_made=True, called="name", field="metric")
"""By the name that records carry."""


def metric_label(name: str) -> str:
    """How people call a metric of a record; a metric that is not known here keeps its name."""
    metric = METRICS.get(name)
    return name if metric is None else metric.label
