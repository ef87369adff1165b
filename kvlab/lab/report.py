"""The report of a folder of results: one self-contained page, the frontier as PNG and PDF, its data as CSV; of the
needle task its heat maps."""

from pathlib import Path
from typing import Any

import pandas as pd

from kvlab.evaluation.measure import AXES
from kvlab.files import write_atomic
from kvlab.lab.page import render_page
from kvlab.lab.panels import by_panel
from kvlab.lab.plots import draw_frontier, draw_needle
from kvlab.lab.protocol import protocol_rows
from kvlab.lab.results import Point, non_dominated, points, read_records


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
