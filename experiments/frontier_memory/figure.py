"""Architectures and cache methods on one frontier: quality against bytes held, and against bytes read.

kvlab reproduce frontier_memory
python experiments/frontier_memory/figure.py [results/frontier_memory]

A window, grouped queries, pages of 4 bits and an eviction are points of the same kind here: each was scored through its
memory, and has the bytes that it held.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from kvlab.lab.axes import byte_axis
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.panels import by_panel
from kvlab.lab.plots import save, sheet
from kvlab.lab.protocol import protocol_rows
from kvlab.lab.record import AnyRecord
from kvlab.lab.results import Point, non_dominated, points, read_records
from kvlab.lab.styles import GREY, INK, colour
from kvlab.tasks.metrics import ACCURACY, metric_label
from kvlab.units import human_bytes

HERE = Path(__file__).resolve().parent
FULL, WINDOWED, RECURRENT, HYBRID = ("mha", "gqa", "mqa"), "swa64", "mamba2_n64", "hybrid"
ARCHITECTURES = (*FULL, WINDOWED, RECURRENT, HYBRID)
FORMATS = ("model", "int8", "int4", "kivi2")
BUDGETS = "0.5,0.25"
MARKERS = {
    "none": "o",
    "int8": "s",
    "int4": "D",
    "kivi2": "^",
    "expected": "P",
    "random": "x",
    "expected int4": "*",
}
"""By cache method: a format, an eviction, or both."""
TASKS = {
    "mqar": ("task=mqar", "task.test=['128:32']", "measure.decode_steps=64", "seed=0,1,2"),
    "text": (
        "task=text",
        "task.seq_len=256",
        "task.num_scored=128",
        "task.scored_in_chunks=true",
        "task.decode_len=16",
        "measure.decode_steps=128",
    ),
}
"""Both have a prompt, which is compacted, and as many tokens behind it: recall of 32 pairs, and code by the byte."""
TRAINED = {
    "mqar": {
        False: (
            "train.num_steps=400",
            "train.eval_every=100",
            "train.checkpoint_every=400",
            "optimizer.learning_rate=0.01",
        ),
        True: (
            "train.num_steps=1600",
            "train.eval_every=200",
            "train.checkpoint_every=800",
            "optimizer.learning_rate=0.003",
        ),
    },
    "text": dict.fromkeys(
        (False, True),
        ("train.num_steps=600", "train.eval_every=200", "train.checkpoint_every=600", "optimizer.learning_rate=0.005"),
    ),
}
"""By task, and whether there is a recurrence, which wants smaller steps and more of them. Rates and positions are those
with which this was measured, not the better ones that the tasks have had since."""
TITLES = {"mqar": "mqar 128:32", "text": "text, 256 bytes"}
PROTECTED = {"mqar": "sinks:0,recent:0", "text": "sinks:4,recent:8"}


def _positions(task: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Rotary embeddings of the layers that attend, as they were measured."""
    if task != "text" or names == (RECURRENT,):
        return ()
    layer = "W" if names == (WINDOWED,) else "A"
    return tuple(
        f"mixer.{layer}.{word}" for word in ("rope_fraction=0.5", "rope_base=10000", "qk_norm=false", "local_start=0")
    )


def _sweeps(task: str) -> list[tuple[str, ...]]:
    """The sweeps of a task: formats of every architecture that holds tokens, then evictions where all are held."""

    def words(names: tuple[str, ...]) -> tuple[str, ...]:
        is_recurrent = bool({RECURRENT, HYBRID} & set(names))
        trained = ("optimizer.name=adamw", *TRAINED[task][is_recurrent])
        return (*TASKS[task], f"mixer={','.join(names)}", *_positions(task, names), *trained)

    expected, random = (f"{{type:{kind},{PROTECTED[task]}}}" for kind in ("expected", "random"))
    found = [
        (*words(FULL), f"memory.format={','.join(FORMATS)}"),
        (*words((HYBRID,)), f"memory.format={','.join(FORMATS)}"),
        (*words((WINDOWED,)), "memory.format=model,int8,int4"),
        words((RECURRENT,)),
    ]
    for names in (FULL, (HYBRID,)):
        found.append((*words(names), f"memory.compression={expected},{random}", f"memory.budget={BUDGETS}"))
        found.append(
            (*words(names), f"memory.compression={expected}", f"memory.budget={BUDGETS}", "memory.format=int4")
        )
    return found


