"""The check that stands before every record: the memory and the parallel form tell the same.

A memory that stores what the model computes must agree with the model's parallel form. A lossy one must give the logits
of the parallel form whose keys and values are rounded as it rounds them, under the mask that its compactions imply:
what a format or a compression costs is then its own, and no error of the memory hides in it.
"""

import re
from collections.abc import Sequence

from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.score import SliceScore
from kvlab.memory.layout import MemoryConfig
from kvlab.tasks.metrics import Metric

EXACT = "the parallel form"
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""The largest difference of a logit, relative to the largest of its position; and of a number before it is stored."""
SCALE_TOLERANCE = 3 * 2.0**-7
"""Scales and zero points in bfloat16 may be rounded either way as well, which moves either by 2^-7 of it: what codes
times the scale span is at most twice the largest number, and the zero point once."""


def verify(
    through: Sequence[SliceScore],
    parallel: Sequence[SliceScore],
    metric: Metric,
    *,
    memory: MemoryConfig,
    dtype: str,
    check: MaskCheck | None = None,
) -> str:
    """Says what the test slices through the memory agree with: the parallel form's scores, or, of a lossy memory, the
    logits that `check` compared. Raises RuntimeError, which fails the run, where they do not agree."""
    if check is None:
        must_agree(through, parallel, metric, dtype)
        return EXACT
    name = EXACT
    if memory.format != "model":
        name += f" with what is stored rounded to {memory.format}"
    masks = {"kept": memory.compression, "read": memory.selection}
    if applied := [what for what, method in masks.items() if method is not None]:
        name += f" under the mask of what it {' and '.join(applied)}"
    ties = LOGIT_TOLERANCE[dtype] + (SCALE_TOLERANCE if check.layout.has_short_scales else 0)
    if not check.worst_stored <= ties:
        raise RuntimeError(
            f"what memory.format = {memory.format} stores lies further from what was computed than rounding does, by "
            f"{check.worst_stored:.2g} of the largest number of its scale; ties explain {ties:.2g}"
        )
    if not check.worst <= LOGIT_TOLERANCE[dtype]:
        raise RuntimeError(
            f"logits through the memory differ from {name} by {check.worst:.2g} of the largest; they must agree within "
            f"{LOGIT_TOLERANCE[dtype]:g}"
        )
    return name


def in_short(verified_by: str) -> str:
    """What `verify` said, in a word or two: "exact", "int8" where what is stored was rounded to it, "mask" where the
    parallel form was under the mask of what the memory kept or read."""
    if verified_by == EXACT:
        return "exact"
    rounded = re.findall(r"rounded to (\w+)", verified_by)
    return " ".join([*rounded, *(["mask"] if "under the mask" in verified_by else [])]) or verified_by


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
