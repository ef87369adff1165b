"""The bench's table and its picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.bench.goals import Result

HEADER = (
    "problem",
    "implementation",
    "device us",
    "wall us",
    "floor us",
    "of the floor",
    "times our first",
    "error, or why not",
)


def header() -> str:
    """The table's head, in Markdown."""
    return "| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER)


def rows(result: Result) -> Iterator[tuple[str, ...]]:
    """The table's lines of one problem, in the order of HEADER."""
    problem = result.problem
    if result.failed:
        yield (problem.name, "nobody", *["-"] * 5, result.failed)
    first = result.best.device_us if result.best else None
    for timing in result.timings:
        if timing.device_us is None:
            yield (problem.name, timing.name, *["-"] * 5, timing.absent)
            continue
        assert timing.wall_us is not None
        yield (
            problem.name,
            timing.name,
            f"{timing.device_us:.1f}",
            f"{timing.wall_us:.1f}",
            "-" if result.floor_us is None else f"{result.floor_us:.1f}",
            "-" if timing.fraction is None else f"{timing.fraction:.2f}",
            f"{timing.device_us / first:.2f}" if first else "",
            "; ".join(filter(None, ("" if timing.error is None else f"{timing.error:.1e}", timing.doubt))),
        )


def plot(points: Sequence[dict[str, Any]], limits: dict[str, float], path: Path) -> None:
    """Bandwidth over context, a line for each batch, and what reading alone reaches where that is known. Raises
    ModuleNotFoundError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for batch in sorted({point["batch"] for point in points}):
        mine = [point for point in points if point["batch"] == batch]
        axes.plot(
            [point["context"] for point in mine],
            [point["bytes_per_s"] / 1e9 for point in mine],
            "o-",
            label=f"B{batch:.0f}",
        )
    if "read_bytes_per_s" in limits:
        axes.axhline(limits["read_bytes_per_s"] / 1e9, color="0.5", linestyle="--", label="reading alone")
    axes.set_xscale("log", base=2)
    contexts = sorted({point["context"] for point in points})
    axes.set_xticks(contexts, [f"{context:,.0f}" for context in contexts])
    axes.set(xlabel="context, tokens", ylabel="live bytes read, GB/s", title="Paged decode: achieved bandwidth")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
