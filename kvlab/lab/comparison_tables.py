"""Comparisons as text: for a terminal, as JSON, and as tables for Markdown and LaTeX."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvlab.lab.ceilings import Ceilings
from kvlab.lab.choose import Runs
from kvlab.lab.compare import Cell, Comparison, Scored, compare
from kvlab.lab.labels import point_labels
from kvlab.lab.narrow import flips_of, print_rows
from kvlab.lab.tables import as_cell, wide_console
from kvlab.lab.written_tables import written
from kvlab.tasks.metrics import metric_label


def compare_points(runs: Runs, words: Sequence[str], *, floor: float | None = None) -> list[Comparison]:
    """The first point that is named with each of the others. Raises ConfigError and `ExamplesError`, as `Runs.point`
    and `compare` do."""
    chosen = [runs.point(each) for each in words]
    names = point_labels([point[0].config for point in chosen])
    ceilings, first = Ceilings(runs.records), [Scored.of(record) for record in chosen[0]]
    return [
        compare(first, [Scored.of(record) for record in point], names=(names[0], name), ceilings=ceilings, floor=floor)
        for point, name in zip(chosen[1:], names[1:], strict=True)
    ]


def printed(comparisons: Sequence[Comparison], form: str | None) -> str:
    """Comparisons as "json", "markdown" or "latex", or for people (null)."""
    if form == "json":
        return json.dumps([asdict(comparison) for comparison in comparisons], indent=2)
    tables = [(title(each), [row(cell, each) for cell in each.cells]) for each in comparisons]
    if form is None:
        return "\n\n".join(_plain(*table) for table in tables)
    return "\n\n".join(written(form, *table, kept=table[1][0]) for table in tables)


def title(comparison: Comparison) -> str:
    """What is compared: both points, task, metric and seeds."""
    better = "higher" if comparison.higher_is_better else "lower"
    words = f"{comparison.names[1]} less {comparison.names[0]}, {comparison.task}, "
    words += f"{metric_label(comparison.metric)} ({better} is better), seeds {_listed(comparison.seeds)}"
    return words + (f" (without a partner: {_listed(comparison.unpaired)})" if comparison.unpaired else "")


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def row(cell: Cell, comparison: Comparison) -> dict[str, str]:
    """A cell by heading; the points are A, the first, and B."""
    first, second = cell.ceilings
    ceiling = as_cell(first) if first == second else f"{as_cell(first)} / {as_cell(second)}"
    flips = cell.flips
    values: dict[str, Any] = {
        "slice": cell.slice,
        "turn": "all" if cell.turn is None else cell.turn,
        "A": cell.first,
        "B": cell.second,
        "B less A": f"{cell.difference:+.4f}",
        "95%": f"[{cell.low:+.4f}, {cell.high:+.4f}]",
        "right to wrong": flips.lost,
        "wrong to right": flips.won,
        "labels": flips.num_labels,
        "examples lost": flips.lost_examples,
        "examples won": flips.won_examples,
        "examples": flips.num_examples,
        "ceiling": ceiling,
        "tells": cell.discriminative,
    }
    if not any(each.turn is not None for each in comparison.cells):
        del values["turn"]
    return {name: as_cell(value) for name, value in values.items()}


def _plain(words: str, rows: Sequence[dict[str, str]]) -> str:
    console = wide_console()
    with console.capture() as captured:
        print_rows(console, [in_short(each) for each in rows], kept=KEPT, spare=("examples", "flips"), title=words)
    return captured.get().rstrip()


KEPT = ("slice", "turn", "A", "B", "B less A", "95%", "flips", "examples")
"""Columns that stay, though all rows agree in them."""


def in_short(row: dict[str, str]) -> dict[str, str]:
    """A row for a terminal: what flipped in one column, of labels and of examples."""
    labels, examples = ("right to wrong", "wrong to right", "labels"), ("examples lost", "examples won", "examples")
    others = {name: text for name, text in row.items() if name not in (*labels, *examples)}
    return others | {"flips": flips_of(row, *labels), "examples": flips_of(row, *examples)}
