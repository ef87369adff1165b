"""Pictures of what one chooses: any column of `kvlab.load` against any other."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvlab.files import write_atomic
from kvlab.lab.axes import axis_label, byte_axis
from kvlab.lab.choose import conditions, matching, with_ending
from kvlab.lab.plots import COLUMNS, beside_legend, save
from kvlab.lab.results import frame_of, interval_half_width, read_records
from kvlab.lab.styles import MARKERS, colours
from kvlab.schema import ConfigError, nearest

APART = ("memory.context_len", "memory.batch_size")
"""Columns in which the rows of a panel must agree, unless the picture shows them; so with every field of the task."""
METRIC = "quality.metric"
"""In this too, where an axis is a quality."""


def plot(
    frame: pd.DataFrame,
    x: str = "per_sequence.allocated_bytes",
    y: str = "quality.value",
    *,
    color: str | None = None,
    marker: str | None = None,
    facet: str | None = None,
    lines: bool = False,
    figure: Figure | None = None,
) -> list[Axes]:
    """Draws finished runs of a frame as `kvlab.load` gives it, or a part of it, and returns the axes.

    Names are columns, or the end of one where that is clear; `task` and `mixer` stand for their types. The seeds of a
    point are one mark with the 95% interval of their mean. Rows of other tasks, contexts or batches never share a
    panel, unless that is what x, color, marker or facet show. `color` is by default the mixer where it varies, else the
    point's name. With `lines` marks of one colour and marker are joined. Draws into `figure`, or into a new one of
    pyplot's. Raises ConfigError for a column that is not there, or is no number on an axis."""
    rows: Any = frame[frame["status"] == "done"] if "status" in frame else frame  # pandas' own types are too wide
    if rows.empty:
        raise ConfigError("runs", len(frame), "there is no finished run to draw")
    x, y = (_numbers(rows, column(rows, name)) for name in (x, y))
    color = column(rows, color) if color else "mixer.name" if _varies(rows, "mixer.name") else "point"
    marker = column(rows, marker) if marker else None
    facets = [column(rows, facet)] if facet else []
    facets += _apart(rows, [x, y, color, marker, *facets])
    is_quality = any(name.startswith("quality.") for name in (x, y)) and METRIC in rows
    if is_quality and any(_varies(members, METRIC) for members in _panels(rows, facets)):
        facets.append(METRIC)
    others = [name for name in (color, marker, *facets, METRIC if is_quality else None) if name]
    means: Any = _points(rows, x, y, list(dict.fromkeys(others)))
    panels = list(means.groupby(facets, sort=True, dropna=False)) if facets else [((), means)]
    figure = figure or _of_pyplot()
    figure.set_layout_engine("constrained")
    columns = min(len(panels), COLUMNS)
    rows_of_panels = -(-len(panels) // columns)
    figure.set_size_inches(7.0 * columns, 4.4 * rows_of_panels)
    axes = list(figure.subplots(rows_of_panels, columns, squeeze=False).flat)
    palette = colours(_ordered(means[color]), of_mixers=color == "mixer.name")
    marks = dict(zip(_ordered(means[marker]) if marker else [], _marks(), strict=False))
    for panel, (values, members) in zip(axes, panels, strict=False):
        _draw(panel, members, (x, y, color, marker), palette, marks, lines=lines)
        names = [name.removesuffix(".type").removesuffix(".name") for name in facets]
        panel.set_title(", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True)), fontsize=10)
    for panel in axes[len(panels) :]:
        panel.axis("off")
    return axes[: len(panels)]


def write(options: Any) -> list[Path]:
    """The picture and the CSV that `kvlab plot` is asked for. Raises ConfigError, before anything is written."""
    path = options.save or options.results / "plot.png"
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError("--save", str(path), "must end in .png, .pdf or .svg")
    records = read_records(options.results)
    chosen = matching(records, conditions(options.filter, records))
    figure, frame = Figure(), frame_of(chosen) if chosen else pd.DataFrame()
    names = {name: getattr(options, name) for name in ("color", "marker", "facet", "lines")}
    axes = plot(frame, options.x, options.y, **names, figure=figure)
    save(figure, [path])
    used = [column(frame, name) for name in (options.x, options.y, *filter(None, list(names.values())[:3]))]
    kept = [name for name in dict.fromkeys(["run_id", "point", "seed", *frame.attrs["varied"], *used]) if name in frame]
    table, done = path.with_suffix(".csv"), pd.DataFrame(frame[frame["status"] == "done"], columns=kept)
    write_atomic(table, done.to_csv(index=False))
    assert axes
    return [path, table]


def column(frame: Any, name: str) -> str:
    """The column of a name, or of the end of one. Raises ConfigError with the nearest names."""
    names = list(map(str, frame))
    endings = with_ending(names, name)
    for found in (name, f"{name}.type", f"{name}.name"):
        if found in names:
            return found
    if len(endings) == 1:
        return endings[0]
    legal = f"is ambiguous; legal: {', '.join(endings)}" if endings else f"no such column; {nearest(name, names)}"
    raise ConfigError("column", name, legal)


def _numbers(frame: Any, name: str) -> str:
    if not pd.api.types.is_numeric_dtype(frame[name].infer_objects()):
        raise ConfigError("column", name, "must have numbers to be an axis")
    return name


def _varies(frame: Any, name: str) -> bool:
    return bool(name in frame and frame[name].astype(str).nunique() > 1)


def _apart(frame: Any, seen: Sequence[str | None]) -> list[str]:
    """Columns that tell tasks, contexts and batches of these rows apart, unless they are `seen` already: as many as it
    takes."""
    fields = [name for name in map(str, frame) if name.startswith("task.") and name != "task.type"]
    said = {str(name).replace("measure.", "memory.") for name in seen}
    found: list[str] = []
    for name in ("task.type", *fields, *APART):
        if name in said or not _varies(frame, name):
            continue
        shown = [each for each in [*found, *said] if each.startswith("task.")]
        if any(_varies(members, name) for members in _panels(frame, shown)):
            found.append(name)
    return found


def _panels(frame: Any, names: Sequence[str]) -> list[Any]:
    """The rows that agree in some columns."""
    return [members for _, members in frame.groupby(list(names), dropna=False)] if names else [frame]


def _points(frame: Any, x: str, y: str, others: Sequence[str]) -> pd.DataFrame:
    """One row a point: means, and half of the interval of y over its seeds."""
    known = frame.dropna(subset=[x, y])
    names = list(dict.fromkeys([*others, "point"]))
    text = {name: known[name].astype(str) for name in names}
    rows = []
    for values, members in known.groupby([text[name] for name in names], sort=False):
        row = dict(zip(names, values, strict=True)) | {x: members[x].mean(), y: members[y].mean()}
        rows.append(row | {"half width": interval_half_width([float(each) for each in members[y]])})
    return pd.DataFrame(rows)


def _ordered(values: Iterable[str]) -> list[str]:
    """Different values, numbers by size."""
    found = list(dict.fromkeys(values))
    try:
        return sorted(found, key=float)
    except ValueError:
        return found


def _marks() -> tuple[str, ...]:
    return MARKERS * 8


def _draw(
    panel: Axes,
    members: Any,
    names: tuple[str, str, str, str | None],
    palette: dict[str, str],
    marks: dict[str, str],
    *,
    lines: bool,
) -> None:
    x, y, color, marker = names
    keys = [color, *([marker] if marker and marker != color else [])]
    for values, group in members.groupby(keys, sort=False):
        group = group.sort_values(x)
        mark = marks[values[-1]] if marker else "o"
        errors = group["half width"].where(group["half width"] > 0)
        style = {"color": palette[values[0]], "fmt": mark, "ls": "-" if lines else "", "ms": 7, "capsize": 3}
        panel.errorbar(group[x], group[y], yerr=None if errors.isna().all() else errors, **style)
    handles = [Line2D([], [], color=palette[name], marker="o", ls="") for name in palette]
    labels = list(palette)
    if marker and marker != color:
        handles += [Line2D([], [], color="0.4", marker=mark, ls="") for mark in marks.values()]
        labels += [f"{marker.removesuffix('.type').removesuffix('.name')} {value}" for value in marks]
    beside_legend(panel, handles, labels)
    for which, name in (("x", x), ("y", y)):
        if name.endswith(("bytes", "bytes_per_token")):
            byte_axis(panel, which)
    metric = members[METRIC].iloc[0] if METRIC in members else ""
    panel.set(xlabel=axis_label(x, metric), ylabel=axis_label(y, metric))
    panel.grid(alpha=0.25)


def _of_pyplot() -> Figure:
    import matplotlib.pyplot as plt

    return plt.figure()
