"""The report as one page of HTML, to be read anywhere: data, scripts and pictures are inside, nothing is fetched."""

import base64
import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from kvlab.evaluation.measure import AXES, SpeedReport, measures
from kvlab.lab.again import command
from kvlab.lab.curves import curve_groups
from kvlab.lab.labels import point_labels
from kvlab.lab.panels import by_panel, names_within, styles_of, where
from kvlab.lab.record import AnyRecord, Unfinished
from kvlab.lab.results import Point, non_dominated
from kvlab.lab.styles import DASHES, SYMBOLS, Style
from kvlab.tasks.metrics import ACCURACY, metric_label
from kvlab.units import counted, human_bytes, readable

MAX_SLICES = 40
"""Slices that a chart has room for."""
WIDE = 40
"""Characters of a cell from which on it is broken into lines."""


def render_page(
    title: str,
    records: Sequence[AnyRecord],
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
    groups = curve_groups(records)
    data = _script_json(_page_data(groups, panels))
    return template.substitute(
        title=html.escape(title),
        summary=html.escape(summary),
        frontiers="".join(
            _chart(f"frontier-{place}", f"{task}: quality against memory") for place, task in enumerate(panels)
        ),
        slices="".join(
            _chart(f"slices-{place}", f"{task}: quality by slice")
            for place, (task, members) in enumerate(panels.items())
            if _slices_of(members)
        )
        + _heat_map(heat_map),
        curves="".join(_curve_charts(place, group) for place, group in enumerate(groups)) or "<p>None.</p>",
        axis_options="".join(
            f'<option value="{axis}"{" selected" if axis == "allocated_bytes" else ""}>{html.escape(name)}</option>'
            for axis, name in AXES.items()
        ),
        table=_table(_point_rows(found, protocol), "points", sortable=True),
        by_slice=_slice_tables(panels),
        commands=_commands(found, records),
        failed=_table([_failed_row(record, labels[id(record)]) for record in failed], "failed"),
        provenance=_table_and_common(_provenance_rows(records, labels), "provenance"),
        data=data,
        script=importlib.resources.files("kvlab.lab").joinpath("page.js").read_text(),
        plotly=get_plotlyjs(),
    )


def _chart(name: str, title: str, level: int = 2) -> str:
    return f'<section><h{level}>{html.escape(title)}</h{level}><div class="chart" id="{name}"></div></section>'


def _heat_map(picture: bytes | None) -> str:
    if picture is None:
        return ""
    encoded = base64.b64encode(picture).decode()
    image = f'<img alt="accuracy by context and depth" class="picture" src="data:image/png;base64,{encoded}">'
    return f'<section><h2>needle: context and depth</h2><div class="wide">{image}</div></section>'


def _curve_charts(place: int, group: Mapping[str, Any]) -> str:
    """Losses beside validations of one task and length."""
    charts = _chart(f"losses-{place}", f"{group['task']}: training loss", 3)
    if any(curve["validated"] for curve in group["curves"]):
        charts += _chart(f"validations-{place}", f"{group['task']}: {group['metric']} on validation", 3)
    return f'<div class="pair">{charts}</div>'


def _script_json(value: Any) -> str:
    """JSON that cannot close the script element it stands in."""
    return json.dumps(value).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


type Labels = Mapping[int, str]
"""How records are called among each other, by their `id`: a run id may be in several folders."""


def _page_data(groups: Sequence[Mapping[str, Any]], panels: dict[str, list[Point]]) -> dict[str, Any]:
    found = [point for members in panels.values() for point in members]
    looks = styles_of(found)
    return {
        "axes": AXES,
        "tasks": [_panel_data(name, members, looks) for name, members in panels.items()],
        "groups": [_escaped(group) for group in groups],
        "layers": [
            {
                "name": html.escape(f"{point.name} ({point.task})"),
                "layers": [{"layer": row["layer"], "state": html.escape(str(row["state"]))} for row in point.layers],
                "bytes": [row["allocated_bytes"] / point.batch_size for row in point.layers],
            }
            for point in found
        ],
    }


def _escaped(value: Any) -> Any:
    """Plain data whose texts plotly may show: it reads a part of HTML."""
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, Mapping):
        return {name: _escaped(each) for name, each in value.items()}
    return [_escaped(each) for each in value] if isinstance(value, list) else value


