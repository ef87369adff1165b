"""The frontier as a picture: quality against the bytes a sequence holds, one colour and name per variant,
everywhere."""

import hashlib
import io
import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kvlab.evaluation.measure import AXES
from kvlab.files import write_atomic
from kvlab.lab.results import Point, non_dominated
from kvlab.tasks.metrics import metric_label
from kvlab.units import human_bytes

COLOURS = {
    "mha": "#0072b2",
    "gqa": "#56b4e9",
    "mqa": "#009e73",
    "mla": "#1b9e9e",
    "swa": "#e69f00",
    "swa16": "#f5c26b",
    "swa32": "#e69f00",
    "swa64": "#a86f00",
    "gated_deltanet": "#5b3a8c",
    "deltanet": "#8a6fb8",
    "deltaproduct": "#b9a3d9",
    "kda": "#2f6b4f",
    "linear_attention": "#7f7f7f",
    "retnet": "#b0b0b0",
    "gla": "#9c755f",
    "mamba2": "#cc79a7",
    "mamba2_n16": "#e0a9c8",
    "mamba2_n64": "#a8487c",
    "mamba3": "#7a2f5c",
    "based": "#86bcb6",
    "rglru": "#b07aa1",
    "griffin": "#d37295",
    "hybrid": "#d55e00",
    "indexed": "#1b6e8c",
}
OTHERS = ("#332288", "#117733", "#882255", "#44aa99", "#999933", "#aa4499", "#661100", "#6699cc")


def colour(variant: str) -> str:
    """The variant's colour; unknown names get one of a second palette, always the same."""
    if variant in COLOURS:
        return COLOURS[variant]
    return OTHERS[hashlib.sha256(variant.encode()).digest()[0] % len(OTHERS)]


def by_task(found: list[Point]) -> dict[str, list[Point]]:
    """Points of each task, tasks in order of appearance."""
    tasks: dict[str, list[Point]] = {}
    for point in found:
        tasks.setdefault(point.task, []).append(point)
    return tasks


def draw_frontier(found: list[Point], title: str, paths: list[Path], axis: str = "allocated_bytes") -> None:
    """One panel a task, bytes on a log axis, intervals over seeds, the non-dominated points joined by a step line.

    Bits per byte point downwards and start at zero, so that up is better everywhere and no difference is magnified.
    Raises ValueError when there is no point.
    """
    if not found:
        raise ValueError("there is no finished run to draw")
    tasks = by_task(found)
    figure, axes = plt.subplots(1, len(tasks), figsize=(6.2 * len(tasks), 4.6), squeeze=False, layout="constrained")
    for panel, (task, members) in zip(axes[0], tasks.items(), strict=True):
        _draw_panel(panel, task, members, axis)
    figure.suptitle(title)
    _save(figure, paths)


def _draw_panel(panel: Axes, task: str, members: list[Point], axis: str) -> None:
    members = [point for point in members if axis in point.bytes_per_sequence]
    if not members:
        raise ValueError(f"no point of {task} has {axis}: their records are from before it was measured")
    frontier = non_dominated(members, axis)
    sizes = [point.bytes_per_sequence[axis] for point in frontier]
    panel.step(sizes, [p.value for p in frontier], where="post", color="0.6", lw=1.2, ls="--", zorder=1)
    for point in members:
        size = point.bytes_per_sequence[axis]
        errors = [[point.value - point.low], [point.high - point.value]] if point.interval else None
        style = {"color": colour(point.variant), "ms": 8, "capsize": 3, "zorder": 3}
        panel.errorbar(size, point.value, yerr=errors, fmt="o", label=_plainly(point.name), **style)
    first = members[0]
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda size, _: human_bytes(size).replace(".0 ", " ")))
    panel.set_xlabel(AXES[axis] + f"\nat {first.context_len} tokens")
    panel.set_ylabel(metric_label(first.metric))
    if first.higher_is_better:
        panel.set_ylim(-0.03, 1.05)
    else:
        panel.set_ylim(1.15 * max(point.high for point in members), 0)
    panel.set_title(f"{task}: {metric_label(first.metric)} against memory")
    panel.grid(alpha=0.25, which="both")
    panel.legend(fontsize=8, loc="lower right" if first.higher_is_better else "upper right", framealpha=0.9)


def _save(figure: Figure, paths: list[Path]) -> None:
    """The picture in each file, wholly or not at all: a link in its place is replaced, not followed."""
    for path in paths:
        buffer, metadata = io.BytesIO(), {"CreationDate": None} if path.suffix == ".pdf" else None
        figure.savefig(buffer, format=path.suffix[1:], dpi=160, metadata=metadata)
        write_atomic(path, buffer.getvalue())
    plt.close(figure)


def _plainly(name: str) -> str:
    """A name as matplotlib draws it as it is: dollars would begin a formula."""
    return name.replace("$", r"\$")


def draw_needle(found: list[Point], paths: list[Path]) -> None:
    """Heat maps of the needle task, one a variant: accuracy at every context length and depth. Raises ValueError when
    there is no point of that task."""
    members = [point for point in found if point.task == "needle"]
    if not members:
        raise ValueError("there is no finished run of task=needle to draw")
    columns = min(len(members), 4)
    rows = -(-len(members) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns + 0.8, 3.2 * rows), squeeze=False, layout="constrained"
    )
    image = None
    for panel, point in zip(axes.flat, members, strict=False):
        named = [(re.fullmatch(r"(\d{1,9})@(\d{1,3})", name), value) for name, value in point.slices.items()]
        cells = {(int(found[1]), int(found[2])): value for found, value in named if found}
        contexts, depths = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
        grid = [[cells.get((context, depth), float("nan")) for context in contexts] for depth in depths]
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, values in enumerate(grid):
            for x, value in enumerate(values):
                panel.text(
                    x,
                    y,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    color="white" if value < 0.6 else "black",
                    fontsize=8,
                )
        panel.set_xticks(range(len(contexts)), [str(context) for context in contexts])
        panel.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths])
        panel.set_xlabel("context, tokens")
        panel.set_ylabel("depth of the needle")
        size = human_bytes(point.bytes_per_sequence["allocated_bytes"])
        panel.set_title(f"{_plainly(point.name)}\n{size} a sequence", fontsize=9)
    for panel in list(axes.flat)[len(members) :]:
        panel.axis("off")
    assert image is not None
    figure.colorbar(image, ax=axes, label="accuracy of the digits")
    _save(figure, paths)
