"""The frontier as a picture: quality against the bytes a sequence holds. Functions that return axes leave matplotlib's
backend alone, and draw into a figure of the caller's where one is given; those that write files open no window."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvlab.evaluation.measure import AXES
from kvlab.files import write_atomic
from kvlab.lab.axes import byte_axis
from kvlab.lab.panels import by_panel, names_within, styles_of, where
from kvlab.lab.results import Point, non_dominated
from kvlab.lab.styles import Style
from kvlab.tasks.metrics import metric_label
from kvlab.units import human_bytes

COLUMNS = 3
"""Panels beside each other, before a new row begins."""
MARK_POINTS = 8.0
"""How large a mark is, in points of print."""


def frontier(found: Sequence[Point], axis: str = "allocated_bytes", figure: Figure | None = None) -> list[Axes]:
    """One panel for each task, context and batch: bytes on a log axis, intervals over seeds, the non-dominated points
    joined by a step line; colour and marker are by what is swept. Draws into `figure`, or into a new one of pyplot's.

    Bits per byte point downwards and start at zero, so that up is better everywhere and no difference is magnified.
    Raises ValueError when there is no point.
    """
    if not found:
        raise ValueError("there is no finished run to draw")
    panels = by_panel(found)
    looks = styles_of(found)
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    if figure is None:
        import matplotlib.pyplot as plt

        figure = plt.figure()
    figure.set_layout_engine("constrained")
    figure.set_size_inches(7.4 * columns, 4.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel, (name, members) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(panel, name, members, axis, [looks[id(point)] for point in members])
    for panel in list(axes.flat)[len(panels) :]:
        panel.axis("off")
    return list(axes.flat)[: len(panels)]


def draw_frontier(found: Sequence[Point], title: str, paths: Sequence[Path], axis: str = "allocated_bytes") -> None:
    """`frontier` with a title, as files."""
    figure = Figure()
    frontier(found, axis, figure)
    figure.suptitle(title)
    save(figure, paths)


def sheet(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **kind: Any) -> tuple[Figure, Any]:
    """A figure of `size` inches that belongs to no window, and its panels as `Figure.subplots` returns them, with that
    function's options; for `save`."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **kind)


def save(figure: Figure, paths: Sequence[Path]) -> None:
    """The picture in each file, wholly or not at all, the same bytes each time: a link in its place is replaced, not
    followed."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer, metadata = io.BytesIO(), {"CreationDate": None} if path.suffix == ".pdf" else None
        figure.savefig(buffer, format=path.suffix[1:], dpi=160, metadata=metadata)
        write_atomic(path, buffer.getvalue())


def _draw_panel(panel: Axes, name: str, members: list[Point], axis: str, looks: Sequence[Style]) -> None:
    each = zip(members, names_within(members), looks, strict=True)
    known = [(point, label, style) for point, label, style in each if axis in point.bytes_per_sequence]
    if not known:
        raise ValueError(f"no point of {name} has {axis}: their records are from before it was measured")
    best = non_dominated([point for point, *_ in known], axis)
    sizes = [point.bytes_per_sequence[axis] for point in best]
    panel.step(sizes, [p.value for p in best], where="post", color="0.6", lw=1.2, ls="--", zorder=1)
    marks = list[Line2D]()
    for point, label, style in known:
        size = point.bytes_per_sequence[axis]
        errors = [[point.value - point.low], [point.high - point.value]] if point.interval else None
        look = {"color": style.colour, "fmt": style.marker, "ms": MARK_POINTS, "capsize": 3, "zorder": 3}
        marks.append(panel.errorbar(size, point.value, yerr=errors, label=_plainly(label), **look).lines[0])
    first = members[0]
    byte_axis(panel)
    panel.set_xlabel(f"{AXES[axis]}\n{where(first)}")
    panel.set_ylabel(metric_label(first.metric))
    if first.higher_is_better:
        panel.set_ylim(-0.03, 1.05)
    else:
        panel.set_ylim(1.15 * max(point.high for point in members), 0)
    panel.set_title(f"{_plainly(name)}: {metric_label(first.metric)} against memory")
    panel.grid(alpha=0.25, which="both")
    unhide(panel, marks)
    beside_legend(panel)


def unhide(panel: Axes, marks: Sequence[Line2D]) -> None:
    """Of marks of one point that lie on each other each is smaller than the one below it, so that all are seen."""
    places = [panel.transData.transform(mark.get_xydata())[0] for mark in marks]
    near = MARK_POINTS / 2 * panel.figure.dpi / 72
    for number, (mark, place) in enumerate(zip(marks, places, strict=True)):
        below = [other.get_markersize() for other, there in zip(marks[:number], places, strict=False)
                 if math.dist(place, there) < near]  # fmt: skip
        if below:
            mark.set_markersize(max(2.0, min(below) - 3))
            mark.set_zorder(3 + len(below))


def beside_legend(panel: Axes, handles: Sequence[Artist] = (), labels: Sequence[str] = ()) -> None:
    """A legend to the right of a panel, where it hides no point, of what was drawn with a label unless entries are
    given; of many in small print."""
    if not handles:
        handles, labels = panel.get_legend_handles_labels()
    if handles:
        size = 8 if len(handles) <= 20 else max(3, 160 / len(handles))
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0}
        panel.legend(handles, labels, fontsize=size, frameon=False, **place)


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
    figure = Figure(figsize=(3.4 * columns + 0.8, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
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
        panel.set_title(f"{_plainly(point.name)}\n{size} a sequence of {point.context_len:,}", fontsize=9)
    for panel in list(axes.flat)[len(members) :]:
        panel.axis("off")
    assert image is not None
    figure.colorbar(image, ax=axes, label="accuracy of the digits")
    save(figure, paths)
