"""The mini frontier: picture, data and a pass/fail table against the published and closed-form values.

kvlab reproduce mqar_frontier      # trains first, about an hour; what is done is skipped
python experiments/mqar_frontier/figure.py [results/mqar_frontier]
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from kvlab.lab.axes import byte_axis
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import beside_legend, save, sheet
from kvlab.lab.report import frontier_frame
from kvlab.lab.results import Point, points, read_records
from kvlab.lab.styles import GREY, colour
from kvlab.tasks.mqar import MqarConfig, window_accuracy

HERE = Path(__file__).resolve().parent
RUNS = ((),)  # the sweep of the configuration of this name comes first
MAMBA2_FIGURES = {"mamba2_n16": 0.789, "mamba2_n64": 0.838}
"""Scalar-decay SSD with output norm, one seed, the better of two learning rates: ours must not be below."""


def claims(found: list[Point]) -> list[Claim]:
    """Every claim of this experiment."""
    named = {point.variant: point for point in found}
    rows = []
    for name in ("mha", "mqa"):
        value = named[name].value
        rows.append(Claim(f"{name} accuracy", ">= 0.99", f"{value:.4f}", value >= 0.99))
    share = named["mqa"].bytes_per_sequence["allocated_bytes"] / named["mha"].bytes_per_sequence["allocated_bytes"]
    rows.append(Claim("mqa state bytes / mha state bytes", "<= 26%", f"{share:.2%}", share <= 0.26))
    for window in (16, 32, 64):
        for name, value in named[f"swa{window}"].slices.items():
            expected = window_accuracy(MqarConfig(), name, window)
            rows.append(Claim.near(f"window {window}, slice {name}", expected, value, 0.02))
    for name, expected in MAMBA2_FIGURES.items():
        value = named[name].value
        rows.append(Claim(f"{name} accuracy", f">= {expected}", f"{value:.4f}", value >= expected))
    return rows


def draw(frame: Any, path: Path) -> None:
    """Accuracy of every variant against the bytes that a sequence holds; dashed: what no other point beats."""
    figure, panel = sheet(size=(8.4, 4.8))
    best = frame[frame.non_dominated].sort_values("allocated_bytes_per_sequence")
    panel.step(best.allocated_bytes_per_sequence, best.value, where="post", color=GREY, ls="--", lw=1.2, zorder=1)
    for row in frame.itertuples():
        errors = None if pd.isna(row.low) else [[row.value - row.low], [row.high - row.value]]
        style = {"color": colour(row.variant), "label": row.variant, "fmt": "o", "ms": 8, "capsize": 3}
        panel.errorbar(row.allocated_bytes_per_sequence, row.value, yerr=errors, **style)
    byte_axis(panel)
    panel.set(ylim=(-0.03, 1.05), ylabel="accuracy, mean of the slices")
    panel.set_xlabel(f"held by a sequence of {frame.context_len.iloc[0]} tokens")
    panel.grid(alpha=0.25)
    beside_legend(panel)
    figure.suptitle("Recall against memory (MQAR; 3 seeds, 95% intervals; rates tuned)")
    save(figure, [path])


def redraw(output: Path = HERE) -> None:
    """frontier.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "frontier.csv"), output / "frontier.png")


def main(output: Path = HERE, results: Path = Path("results/mqar_frontier")) -> int:
    """Writes frontier.csv and frontier.png; returns 1 if a claim fails."""
    found = points(read_records(results))
    frame = frontier_frame(found)
    frame.to_csv(output / "frontier.csv", index=False, float_format="%.6g")
    draw(frame, output / "frontier.png")
    return verdict(claims(found), "The mini recall frontier")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/mqar_frontier")))