RUNS = tuple(sweep for task in TASKS for sweep in _sweeps(task))


@dataclass(frozen=True)
class Cell:
    """A point, and which cache method it has."""

    point: Point
    method: str
    budget: Any

    @classmethod
    def of(cls, point: Point) -> "Cell":
        """From a point's configuration."""
        memory = point.config["memory"]
        kind = (memory.get("compression") or {}).get("type")
        words = [word for word in (kind, memory.get("format")) if word not in (None, "model")]
        return cls(point, " ".join(words) or "none", memory.get("budget") if kind else None)


def frame_of(found: list[Point], records: list[AnyRecord]) -> pd.DataFrame:
    """A row a point: architecture, cache method, budget, quality with its interval, bytes held, at their most, and
    read, and whether no other point has better quality with no more bytes."""
    best = {
        axis: {id(point) for members in by_panel(found).values() for point in non_dominated(members, axis)}
        for axis in ("allocated_bytes", "read_bytes_per_token")
    }
    rows = []
    for point, added in zip(found, protocol_rows(found, records), strict=True):
        cell, (low, high) = Cell.of(point), point.interval or (None, None)
        rows.append(
            {
                "task": point.task,
                "architecture": point.variant,
                "method": cell.method,
                "budget": cell.budget,
                "metric": point.metric,
                "value": point.value,
                "low": low,
                "high": high,
                "num_seeds": point.num_seeds,
                "ceiling": point.ceiling,
                "held_bytes": point.bytes_per_sequence["allocated_bytes"],
                "peak_bytes": point.bytes_per_sequence["held_peak_bytes"],
                "read_bytes": point.bytes_per_sequence["read_bytes_per_token"],
                "best_by_held": id(point) in best["allocated_bytes"],
                "best_by_read": id(point) in best["read_bytes_per_token"],
                "right_to_wrong": added.get("right to wrong"),
                "wrong_to_right": added.get("wrong to right"),
            }
        )
    return pd.DataFrame(rows)


def claims(frame: pd.DataFrame) -> list[Claim]:
    """What must hold of the frontier; a claim whose runs are not at hand fails."""
    cells = {(row.task, row.architecture, row.method, row.budget or None): row for row in _rows(frame)}

    def compared(what: str, expected: str, names: list[tuple[Any, ...]], holds: Any) -> Claim:
        known = [cells[name] for name in names if name in cells]
        if len(known) < len(names):
            return Claim(what, expected, "not run", False)
        found = ", ".join(f"{row.value:.3f} in {human_bytes(row.held_bytes)}" for row in known)
        return Claim(what, expected, found, bool(holds(*known)))

    rows = []
    for name in ("mha", "mqa"):
        what = f"mqar, {name}: Expected Attention keeps half of the prompt for nothing"
        pair = [("mqar", name, "none", None), ("mqar", name, "expected", 0.5)]
        rows.append(compared(what, "within 0.02", pair, lambda full, kept: kept.value >= full.value - 0.02))
    what = "mqar: mqa as computed, against mha with a quarter kept"
    pair = [("mqar", "mqa", "none", None), ("mqar", "mha", "expected", 0.25)]
    rows.append(compared(what, "better in fewer bytes", pair, lambda a, b: _beats(a, b)))
    for name in FULL:
        pair = [("mqar", name, "random", 0.5), ("mqar", name, "expected", 0.5)]
        rows.append(
            compared(f"mqar, {name}: better than random, f = 0.5", "<", pair, lambda low, high: low.value < high.value)
        )
        pair = [("text", name, "none", None), ("text", name, "int4", None)]
        what = f"text, {name}: int4 costs little"
        rows.append(compared(what, "<= 3% more bits", pair, lambda full, held: held.value <= 1.03 * full.value))
    return rows


