"""Do the demo's recipes train every variant well? Recall and text on three seeds.

kvlab reproduce recipes
python experiments/recipes/figure.py [results/recipes]
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kvlab.lab.axes import bytes_in_words
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import save, sheet
from kvlab.lab.record import Done
from kvlab.lab.results import interval_half_width, read_records
from kvlab.lab.styles import colour

HERE = Path(__file__).resolve().parent
RECALL, TEXT = ("mha", "mqa", "mla", "hybrid"), ("mha", "gqa", "mqa", "mla", "swa64", "swa32", "swa16")
RUNS = tuple((f"task={task}", f"mixer={','.join(names)}") for task, names in (("mqar", RECALL), ("text", TEXT)))
WINDOWS = ("swa64", "swa32", "swa16")
LABELS = {"mqar": "accuracy of recall", "text": "bits per byte (less is better)"}
MORE_BITS = 0.02
"""By how much full attention may be worse than its best window, which is a special case of it: by the upper end of the
paired difference's 95% interval."""
RECALLED, BOTH = 0.98, 0.99
"""Accuracy that the hybrid must reach on every seed, and that MLA and MQA must on the mean."""


def table(records: Sequence[Done]) -> pd.DataFrame:
    """A row a run: its metric, the steps that it took, and the bytes of all states of a sequence at its end."""
    rows = [
        {
            "task": record.config["task"]["type"],
            "variant": record.config["mixer"]["name"],
            "seed": record.config["seed"],
            "value": record.quality.value,
            "steps": record.training.num_steps,
            "num_params": record.num_params,
            "held_bytes": record.memory.allocated_bytes // record.memory.batch_size,
        }
        for record in records
    ]
    order = [*TEXT, "hybrid"]
    return pd.DataFrame(rows).sort_values(
        ["task", "variant", "seed"],
        key=lambda column: column.map(order.index) if column.name == "variant" else column,
        ignore_index=True,
    )


class Cells:
    """Values of a task's variant, seeds in their order; of what was not run, nothing."""

    def __init__(self, frame: pd.DataFrame):
        self.frame = frame

    def __call__(self, task: str, variant: str) -> list[float]:
        rows = self.frame[(self.frame.task == task) & (self.frame.variant == variant)]
        return [float(value) for value in rows.value]


def missing(frame: pd.DataFrame) -> list[str]:
    """The variants of a task that lack a seed which others have."""
    cells, num_seeds = Cells(frame), frame.seed.nunique()
    wanted = [("mqar", name) for name in RECALL] + [("text", name) for name in TEXT]
    return [f"{task} {name}" for task, name in wanted if not len(cells(task, name)) == num_seeds > 0]


def claims(frame: pd.DataFrame) -> list[Claim]:
    """What a recipe owes its variants, and METHODS B.7, claim 10. Where something was not run, that alone is said."""
    if lacking := missing(frame):
        return [Claim("every variant was run on all seeds", "all", f"not run: {', '.join(lacking)}", False)]
    cells = Cells(frame)
    means = {
        (task, name): statistics.fmean(cells(task, name))
        for task in LABELS
        for name in {*RECALL, *TEXT}
        if cells(task, name)
    }
    best = min(WINDOWS, key=lambda name: means["text", name])
    more = [full - window for full, window in zip(cells("text", "mha"), cells("text", best), strict=True)]
    mean, half = statistics.fmean(more), interval_half_width(more)
    rows = [
        Claim(
            f"text: bits of mha above the best window's ({best})",
            f"at most {MORE_BITS}",
            f"{mean:+.4f} ± {half:.4f}",
            mean + half <= MORE_BITS,
        )
    ]
    worst = min(cells("mqar", "hybrid"))
    rows.append(Claim("recall: the hybrid's worst seed", f"at least {RECALLED}", f"{worst:.4f}", worst >= RECALLED))
    for name in ("mla", "mqa"):
        value = means["mqar", name]
        rows.append(Claim(f"recall: {name}, the mean", f"at least {BOTH}", f"{value:.4f}", value >= BOTH))
    for less, greater, strictly in (("mla", "mha", False), ("mha", "gqa", True), ("gqa", "mqa", True)):
        low, high = means["text", less], means["text", greater]
        expected = f"{'below' if strictly else 'at most'} {greater}'s"
        passed = low < high if strictly else low <= high
        rows.append(Claim(f"text: bits of {less}, the mean", expected, f"{low:.4f}; {high:.4f}", passed))
    return rows


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A panel a task: the metric of every seed and the mean with its 95% interval, by variant and the bytes held."""
    figure, panels = sheet(1, len(LABELS), size=(11, 4.4), width_ratios=[len(RECALL), len(TEXT)])
    for panel, (task, label) in zip(panels, LABELS.items(), strict=True):
        rows = frame[frame.task == task].sort_values("held_bytes", kind="stable")
        variants = list(dict.fromkeys(rows.variant))
        held = [bytes_in_words(rows[rows.variant == variant].held_bytes.iloc[0]) for variant in variants]
        for place, variant in enumerate(variants):
            values = rows[rows.variant == variant].value.tolist()
            shade, middle = colour(variant), (len(values) - 1) / 2
            panel.plot([place + 0.12 * (number - middle) for number in range(len(values))], values, "o", color=shade)
            style = {"color": shade, "marker": "_", "ms": 22, "mew": 2, "capsize": 4, "alpha": 0.7}
            panel.errorbar(place, statistics.fmean(values), yerr=interval_half_width(values), **style)
        panel.set_xticks(range(len(variants)), [f"{name}\n{size}" for name, size in zip(variants, held, strict=True)])
        panel.set(ylabel=label, xlim=(-0.6, len(variants) - 0.4))
        panel.grid(axis="y", alpha=0.25)
    panels[0].set_ylim(top=1)  # an accuracy; intervals go beyond
    figure.suptitle("The demo's recipes: every seed, means with 95% intervals, and bytes that a sequence holds")
    save(figure, [path])


def redraw(output: Path = HERE) -> None:
    """recipes.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "recipes.csv"), output / "recipes.png")


def main(output: Path = HERE, results: Path = Path("results/recipes")) -> int:
    """Writes recipes.csv and recipes.png; returns 1 if a claim fails."""
    frame = table([record for record in read_records(results) if isinstance(record, Done)])
    frame.to_csv(output / "recipes.csv", index=False, float_format="%.5g")
    draw(frame, output / "recipes.png")
    return verdict(claims(frame), "What the demo's recipes train well (methods B.7, claim 10)")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/recipes")))
