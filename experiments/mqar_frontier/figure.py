"""The mini frontier: picture, data and a pass/fail table against the published and closed-form values.

python experiments/mqar_frontier/figure.py [results/mqar_frontier]
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvlab.lab.plots import draw_frontier
from kvlab.lab.report import frontier_frame
from kvlab.lab.results import Point, points, read_records
from kvlab.tasks.mqar import MqarConfig, window_accuracy

HERE = Path(__file__).resolve().parent
MAMBA2_FIGURES = {"mamba2_n16": 0.789, "mamba2_n64": 0.838}
"""Scalar-decay SSD with output norm, one seed, the better of two learning rates: ours must not be below."""


def checks(found: list[Point]) -> list[tuple[str, str, str, bool]]:
    """(what, expected, found, passed) for every claim of this experiment."""
    named = {point.variant: point for point in found}
    rows = []
    for name in ("mha", "mqa"):
        value = named[name].value
        rows.append((f"{name} accuracy", ">= 0.99", f"{value:.4f}", value >= 0.99))
    share = named["mqa"].bytes_per_sequence["allocated_bytes"] / named["mha"].bytes_per_sequence["allocated_bytes"]
    rows.append(("mqa state bytes / mha state bytes", "<= 26%", f"{share:.2%}", share <= 0.26))
    for window in (16, 32, 64):
        for name, value in named[f"swa{window}"].slices.items():
            expected = window_accuracy(MqarConfig(), name, window)
            what = f"window {window}, slice {name}"
            rows.append((what, f"{expected:.3f} ± 0.02", f"{value:.3f}", abs(value - expected) <= 0.02))
    for name, expected in MAMBA2_FIGURES.items():
        value = named[name].value
        rows.append((f"{name} accuracy", f">= {expected}", f"{value:.4f}", value >= expected))
    return rows


def main() -> int:
    """Writes frontier.csv and frontier.png beside this file; returns 1 if any check failed."""
    results = Path(sys.argv[1] if len(sys.argv) > 1 else "results/mqar_frontier")
    found = points(read_records(results))
    frontier_frame(found).to_csv(HERE / "frontier.csv", index=False, float_format="%.6g")
    title = "Recall against memory (MQAR, 3 seeds, tuned)"
    draw_frontier(found, title, [HERE / "frontier.png"])
    rows = checks(found)
    table = Table("claim", "expected", "found", "")
    for what, expected, value, passed in rows:
        table.add_row(what, expected, value, "pass" if passed else "FAIL")
    Console(width=100).print(table)
    return 0 if all(passed for *_, passed in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
