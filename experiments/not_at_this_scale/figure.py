"""What does not hold at this scale: published claims on models of two layers that were trained here, and on SmolLM2.

kvlab reproduce not_at_this_scale
python experiments/not_at_this_scale/figure.py [results/not_at_this_scale]

A claim that does not hold here is a finding, not a failure: the exit status is 1 only where what makes the findings
worth anything fails, such as a model that has learned nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from kvlab.lab.claims import Claim, verdict
from kvlab.lab.experiments import load_part
from kvlab.lab.record import Done
from kvlab.lab.results import interval_half_width, read_records
from kvlab.lab.smollm2 import Missing, material

HERE = Path(__file__).resolve().parent
runs, toys, smollm2 = (load_part("not_at_this_scale", part) for part in ("runs", "toys", "smollm2"))
RUNS = runs.RUNS
SINK = 0.3
"""Share of its attention on token 0 from which on a head is said to have a sink."""
WINDOW_RATIO, AXES_RATIO = 1.8, 1.3
"""By how much perplexity must be larger for a claim to hold, as in sinks_smollm2 and kivi_axes."""
WORDS = {True: "holds", False: "does not", None: "not run"}


@dataclass(frozen=True)
class Finding:
    """A published claim, where it was asked here, what was measured, and whether it holds there; None: not run."""

    claim: str
    arxiv: str
    where: str
    measured: str
    holds: bool | None

    @classmethod
    def not_run(cls, claim: str, arxiv: str, where: str) -> "Finding":
        """What it says where the runs, or the model, are not at hand."""
        return cls(claim, arxiv, where, "not run", None)


class Cells:
    """Values by method and slots, one for each seed or context, which two methods have in the same order."""

    def __init__(self, frame: Any, value: str, by: str):
        """Of a table with columns `method` and `slots`; `by` tells the values of a cell apart."""
        found = dict[tuple[str, int], dict[int, list[float]]]()
        for row in frame.to_dict("records"):
            place = row["method"], 0 if pd.isna(row["slots"]) else int(row["slots"])
            found.setdefault(place, {}).setdefault(row[by], []).append(row[value])
        self.values = {place: [float(np.mean(cell[name])) for name in sorted(cell)] for place, cell in found.items()}

    def mean(self, method: str, slots: int = 0) -> float | None:
        """Of a cell; None: not run. 0 slots: the full memory."""
        found = self.values.get((method, slots))
        return None if found is None else float(np.mean(found))

    def above(self, method: str, others: Sequence[str], slots: int) -> tuple[str, bool | None]:
        """Whether a method is above every one of the others at equal slots, by more than the 95% interval of the paired
        difference; and the numbers."""
        cells = [self.values.get((name, slots)) for name in (method, *others)]
        if any(cell is None or len(cell) != len(cells[0] or ()) for cell in cells):
            return "not run", None
        first, *rest = (np.asarray(cell) for cell in cells)
        said, holds = [f"{first.mean():.3f}"], True
        for name, other in zip(others, rest, strict=True):
            half_width = interval_half_width((first - other).tolist())
            said.append(f"{name} {other.mean():.3f} (difference {(first - other).mean():+.3f} ± {half_width:.3f})")
            holds &= bool((first - other).mean() > half_width)
        return "; ".join(said), holds


def read(results: Path) -> list[Done]:
    """The finished runs of this experiment."""
    return [record for record in read_records(results) if isinstance(record, Done)]


def table(records: Sequence[Done]) -> pd.DataFrame:
    """A row a run: its metric, accuracy of recall or bits a byte of text."""
    rows = [
        {
            "task": record.config["task"]["type"],
            "method": name,
            "slots": record.config["memory"].get("budget"),
            "seed": record.config["seed"],
            "value": record.quality.value,
            "held_bytes": record.memory.allocated_bytes // record.memory.batch_size,
            "logit_error": record.lossy.logit_error if record.lossy else None,
        }
        for record in records
        if (name := runs.name_of(record.config))
    ]
    return pd.DataFrame(rows).sort_values(["task", "method", "slots", "seed"], ignore_index=True)


def findings(frame: pd.DataFrame, heads: pd.DataFrame, axes: pd.DataFrame, asked: pd.DataFrame) -> list[Finding]:
    """Every row; `asked` is SmolLM2's table, empty where it was not run."""
    recall = Cells(frame[frame.task == "mqar"], "value", "seed")
    passkey = Cells(asked, "right", "context")
    return [*_sinks(frame, heads, recall), *_axes(axes), *_methods(recall, passkey)]


