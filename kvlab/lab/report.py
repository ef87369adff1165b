"""The report of a folder of results: one self-contained page, the frontier as PNG and PDF, its data as CSV; of the
needle task its heat maps."""

import base64
import html
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from kvlab.evaluation.measure import AXES, SpeedReport, measures
from kvlab.files import write_atomic
from kvlab.lab.labels import point_labels, without_seed
from kvlab.lab.panels import by_panel, names_within, styles_of, where
from kvlab.lab.plots import draw_frontier, draw_needle
from kvlab.lab.protocol import protocol_rows
from kvlab.lab.record import AnyRecord, Done, Unfinished
from kvlab.lab.results import Point, non_dominated, points, read_metrics, read_records
from kvlab.lab.styles import SYMBOLS, Style, styles
from kvlab.tasks.metrics import metric_label
from kvlab.units import counted, human_bytes

MAX_CURVE_POINTS = 200


def write_report(results: Path, output: Path) -> list[Path]:
    """Writes report.html, frontier.png, frontier.pdf and frontier.csv into `output`; returns their paths.

    Without any finished run only the page is written: it lists the failed ones. Raises FileNotFoundError for a folder
    without runs.
    """
    records = read_records(results)
    found = points(records)
    protocol = protocol_rows(found, records)
    output.mkdir(parents=True, exist_ok=True)
    title = ", ".join(sorted({record.experiment for record in records}))
    written = []
    if found:
        pictures = [output / "frontier.png", output / "frontier.pdf"]
        draw_frontier(found, title, pictures)
        table = output / "frontier.csv"
        write_atomic(table, frontier_frame(found, protocol).to_csv(index=False))
        written = [*pictures, table]
    heat_map = None
    if any(point.task == "needle" for point in found):
        written += [output / "needle.png", output / "needle.pdf"]
        draw_needle(found, written[-2:])
        heat_map = written[-2].read_bytes()
    page = output / "report.html"
    write_atomic(page, render_page(title, records, found, protocol, heat_map))
    return [page, *written]


