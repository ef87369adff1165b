"""Layers that read the keys and values of the layer below: what they cost in recall and in text, and what they save.

kvlab reproduce kv_sharing
python experiments/kv_sharing/figure.py [results/kv_sharing]

Half the KV heads in every layer hold as many bytes as pairs of layers do: what sharing is to be compared with.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kvlab.lab.axes import bytes_in_words
from kvlab.lab.claims import Cells, Claim, verdict
from kvlab.lab.plots import save, sheet
from kvlab.lab.record import Done
from kvlab.lab.results import interval_half_width, read_records
from kvlab.lab.styles import RED, colour

HERE = Path(__file__).resolve().parent
RUNS = (
    (
        "task=mqar",
        "model.num_layers=2",
        "task.test=['128:32']",
        "train.num_steps=400",
        "train.eval_every=100",
        "train.checkpoint_every=400",
        "optimizer.name=adamw",
    ),
    (
        "task=text",
        "model.num_layers=4",
        "task.seq_len=256",
        "train.num_steps=600",
        "train.eval_every=200",
        "train.checkpoint_every=600",
    ),
)
TASKS = {"mqar": "recall, 2 layers", "text": "text, 4 layers"}
LABELS = {"mqar": "accuracy of recall", "text": "bits per byte (less is better)"}
NAMES = {"mha": "every layer its own", "cla": "pairs of layers", "gqa": "half the KV heads"}
COLOURS = {name: colour(name) for name in ("mha", "gqa")} | {"cla": RED}
MORE_LOSS, LESS_RECALL = 0.02, 0.01
"""By how much the loss of text may rise, as a share, and recall may fall."""


def table(records: Sequence[Done]) -> pd.DataFrame:
    """A row a run: its metric, and bytes of one sequence at its end: of keys and values held, and of all that decoding
    the next token reads."""
    rows = []
    for record in records:
        memory, layers = record.memory, record.memory.layers
        held = sum(layer["allocated_bytes"] for layer in layers if layer["state"] == "kv") // memory.batch_size
        rows.append(
            {
                "task": record.config["task"]["type"],
                "variant": record.config["mixer"]["name"],
                "seed": record.config["seed"],
                "value": record.quality.value,
                "num_params": record.num_params,
                "kv_bytes": held,
                "read_bytes": memory.read_bytes_per_token,
            }
        )
    order = list(NAMES)
    return pd.DataFrame(rows).sort_values(
        ["task", "variant", "seed"],
        key=lambda column: column.map(order.index) if column.name == "variant" else column,
        ignore_index=True,
    )


def claims(frame: pd.DataFrame) -> list[Claim]:
    """METHODS B.7, claim 16: half the bytes, recall unchanged, and less than 2% more loss, by the upper end of the
    paired difference's 95% interval."""
    cells, rows = Cells(frame), list[Claim]()
    for task in TASKS:
        for column, what, share in (("kv_bytes", "held", 0.5), ("read_bytes", "read for a token", None)):
            own, pairs = cells(task, "mha", column), cells(task, "cla", column)
            if not own or not pairs:
                rows.append(Claim(f"{task}: bytes {what}", "stated", "not run", False))
            elif share is not None:
                rows.append(Claim.near(f"{task}: keys and values {what}, pairs : own", share, pairs[0] / own[0], 0.0))
            else:
                rows.append(Claim.near(f"{task}: bytes {what}, pairs : own", 1.0, pairs[0] / own[0], 0.0))
    own, pairs = cells("mqar", "mha"), cells("mqar", "cla")
    expected = f"own - {LESS_RECALL:g} or more"
    if len(own) != len(pairs) or not own:
        rows.append(Claim("mqar: accuracy of pairs", expected, "not run", False))
    else:
        mean, half = cells.above("mqar", "cla", "mha")
        rows.append(
            Claim("mqar: accuracy of pairs", expected, f"own {mean:+.4f} ± {half:.4f}", mean - half >= -LESS_RECALL)
        )
    own, pairs = cells("text", "mha"), cells("text", "cla")
    expected = f"rises by less than {MORE_LOSS:.0%}"
    if len(own) != len(pairs) or not own:
        return [*rows, Claim("text: loss of pairs", expected, "not run", False)]
    rises = [high / low - 1 for high, low in zip(pairs, own, strict=True)]
    mean, half = statistics.fmean(rises), interval_half_width(rises)
    return [*rows, Claim("text: loss of pairs", expected, f"{mean:+.2%} ± {half:.2%}", mean + half < MORE_LOSS)]


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A panel a task: the metric of every seed, and of each variant its mean and the bytes of keys and values that a
    sequence holds."""
    figure, panels = sheet(1, len(TASKS), size=(10, 4.2))
    for panel, (task, title) in zip(panels, TASKS.items(), strict=True):
        ticks = []
        for place, (variant, name) in enumerate(NAMES.items()):
            rows = frame[(frame.task == task) & (frame.variant == variant)]
            ticks.append(f"{name}\n{bytes_in_words(rows.kv_bytes.iloc[0])}" if len(rows) else f"{name}\nnot run")
            if rows.empty:
                continue
            for number, value in enumerate(rows.value):
                panel.plot(place + 0.09 * (number - (len(rows) - 1) / 2), value, "o", color=COLOURS[variant], alpha=0.8)
            panel.plot([place - 0.25, place + 0.25], [rows.value.mean()] * 2, color=COLOURS[variant], lw=2)
        panel.set(title=title, ylabel=LABELS[task], xlim=(-0.5, len(NAMES) - 0.5))
        panel.set_xticks(range(len(NAMES)), ticks)
        panel.grid(axis="y", alpha=0.25)
    panels[0].set_ylim(0.98, 1.0)
    figure.suptitle(
        "Keys and values that two layers share, and what a sequence holds of them: three seeds, and their mean"
    )
    save(figure, [path])


def redraw(output: Path = HERE) -> None:
    """sharing.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "sharing.csv"), output / "sharing.png")


def main(output: Path = HERE, results: Path = Path("results/kv_sharing")) -> int:
    """Writes sharing.csv and sharing.png; returns 1 if a claim fails."""
    frame = table([record for record in read_records(results) if isinstance(record, Done)])
    frame.to_csv(output / "sharing.csv", index=False, float_format="%.6g")
    draw(frame, output / "sharing.png")
    return verdict(claims(frame), "Keys and values shared by pairs of layers (methods B.7, claim 16)")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/kv_sharing")))