def _sinks(frame: pd.DataFrame, heads: pd.DataFrame, recall: Cells) -> list[Finding]:
    """1: attention sinks."""
    rows, arxiv = [], "2309.17453"
    for task, where in (("mqar", "recall"), ("text", "text by the byte")):
        shares = heads[heads.task == task].share
        claim = f"most heads pay more than {SINK:g} of their attention to token 0"
        if shares.empty:
            rows.append(Finding.not_run(claim, arxiv, where))
            continue
        count = int((shares > SINK).sum())
        said = f"{count} of {len(shares)} heads; mean share {shares.mean():.3f}, largest {shares.max():.3f}"
        rows.append(Finding(claim, arxiv, where, said, 2 * count > len(shares)))
    text = Cells(frame[frame.task == "text"], "value", "seed")
    full, bare, sunk = (
        text.mean("full"),
        text.mean("window", runs.STREAMED),
        text.mean("window, 4 sinks", runs.STREAMED),
    )
    claim, where = f"a window without sinks: perplexity x {WINDOW_RATIO:g} or more", f"text, {runs.STREAMED} slots"
    if full is None or bare is None or sunk is None:
        rows.append(Finding.not_run(claim, arxiv, where))
    else:
        ratio = 2 ** (bare - sunk)
        said = f"x {ratio:.3f}: {2**bare:.3f} without, {2**sunk:.3f} with 4, {2**full:.3f} with all"
        rows.append(Finding(claim, arxiv, where, said, ratio >= WINDOW_RATIO))
    said, holds = recall.above("recency, 4 sinks", ["recency"], runs.HALF)
    return [*rows, Finding("4 sinks and the newest above the newest", arxiv, f"recall, {runs.HALF} slots", said, holds)]


def _axes(axes: pd.DataFrame) -> list[Finding]:
    """2: KIVI's axes without outliers and with those that were put in."""
    rows = []
    for scale in toys.SCALES if len(axes) else ():
        cells = axes[axes.scale == scale]
        of = cells.groupby(["axis", "bits"]).perplexity.mean()
        ratio = of["token", 2] / of["channel", 2]
        said = ", ".join(f"{bits} bits {of['channel', bits]:.2f}, {of['token', bits]:.2f}" for bits in (4, 2))
        said = f"by channel, by token: {said}; exact {of['none', 0]:.2f}; channels {cells.channel_ratio.mean():.1f} : 1"
        claim = f"2 bits: keys by token cost perplexity x {AXES_RATIO:g} or more"
        where = "text" if scale == 1 else f"text, two channels of keys x {scale}"
        rows.append(Finding(claim, "2402.02750", where, said, bool(ratio >= AXES_RATIO)))
    return rows


def _methods(recall: Cells, passkey: Cells) -> list[Finding]:
    """3 to 6: methods of eviction at equal slots, on recall and on SmolLM2."""
    seen, unseen = ("pass keys, SmolLM2, question seen", smollm2.FIFTH), ("pass keys, SmolLM2", smollm2.HALF)
    half, quarter = ("recall", runs.HALF), ("recall", runs.QUARTER)
    kvzip = "KVzip above all others, question unseen"
    asked = [
        ("short keys are the ones to keep: above random", "2406.11430", "Knorm", ["random, each head"], [half, unseen]),
        (
            "a pyramid over layers above as many for each",
            "2406.02069",
            "SnapKV, pyramid",
            ["SnapKV"],
            [half, quarter, seen],
        ),
        ("heads of different counts above equal ones", "2407.11550", "SnapKV, ada", ["SnapKV"], [half, seen]),
        (kvzip, "2505.23416", "KVzip", ["H2O", "Expected Attention", "SnapKV"], [quarter]),
        (kvzip, "2505.23416", "KVzip", ["H2O", "random, each head"], [unseen]),
    ]
    rows = []
    for claim, arxiv, method, against, places in asked:
        for where, slots in places:
            cells = recall if where == "recall" else passkey
            said, holds = cells.above(method, against, slots)
            rows.append(Finding(claim, arxiv, f"{where}, {slots} slots", said, holds))
    return rows


def claims(frame: pd.DataFrame, axes: pd.DataFrame, asked: pd.DataFrame) -> list[Claim]:
    """What must hold for the findings to mean anything."""
    recall, text = (Cells(frame[frame.task == task], "value", "seed").mean("full") or 0 for task in ("mqar", "text"))
    error = frame.logit_error.max()
    rows = [
        Claim("recall is learned", ">= 0.98", f"{recall:.3f}", recall >= 0.98),
        Claim("text is learned: bits a byte", "<= 3", f"{text:.3f}", 0 < text <= 3),
        Claim("logits, pages against the mask", "<= 1e-4", f"{error:.1e}", bool(error <= 1e-4)),
    ]
    for what, axis, bits in (
        ("outliers change nothing in full precision", "none", 0),
        ("nor by channel", "channel", 2),
    ):
        cells = axes[(axes.axis == axis) & (axes.bits == bits)].groupby("seed").perplexity
        spread = (cells.max() / cells.min() - 1).max()
        rows.append(Claim(what, "<= 1e-6", f"{spread:.1e}", bool(spread <= 1e-6)))
    if len(asked):
        full = asked[(asked.method == "full") & (asked.turn == 1)].right.mean()
        rows.append(Claim("SmolLM2 finds pass keys, full cache", ">= 0.92", f"{full:.2f}", bool(full >= 0.92)))
    return rows


