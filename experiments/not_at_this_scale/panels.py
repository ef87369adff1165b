"""The picture of not_at_this_scale, panel by panel."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvlab.lab.experiments import load_part
from kvlab.lab.plots import save, sheet
from kvlab.lab.styles import BLUE, GREEN, GREY, INK, PINK, RED, SKY
from kvlab.tasks.metrics import ACCURACY

runs, toys, mixers, ruler = (load_part("not_at_this_scale", part) for part in ("runs", "toys", "mixers", "ruler"))
SINK = 0.3
"""Share of its attention on token 0 from which on a head is said to have a sink."""
COLOURS, MARKERS = (BLUE, SKY, PINK, GREEN, RED), "osv^D"
"""Of the variants of longer recall; markers also of seeds."""


def draw(tables: Any, path: Path) -> None:
    """Of the figure's `Tables`: attention to token 0, perplexity by axis against the outliers put in, recall by method;
    then KDA, longer sequences, and RULER's tasks."""
    figure, panels = sheet(2, 3, size=(15, 9.6))
    for panel, (fill, table) in zip(
        panels.flat,
        (
            (_draw_heads, tables.heads),
            (_draw_axes, tables.axes),
            (_draw_recall, tables.runs),
            (_draw_mixers, tables.mixers),
            (_draw_lengths, tables.lengths),
            (_draw_ruler, tables.ruler),
        ),
        strict=True,
    ):
        fill(panel, table)
        panel.grid(alpha=0.25)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    save(figure, [path])


def _draw_heads(panel: Any, heads: pd.DataFrame) -> None:
    for place, (task, colour) in enumerate((("mqar", BLUE), ("text", RED))):
        shares = heads[heads.task == task].share.to_numpy()
        panel.plot(place + np.linspace(-0.3, 0.3, len(shares)), np.sort(shares), "o", color=colour, ms=4)
    panel.axhline(SINK, color=GREY, ls=":", label=f"a sink: {SINK:g}")
    panel.set_xticks((0, 1), ("recall", "text"))
    panel.set(ylim=(0, 1), ylabel="share of attention on token 0", title="Heads of all seeds")


def _draw_axes(panel: Any, axes: pd.DataFrame) -> None:
    for (axis, bits), cells in _grouped(axes, ["axis", "bits"]):
        style = {"none": ":", "channel": "-", "token": "--"}[axis]
        label = "not rounded" if axis == "none" else f"by {axis}, {bits} bits"
        colour = GREY if axis == "none" else BLUE if bits == 4 else RED
        means = cells.groupby("scale").perplexity.mean()
        panel.plot(means.index, means, style, marker="o", ms=4, color=colour, label=label)
    panel.set(xscale="log", yscale="log", xlabel="two channels of keys are scaled by", ylabel="perplexity a byte")
    panel.set_xticks(toys.SCALES, [str(scale) for scale in toys.SCALES])
    panel.set_yticks((4, 8, 16, 32), ("4", "8", "16", "32"))
    panel.minorticks_off()
    panel.set_title("Keys rounded, the function the same")


def _draw_recall(panel: Any, frame: pd.DataFrame) -> None:
    recall: Any = frame[frame.task == "mqar"]
    names = ["full", *runs.RECALL]
    for slots, colour in ((runs.HALF, BLUE), (runs.QUARTER, RED)):
        means = recall[recall.slots == slots].groupby("method").value.mean().reindex(names)
        panel.plot(means, range(len(names)), "o", color=colour, label=f"{slots} of 64 slots")
    panel.plot(recall[recall.method == "full"].value.mean(), 0, "P", color=INK, ms=8, label="all slots")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set(xlim=(-0.03, 1.03), xlabel="accuracy of recall", title="Methods at equal slots")


def _draw_mixers(panel: Any, frame: pd.DataFrame) -> None:
    for seed, cells in _grouped(frame.sort_values("seed"), "seed"):
        bits = cells.set_index("method").value.reindex([mixers.GATED, mixers.KDA])
        panel.plot((0, 1), bits, "-", marker=MARKERS[seed], color=BLUE, ms=6, label=f"seed {seed}")
    panel.set_xticks((0, 1), (mixers.GATED, mixers.KDA))
    panel.set(xlim=(-0.4, 1.4), ylabel="bits a byte of text", title="A decay a head, and one a channel")


def _draw_lengths(panel: Any, frame: pd.DataFrame) -> None:
    for name, marker, colour in zip(mixers.VARIANTS, MARKERS, COLOURS, strict=True):
        cells = frame[frame.method == name]
        panel.plot(cells.length, cells.value, marker, color=colour, ms=4, alpha=0.5)
        mean = cells.groupby("length").value.mean()
        panel.plot(mean.index, mean, "-", marker=marker, color=colour, ms=6, label=name)
    panel.set(xscale="log", ylim=(0, 1.03), xlabel="tokens (trained on 64)", ylabel="accuracy of recall")
    panel.set_xticks(mixers.LENGTHS, [str(length) for length in mixers.LENGTHS])
    panel.minorticks_off()
    panel.set_title(f"Longer sequences, {mixers.PAIRS} pairs (small: seeds)")


def _draw_ruler(panel: Any, frame: pd.DataFrame) -> None:
    names = [ruler.PASSKEY, *ruler.TASKS]
    for (context, cells), colour in zip(
        _grouped(frame, "context"), (BLUE, RED), strict=False
    ):  # SmolLM2 may be not run
        of = cells.groupby("task")[["right", "chance"]].mean().reindex(names)
        panel.plot(of.right, range(len(names)), "o", color=colour, label=f"full cache, {context:,} tokens")
        panel.plot(of.chance, range(len(names)), "|", color=colour, ms=14, label=f"chance, {context:,}")
    panel.axvline(ACCURACY.floor, color=GREY, ls=":")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set(xlim=(-0.03, 1.03), xlabel="right (dotted: what tells methods apart)", title="RULER's tasks, SmolLM2")


def _grouped(frame: Any, by: str | list[str]) -> Any:
    return frame.groupby(by, sort=False)
