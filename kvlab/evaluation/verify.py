"""The check that stands before every record: the memory and the parallel form tell the same.

A memory that stores what the model computes must agree with the model's parallel form. One in a lossy format must agree
with the parallel form whose keys and values are rounded to that format: what the format costs is then its own, and no
error of the memory hides in it.
"""

from collections.abc import Sequence

from kvlab.evaluation.score import Scorer, SliceScore
from kvlab.memory.layout import MemoryConfig, MemoryLayout, stored_states
from kvlab.memory.views import LayerStates
from kvlab.tasks.metrics import Metric
from kvlab.typing import Params

EXACT = "the parallel form"


def verify(
    scorer: Scorer,
    params: Params,
    through: Sequence[SliceScore],
    parallel: Sequence[SliceScore],
    *,
    layout: MemoryLayout,
    states: Sequence[LayerStates],
    memory: MemoryConfig,
    dtype: str,
) -> str:
    """Compares the test slices through the memory with what this memory is to agree with; returns what that was.

    `states` are those of the model. Raises RuntimeError, which fails the run, where they do not agree.
    """
    expected, name = parallel, EXACT
    if not layout.is_exact:
        expected = scorer.parallel(params, "test", stored_states(states, memory))
        name = f"{EXACT} with what is stored rounded to {memory.format}"
    must_agree(through, expected, scorer.task.metric, dtype, name)
    return name


def must_agree(
    through: Sequence[SliceScore], expected: Sequence[SliceScore], metric: Metric, dtype: str, name: str = EXACT
) -> None:
    """Raises RuntimeError where a slice's two forms lie further apart than the metric tolerates."""
    for paged, plain in zip(through, expected, strict=True):
        allowed = metric.tolerance(paged, dtype)
        if not metric.difference(paged, plain) <= allowed:  # a NaN does not agree
            raise RuntimeError(
                f"slice {paged.name}: {metric.name} through the memory is {metric.from_sums(paged):.5f}, in {name} "
                f"{metric.from_sums(plain):.5f}; they must agree within {allowed:g}"
            )