def _rows(frame: pd.DataFrame) -> Any:
    return frame.astype(object).where(frame.notna(), None).itertuples()


def _beats(one: Any, other: Any) -> bool:
    return one.value > other.value and one.held_bytes < other.held_bytes


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A row a task. Left: quality against bytes held at the sequence's end; right: against bytes that decoding a token
    reads. Dashed: what no other point beats."""
    tasks = list(dict.fromkeys(frame.task))
    figure, panels = sheet(len(tasks), 2, size=(13.5, 4.8 * len(tasks)), squeeze=False)
    axes = {"held": "pages and states held a sequence", "read": "memory read for a decoded token"}
    for row, task in zip(panels, tasks, strict=True):
        for panel, (axis, label) in zip(row, axes.items(), strict=True):
            _draw_panel(panel, frame[frame.task == task], axis)
            panel.set(title=TITLES.get(task, task), xlabel=label)
    names = list(dict.fromkeys(frame.architecture))
    handles = [Line2D([], [], color=colour(name), marker="o", ls="", label=name) for name in names]
    used = set(frame.method)
    handles += [
        Line2D([], [], color=INK, marker=marker, ls="", label={"none": "all, as computed"}.get(name, name))
        for name, marker in MARKERS.items()
        if name in used
    ]
    figure.legend(handles=handles, fontsize=9, loc="outside right center", title="architecture, cache method")
    figure.suptitle("What a byte of memory buys: architectures, cache methods (95% intervals, cut at 0 and 1)")
    save(figure, [path])


def _draw_panel(panel: Axes, rows: Any, axis: str) -> None:
    best = rows[rows[f"best_by_{axis}"]].sort_values(f"{axis}_bytes")
    panel.step(best[f"{axis}_bytes"], best.value, where="post", color=GREY, ls="--", lw=1.2, zorder=1)
    is_share = rows.metric.iloc[0] == ACCURACY.name
    for row in rows.itertuples():
        # No accuracy is below 0 or above 1, whatever Student's t says of three seeds.
        low, high = (max(row.low, 0), min(row.high, 1)) if is_share else (row.low, row.high)
        errors = None if pd.isna(row.low) else [[max(row.value - low, 0)], [max(high - row.value, 0)]]
        style = {"color": colour(row.architecture), "marker": MARKERS.get(row.method, "v"), "ms": 7, "capsize": 2}
        panel.errorbar(getattr(row, f"{axis}_bytes"), row.value, yerr=errors, ls="", elinewidth=1, **style)
    byte_axis(panel)
    label = metric_label(rows.metric.iloc[0])
    panel.set_ylabel(label if is_share else f"{label} (up is better)")
    if is_share:
        panel.set_ylim(-0.03, 1.05)
    else:
        panel.invert_yaxis()
    panel.grid(alpha=0.25, which="both")


def redraw(output: Path = HERE) -> None:
    """frontier.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "frontier.csv"), output / "frontier.png")


def main(output: Path = HERE, results: Path = Path("results/frontier_memory")) -> int:
    """Writes frontier.csv and frontier.png; prints the non-dominated points; returns 1 if a claim fails."""
    records = read_records(results)
    found = [point for point in points(records) if point.variant in ARCHITECTURES]
    frame = frame_of(found, records)
    frame.to_csv(output / "frontier.csv", index=False, float_format="%.6g")
    draw(frame, output / "frontier.png")
    columns = ["task", "architecture", "method", "budget", "value", "held_bytes", "read_bytes"]
    print(frame[frame.best_by_held].filter(columns).to_string(index=False))
    return verdict(claims(frame), "Architectures and cache methods")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/frontier_memory")))
