"""The check that stands before every record: the memory and the parallel form tell the same."""

from collections.abc import Sequence

from kvlab.evaluation.score import SliceScore
from kvlab.tasks.metrics import Metric


def must_agree(through: Sequence[SliceScore], parallel: Sequence[SliceScore], metric: Metric, dtype: str) -> None:
    """Raises RuntimeError, which fails the run, where a slice's two forms lie further apart than the metric tolerates."""
    for paged, plain in zip(through, parallel, strict=True):
        allowed = metric.tolerance(paged, dtype)
        if not metric.difference(paged, plain) <= allowed:  # a NaN does not agree
            raise RuntimeError(
                f"slice {paged.name}: {metric.name} through the memory is {metric.from_sums(paged):.5f}, in the parallel "
                f"form {metric.from_sums(plain):.5f}; they must agree within {allowed:g}"
            )