def _panel_data(name: str, members: list[Point], looks: Mapping[int, Style]) -> dict[str, Any]:
    first = members[0]
    return {
        "task": html.escape(name),
        "metric": html.escape(metric_label(first.metric)),
        "higher_is_better": first.higher_is_better,
        "is_share": first.metric == ACCURACY.name,
        "slices": [html.escape(name) for name in _slices_of(members)],
        "where": where(first),
        "frontiers": {
            axis: [[p.bytes_per_sequence[axis], p.value] for p in non_dominated(members, axis)] for axis in AXES
        },
        "points": [
            {
                "name": html.escape(label),
                "colour": looks[id(point)].colour,
                "symbol": SYMBOLS[looks[id(point)].marker],
                "dash": DASHES[looks[id(point)].marker],
                "slices": [point.slices.get(name) for name in _slices_of(members)],
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


def _slices_of(members: Sequence[Point]) -> list[str]:
    """The slices of a panel's points that a chart shows; none where there is one only, which is the value itself, and
    of the needle task, which has its heat map."""
    if members[0].task == "needle":
        return []
    names = list(dict.fromkeys(name for point in members for name in point.slices))
    return names if 1 < len(names) <= MAX_SLICES else []


def _slice_tables(panels: Mapping[str, Sequence[Point]]) -> str:
    """A table for each task that has several slices, a column each."""
    found = []
    for task, members in panels.items():
        if not (names := list(dict.fromkeys(name for point in members for name in point.slices))) or len(names) < 2:
            continue
        each = zip(members, names_within(members), strict=True)
        rows = [{"variant": label} | {name: point.slices.get(name) for name in names} for point, label in each]
        title = f"{task}: {metric_label(members[0].metric)} by slice"
        found.append(f"<h3>{html.escape(title)}</h3>{_table(rows, '')}")
    return "".join(found) or "<p>None: every task has one slice.</p>"


def _commands(found: Sequence[Point], records: Sequence[AnyRecord]) -> str:
    """What to type to make each point again, with a button that copies it."""
    seeds = {record.run_id: record.seed for record in records}
    rows = []
    for point in found:
        typed = command(point.config, sorted({seeds[run_id] for run_id in point.run_ids}))
        said = "<td>made in Python: its configuration is in config.yaml of its folder</td>"
        if typed is not None:
            code = f"<code>{html.escape(typed)}</code>"
            said = f"<td><button type='button' class='copy'>copy</button>{code}</td>"
        rows.append(f"<tr><td>{html.escape(point.task)}</td><td>{html.escape(point.name)}</td>{said}</tr>")
    head = "<thead><tr><th>task</th><th>variant</th><th>command</th></tr></thead>"
    return f"<div class='wide'><table id='commands'>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _point_rows(found: list[Point], protocol: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for point, added in zip(found, protocol, strict=True):
        row: dict[str, Any] = {
            "task": point.task,
            "variant": point.name,
            "metric": metric_label(point.metric),
            "value": point.value,
        }
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


def _provenance_rows(records: Sequence[AnyRecord], labels: Labels) -> list[dict[str, Any]]:
    rows = []
    has_outside = any(record.provenance and record.provenance.outside for record in records)
    for record in records:
        origin = record.provenance
        if origin is None:
            continue
        commit = f"{(origin.git_commit or 'no checkout')[:12]}{' (dirty)' if origin.git_dirty else ''}"
        versions = " ".join(f"{name} {version}" for name, version in origin.versions.items())
        row = {"run": record.run_id, "variant": labels[id(record)], "seed": record.seed}
        row |= {"commit": commit, "device": f"{origin.device.get('kind')} x{origin.device.get('count')}"}
        row |= {"versions": versions, "XLA flags": origin.xla_flags, "wall s": record.wall_s}
        if has_outside:
            row["outside kvlab"] = ", ".join(f"{name} of {package}" for name, package in origin.outside.items())
        kernels = " ".join(f"{op}={name}" for op, name in origin.implementations.items())
        kernels += "".join(f" ({op}: {reason})" for op, reason in origin.passed_over.items())
        rows.append(row | {"kernels": kernels})
    return rows


def _table_and_common(rows: list[dict[str, Any]], name: str) -> str:
    """A table without the columns that are equal in all rows, which are said above it."""
    common = {column: value for column, value in rows[0].items() if all(row[column] == value for row in rows)}
    common = common if len(rows) > 1 else {}
    said = "".join(
        f"<li>{html.escape(column)}: {html.escape(str(value))}</li>" for column, value in common.items() if value
    )
    left = [{column: value for column, value in row.items() if column not in common} for row in rows]
    return (f"<ul class='soft'>{said}</ul>" if said else "") + _table(left, name)


def _table(rows: list[dict[str, Any]], name: str, *, sortable: bool = False) -> str:
    """Rows as an HTML table in a box of its own, which scrolls; numbers carry their exact value for sorting."""
    if not rows:
        return "<p>None.</p>"
    button = "<button type='button'>{}</button>" if sortable else "{}"
    head = "".join(
        f"<th{' class=number' if _is_number(rows, column) else ''}>{button.format(html.escape(column))}</th>"
        for column in rows[0]
    )
    body = "".join("<tr>" + "".join(_cell(column, row[column]) for column in rows[0]) + "</tr>" for row in rows)
    named = f" id='{name}'" if name else ""
    return f"<div class='wide'><table{named}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _is_number(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    known = [row[column] for row in rows if row[column] is not None]
    return bool(known) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "<td data-value=''>-</td>"
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, int | float):
        shown = human_bytes(value) if "B/" in column else readable(value)
        return f"<td class='number' data-value='{value}'>{shown}</td>"
    words = html.escape(str(value), quote=True)
    kind = " class='text'" if len(words) > WIDE else ""
    return f"<td{kind} data-value='{words}'>{words}</td>"
