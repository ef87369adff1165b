"""Whether the kernels are right on the device at hand: every op's contract, in what a kernel there takes."""

from collections.abc import Iterator
from typing import Any

import jax

from pallas_kernels.ops import OPS, WITH_KERNELS
from pallas_kernels.selection import recording

PLATFORMS = ("gpu", "tpu", "cpu")


def cases(platform: str, num_generated: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Op, name and arguments of every case in sizes that the kernels of a platform take, or of "cpu" where it is none
    of ours."""
    platform = platform if platform in PLATFORMS else "cpu"
    return [
        (op.name, name, case)
        for op in WITH_KERNELS.values()
        for name, case in op.cases(platform, num_generated).items()
    ]


def check(op: str, name: str, num_generated: int) -> Iterator[dict[str, Any]]:
    """Runs one of `cases` on this process' first device, with what `None` chooses: before it, what is run, and after
    it, by which implementations it was answered (`by`), and what was wrong (`wrong`, empty where it is right). Raises
    ValueError for no such case."""
    platform = jax.devices()[0].platform
    found = {(op, name): case for op, name, case in cases(platform, num_generated)}
    if (op, name) not in found:
        raise ValueError(f"case = {op}: {name}: is none of the {len(found)} of {platform}")
    answer = {"op": op, "by": [], "wrong": ""}
    yield answer
    with recording() as taken:
        try:
            OPS[op].check(**found[op, name])
        except Exception as error:  # wrong, or not to be run: both are failures
            answer["wrong"] = said(error)
    yield answer | {"by": sorted(taken.get(op, ()))}


def said(error: Exception) -> str:
    """Its type and first line."""
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0]}"[:200]