def frontier_frame(found: list[Point], protocol: list[dict[str, Any]] | None = None) -> pd.DataFrame:
    """The plotted data: one row a point, with what `protocol_rows` adds where it is given."""
    best = {id(point) for members in by_panel(found).values() for point in non_dominated(members)}
    rows = []
    for point, added in zip(found, protocol or [{}] * len(found), strict=True):
        row: dict[str, Any] = {"task": point.task, "variant": point.name, "metric": point.metric, "value": point.value}
        low, high = point.interval or (None, None)
        row |= {"low": low, "high": high, "num_seeds": point.num_seeds}
        row |= {"context_len": point.context_len, "batch_size": point.batch_size}
        row |= {csv_name(axis): point.bytes_per_sequence.get(axis) for axis in AXES}
        row |= {"non_dominated": id(point) in best, "num_params": point.num_params}
        row |= {name.replace(" ", "_"): value for name, value in added.items()}
        row |= point.fidelity | point.speeds
        row |= {"learning_rates": " ".join(f"{rate:g}" for rate in point.learning_rates)}
        row |= {f"slice {name}": value for name, value in point.slices.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def csv_name(axis: str) -> str:
    """The column of an axis in frontier.csv."""
    return axis if axis == "read_bytes_per_token" else f"{axis}_per_sequence"


def render_page(
    title: str,
    records: list[AnyRecord],
    found: list[Point],
    protocol: list[dict[str, Any]],
    heat_map: bytes | None = None,
) -> str:
    """The page's HTML, with what `protocol_rows` adds to its points, and the needle task's picture (PNG) where there is
    one. Everything that comes from records is escaped; scripts and data are inside, nothing is fetched."""
    from plotly.offline import get_plotlyjs  # only pages need it: runs do without

    template = Template(importlib.resources.files("kvlab.lab").joinpath("page.html").read_text())
    failed = [record for record in records if isinstance(record, Unfinished)]
    panels = by_panel(found)
    labels = dict(zip(map(id, records), point_labels([record.config for record in records]), strict=True))
    summary = f"{counted(len(records), 'run')}, {len(records) - len(failed)} done, {len(failed)} not; "
    summary += f"{counted(len(found), 'point')}."
    charts = "".join(
        f'<section><h2>{html.escape(task)}: quality against memory</h2><div class="chart" id="frontier-{index}"></div>'
        "</section>"
        for index, task in enumerate(panels)
    )
    if heat_map is not None:
        encoded = base64.b64encode(heat_map).decode()
        picture = (
            f'<img alt="accuracy by context and depth" style="max-width:100%" src="data:image/png;base64,{encoded}">'
        )
        charts += f"<section><h2>needle: context and depth</h2>{picture}</section>"
    return template.substitute(
        title=html.escape(title),
        summary=html.escape(summary),
        charts=charts,
        axis_options="".join(
            f'<option value="{axis}"{" selected" if axis == "allocated_bytes" else ""}>{html.escape(name)}</option>'
            for axis, name in AXES.items()
        ),
        table=_table(_point_rows(found, protocol), "points", sortable=True),
        failed=_table([_failed_row(record, labels[id(record)]) for record in failed], "failed"),
        provenance=_table(_provenance_rows(records, labels), "provenance"),
        data=_script_json(_page_data(records, panels, labels)),
        plotly=get_plotlyjs(),
    )


def _script_json(value: Any) -> str:
    """JSON that cannot close the script element it stands in."""
    return json.dumps(value).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


type Labels = Mapping[int, str]
"""How records are called among each other, by their `id`: a run id may be in several folders."""


def _page_data(records: list[AnyRecord], panels: dict[str, list[Point]], labels: Labels) -> dict[str, Any]:
    found = [point for members in panels.values() for point in members]
    looks = styles_of(found)
    lines = styles([without_seed(record.config) for record in records])
    curves = (_curve(record, labels[id(record)], style) for record, style in zip(records, lines, strict=True))
    return {
        "axes": AXES,
        "tasks": [_panel_data(name, members, looks) for name, members in panels.items()],
        "curves": [curve for curve in curves if curve],
        "layers": [
            {
                "name": html.escape(f"{point.name} ({point.task})"),
                "layers": [html.escape(f"{row['layer']}: {row['state']}") for row in point.layers],
                "bytes": [row["allocated_bytes"] for row in point.layers],
            }
            for point in found
        ],
    }


def _panel_data(name: str, members: list[Point], looks: Mapping[int, Style]) -> dict[str, Any]:
    first = members[0]
    return {
        "task": html.escape(name),
        "metric": html.escape(metric_label(first.metric)),
        "higher_is_better": first.higher_is_better,
        "where": where(first),
        "frontiers": {
            axis: [[p.bytes_per_sequence[axis], p.value] for p in non_dominated(members, axis)] for axis in AXES
        },
        "points": [
            {
                "name": html.escape(label),
                "colour": looks[id(point)].colour,
                "symbol": SYMBOLS[looks[id(point)].marker],
                "value": point.value,
                "plus": point.high - point.value,
                "minus": point.value - point.low,
                "num_seeds": point.num_seeds,
                "seeds": counted(point.num_seeds, "seed"),
                "bytes": point.bytes_per_sequence,
            }
            for point, label in zip(members, names_within(members), strict=True)
        ],
    }


def _curve(record: AnyRecord, label: str, style: Style) -> dict[str, Any] | None:
    """Loss over steps of a run's chosen trial (of all its rows while there is none), thinned."""
    chosen = record.training.learning_rate if isinstance(record, Done) else None
    rows = [row for row in read_metrics(record) if chosen is None or row["learning_rate"] == chosen]
    if not rows:
        return None
    rows = rows[:: max(1, len(rows) // MAX_CURVE_POINTS)]
    return {
        "name": html.escape(f"{label} seed {record.seed}"),
        "task": html.escape(record.config["task"]["type"]),
        "colour": style.colour,
        "steps": [row["step"] for row in rows],
        "losses": [row["loss"] for row in rows],
    }


def _point_rows(found: list[Point], protocol: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for point, added in zip(found, protocol, strict=True):
        row: dict[str, Any] = {"task": point.task, "variant": point.name, "metric": point.metric, "value": point.value}
        row |= {"± 95%": point.half_width, "seeds": point.num_seeds}
        row |= {_heading(axis): point.bytes_per_sequence.get(axis) for axis in AXES}
        row |= {"context": point.context_len, "batch": point.batch_size, "parameters": point.num_params}
        row |= {each.column: point.speeds[name] for name, each in measures(SpeedReport).items() if each.column}
        rows.append(row | added)
    return rows


def _heading(axis: str) -> str:
    return "read B/token" if axis == "read_bytes_per_token" else f"{axis.removesuffix('_bytes')} B/seq"


def _failed_row(record: Unfinished, label: str) -> dict[str, Any]:
    row = {"run": record.run_id, "variant": label, "task": record.config["task"]["type"]}
    return row | {"seed": record.seed, "status": record.status, "reason": record.reason}


def _provenance_rows(records: list[AnyRecord], labels: Labels) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        origin = record.provenance
        if origin is None:
            continue
        commit = f"{(origin.git_commit or 'no checkout')[:12]}{' (dirty)' if origin.git_dirty else ''}"
        versions = " ".join(f"{name} {version}" for name, version in origin.versions.items())
        row = {"run": record.run_id, "variant": labels[id(record)], "seed": record.seed}
        row |= {"commit": commit, "device": f"{origin.device.get('kind')} x{origin.device.get('count')}"}
        row |= {"versions": versions, "XLA flags": origin.xla_flags, "wall s": record.wall_s}
        kernels = " ".join(f"{op}={name}" for op, name in origin.implementations.items())
        kernels += "".join(f" ({op}: {reason})" for op, reason in origin.passed_over.items())
        rows.append(row | {"kernels": kernels})
    return rows


def _table(rows: list[dict[str, Any]], name: str, *, sortable: bool = False) -> str:
    """Rows as an HTML table; numbers carry their exact value for sorting."""
    if not rows:
        return "<p>None.</p>"
    button = "<button type='button'>{}</button>" if sortable else "{}"
    head = "".join(f"<th>{button.format(html.escape(column))}</th>" for column in rows[0])
    body = "".join("<tr>" + "".join(_cell(column, row[column]) for column in rows[0]) + "</tr>" for row in rows)
    return f"<table id='{name}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "<td data-value=''>-</td>"
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, int | float):
        shown = human_bytes(value) if "B/" in column else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        return f"<td class='number' data-value='{value}'>{shown}</td>"
    return f"<td data-value='{html.escape(str(value), quote=True)}'>{html.escape(str(value))}</td>"
