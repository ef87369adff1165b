"""What do the demo's recipes train well? Recall and text on six seeds.

kvlab reproduce recipes
python experiments/recipes/figure.py [results/recipes]
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kvlab.lab.axes import bytes_in_words
from kvlab.lab.claims import Cells, Claim, verdict
from kvlab.lab.plots import save, sheet
from kvlab.lab.record import Done
from kvlab.lab.results import interval_half_width, read_records
from kvlab.lab.styles import colour

HERE = Path(__file__).resolve().parent
RECALL, TEXT = ("mha", "mqa", "mla", "hybrid"), ("mha", "gqa", "mqa", "mla", "swa64", "swa32", "swa16")
WINDOWS = ("swa64", "swa32", "swa16")
OF_ATTENTION, RATE = 0.02, 0.01
"""The rates on text: attention's for all, and half of it for MLA as well, which is `configs/tuned/text_mla.yaml`: of
four the best of one seed, by validation."""
SLOWER = f"mla at {RATE}"
RUNS = (
    ("task=mqar", f"mixer={','.join(RECALL)}"),
    ("task=text", f"mixer={','.join(TEXT)}", f"optimizer.learning_rate={OF_ATTENTION}"),
    ("task=text", "mixer=mla", f"optimizer.learning_rate={RATE}"),
)
VARIANTS = {"mqar": RECALL, "text": (*TEXT, SLOWER)}
LABELS = {"mqar": "accuracy of recall", "text": "bits per byte (less is better)"}
MORE_BITS = 0.02
"""By how much full attention may be worse than its best window, which is a special case of it: by the upper end of the
paired difference's 95% interval."""
RECALLED, BOTH = 0.98, 0.99
"""Accuracy that the hybrid must reach on every seed, and that MLA and MQA must on the mean."""


def variant_of(config: dict[str, Any]) -> str:
    """The name here of a record's configuration."""
    name = config["mixer"]["name"]
    is_slower = (config["task"]["type"], name, config["optimizer"]["learning_rate"]) == ("text", "mla", RATE)
    return SLOWER if is_slower else name


def table(records: Sequence[Done]) -> pd.DataFrame:
    """A row a run of what is compared: its metric, on validation too, the steps that it took, and the bytes of all
    states of a sequence at its end."""
    rows = [
        {
            "task": record.config["task"]["type"],
            "variant": variant_of(record.config),
            "seed": record.config["seed"],
            "value": record.quality.value,
            "validation": record.quality.validation,
            "steps": record.training.num_steps,
            "num_params": record.num_params,
            "held_bytes": record.memory.allocated_bytes // record.memory.batch_size,
        }
        for record in records
    ]
    columns = ["task", "variant", "seed", "value", "validation", "steps", "num_params", "held_bytes"]
    frame = pd.DataFrame([row for row in rows if row["variant"] in VARIANTS.get(row["task"], ())], columns=columns)
    order = [*VARIANTS["text"], "hybrid"]
    return frame.sort_values(
        ["task", "variant", "seed"],
        key=lambda column: column.map(order.index) if column.name == "variant" else column,
        ignore_index=True,
    )


def missing(frame: pd.DataFrame) -> list[str]:
    """The variants that lack a seed which others have, or have one twice."""
    cells, seeds = Cells(frame), sorted(set(frame.seed))
    wanted = [(task, name) for task, names in VARIANTS.items() for name in names]
    return [f"{task} {name}" for task, name in wanted if not seeds or cells(task, name, "seed") != seeds]


def claims(frame: pd.DataFrame) -> list[Claim]:
    """What a recipe owes its variants, and what METHODS B.7, 10 expects. Where seeds are missing, that alone is
    said."""
    if lacking := missing(frame):
        return [Claim("every variant has the same seeds", "all", f"not: {', '.join(lacking)}", False)]
    cells = Cells(frame)
    best = min(WINDOWS, key=lambda name: statistics.fmean(cells("text", name)))
    mean, half = cells.above("text", "mha", best)
    what, found = f"text: bits of mha above those of the best window ({best})", f"{mean:+.4f} ± {half:.4f}"
    rows = [Claim(what, f"at most {MORE_BITS}", found, mean + half <= MORE_BITS)]
    worst = min(cells("mqar", "hybrid"))
    rows.append(Claim("recall: the hybrid's worst seed", f"at least {RECALLED}", f"{worst:.4f}", worst >= RECALLED))
    for name in ("mla", "mqa"):
        value = statistics.fmean(cells("mqar", name))
        rows.append(Claim(f"recall: {name}, the mean", f"at least {BOTH}", f"{value:.4f}", value >= BOTH))
    latent = min(("mla", SLOWER), key=lambda name: statistics.fmean(cells("text", name, "validation")))
    for variant, other, is_more in ((latent, "mha", False), ("gqa", "mha", True), ("mqa", "gqa", True)):
        mean, half = cells.above("text", variant, other)
        what, found = f"text: bits of {variant} above those of {other}", f"{mean:+.4f} ± {half:.4f}"
        passed = mean - half > 0 if is_more else mean + half <= 0
        rows.append(Claim(what, "more than 0" if is_more else "at most 0", found, passed))
    return rows


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A panel a task: the metric of every seed and the mean with its 95% interval, by variant and the bytes held."""
    ratios = [len(names) for names in VARIANTS.values()]
    figure, panels = sheet(1, len(VARIANTS), size=(11.6, 4.4), width_ratios=ratios)
    for panel, (task, label) in zip(panels, LABELS.items(), strict=True):
        rows = frame[frame.task == task].sort_values("held_bytes", kind="stable")
        ticks = list[str]()
        for place, (variant, group) in enumerate(rows.groupby("variant", sort=False)):
            values, shade = group.value.tolist(), colour(str(variant).split(" ")[0])
            middle = (len(values) - 1) / 2
            panel.plot([place + 0.12 * (number - middle) for number in range(len(values))], values, "o", color=shade)
            style = {"color": shade, "marker": "_", "ms": 20, "mew": 2, "capsize": 4, "alpha": 0.7}
            panel.errorbar(place, statistics.fmean(values), yerr=interval_half_width(values), **style)
            name = str(variant).replace(" ", "\n", 1)
            ticks.append(f"{name}\n{bytes_in_words(group.held_bytes.iloc[0])}")
        panel.set_xticks(range(len(ticks)), ticks, fontsize=8)
        panel.set(ylabel=label, xlim=(-0.6, max(len(ticks), 1) - 0.4))
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
    return verdict(claims(frame), "What the demo's recipes train well (after methods B.7, claim 10)")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/recipes")))