def show(rows: Sequence[Finding]) -> None:
    """The findings as a table."""
    printed = Table(
        "published claim", "arXiv", "where", "measured", "here", title="At this scale", title_justify="left"
    )
    for row in rows:
        printed.add_row(row.claim, row.arxiv, row.where, row.measured, WORDS[row.holds])
    Console(highlight=False, width=160).print(printed)


def draw(frame: pd.DataFrame, heads: pd.DataFrame, axes: pd.DataFrame, path: Path) -> None:
    """Attention to token 0 by head, perplexity by axis against the outliers put in, and recall by method."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for place, (task, colour) in enumerate((("mqar", "#0072b2"), ("text", "#d55e00"))):
        shares = heads[heads.task == task].share.to_numpy()
        left.plot(place + np.linspace(-0.3, 0.3, len(shares)), np.sort(shares), "o", color=colour, ms=4)
    left.axhline(SINK, color="#555555", ls=":", label=f"a sink: {SINK:g}")
    left.set_xticks((0, 1), ("recall", "text"))
    left.set(ylim=(0, 1), ylabel="share of attention on token 0", title="Heads of all seeds")
    left.legend(fontsize=8)
    for (axis, bits), cells in _grouped(axes, ["axis", "bits"]):
        style = {"none": ":", "channel": "-", "token": "--"}[axis]
        label = "not rounded" if axis == "none" else f"by {axis}, {bits} bits"
        colour = "#555555" if axis == "none" else "#0072b2" if bits == 4 else "#d55e00"
        means = cells.groupby("scale").perplexity.mean()
        middle.plot(means.index, means, style, marker="o", ms=4, color=colour, label=label)
    middle.set(xscale="log", yscale="log", xlabel="two channels of keys are scaled by", ylabel="perplexity a byte")
    middle.set_xticks(toys.SCALES, [str(scale) for scale in toys.SCALES])
    middle.set_yticks((4, 8, 16, 32), ("4", "8", "16", "32"))
    middle.minorticks_off()
    middle.set_title("Keys rounded, the function the same")
    middle.legend(fontsize=8)
    recall: Any = frame[frame.task == "mqar"]
    names = ["full", *runs.RECALL]
    for slots, colour in ((runs.HALF, "#0072b2"), (runs.QUARTER, "#d55e00")):
        means = recall[recall.slots == slots].groupby("method").value.mean().reindex(names)
        right.plot(means, range(len(names)), "o", color=colour, label=f"{slots} of 64 slots")
    right.plot(recall[recall.method == "full"].value.mean(), 0, "P", color="black", ms=8)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.invert_yaxis()
    right.set(xlim=(-0.03, 1.03), xlabel="accuracy of recall", title="Methods at equal slots")
    right.legend(fontsize=8)
    for panel in (left, middle, right):
        panel.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _grouped(frame: Any, by: list[str]) -> Any:
    return frame.groupby(by, sort=False)


def passkeys(output: Path) -> pd.DataFrame:
    """SmolLM2's table; empty, and a sentence, where the model or the text cannot be had."""
    try:
        found = material()
    except Missing as error:
        print(f"kvlab: SmolLM2's rows are not run: {error}", file=sys.stderr)
        return pd.DataFrame(columns=["method", "slots", "query_aware", "turn", "context", "right"])
    return smollm2.measure(found, output)


def main(output: Path = HERE, results: Path = Path("results/not_at_this_scale")) -> int:
    """Writes findings.csv, the tables behind it and not_at_this_scale.png; returns 1 if a precondition fails."""
    records = read(results)
    full = [record for record in records if runs.name_of(record.config) == "full"]
    frame, heads = table(records), pd.concat([toys.sinks(record) for record in full], ignore_index=True)
    axes = pd.DataFrame(
        [row for record in full if record.config["task"]["type"] == "text" for row in toys.axes(record)]
    )
    layers = pd.DataFrame([row for record in full for row in toys.silenced(record)])
    for name, each in (("runs", frame), ("heads", heads), ("axes", axes), ("layers", layers)):
        each.to_csv(output / f"{name}.csv", index=False, float_format="%.5g")
    draw(frame, heads, axes, output / "not_at_this_scale.png")
    asked = passkeys(output)
    rows = findings(frame, heads, axes, asked)
    pd.DataFrame([asdict(row) for row in rows]).to_csv(output / "findings.csv", index=False)
    show(rows)
    return verdict(claims(frame, axes, asked), "What the findings stand on")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/not_at_this_scale")))
