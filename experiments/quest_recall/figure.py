"""How much attention lies in the pages that a selection reads: Quest's bound against mean keys and controls on SmolLM2
(arXiv 2406.10774, 2502.13189).

kvlab reproduce quest_recall
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kvlab.evaluation.page_recall import Recall, page_recall
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import save, sheet
from kvlab.lab.smollm2 import Bench, Material, with_material
from kvlab.lab.styles import BLUE, INK, ORANGE
from kvlab.selection import Selection
from kvlab.selection.controls import Oracle, Random, Recency
from kvlab.selection.mean_key import MeanKey
from kvlab.selection.quest import Quest

HERE = Path(__file__).resolve().parent
FRACTIONS = (0.125, 0.25)
NAMES = {
    "quest": "bound, max over group",
    "quest_mean": "bound, mean over group",
    "mean_key": "mean key",
    "recency": "newest pages",
    "random": "random pages",
    "oracle": "oracle",
}
FOUND_BEFORE = {
    0.125: {"quest": 0.72, "quest_mean": 0.75, "mean_key": 0.42, "recency": 0.36, "random": 0.13, "oracle": 0.82},
    0.25: {"quest": 0.84, "quest_mean": 0.86, "mean_key": 0.58, "recency": 0.42, "random": 0.24, "oracle": 0.90},
}
"""Layers 2-29 of the same weights and text, nothing forced, in another implementation: not published."""


@dataclass(frozen=True)
class Sizes:
    """What is run; tests run less."""

    start: int = 30_000
    num_tokens: int = 1024
    page_size: int = 16
    positions: tuple[int, ...] = tuple(range(768, 1024, 32))
    first_layer: int = 2
    """Layers before are flat: what selects keeps them dense."""


def methods(fraction: float) -> dict[str, Selection]:
    """Every method at a fraction, with the first page forced ("forced") and not. A query's own page is read by all and
    counts on neither side, so that `last_pages` forces no other."""
    found: dict[str, Selection] = {}
    for suffix, first in (("", 0), (" forced", 1)):
        common = {"fraction": fraction, "first_pages": first, "last_pages": 1}
        found |= {
            f"quest{suffix}": Quest(group="max", **common),
            f"quest_mean{suffix}": Quest(group="mean", **common),
            f"mean_key{suffix}": MeanKey(**common),
            f"recency{suffix}": Recency(**common),
            f"random{suffix}": Random(**common),
            f"oracle{suffix}": Oracle(**common),
        }
    return found


def row(fraction: float, name: str, recall: Recall, first_layer: int) -> dict[str, float | str | bool]:
    """A row of the table: means over layers from `first_layer` on, and of those before. `rest` is without the first
    page."""
    method, _, forced = name.partition(" ")
    return {
        "fraction": fraction,
        "method": method,
        "first_page_forced": bool(forced),
        "share": recall.share[first_layer:].mean(),
        "rest": recall.rest[first_layer:].mean(),
        "first_layers": recall.share[:first_layer].mean(),
        "worst_layer": recall.share[first_layer:].min(),
    }


def claims(found: pd.DataFrame) -> list[Claim]:
    """Every claim of this experiment."""
    share, rest = (found.set_index(["fraction", "first_page_forced", "method"])[part] for part in ("share", "rest"))
    rows = []
    for fraction in FRACTIONS:
        free, forced = share[fraction, False], share[fraction, True]
        best = free["oracle"]
        bound = max(free["quest"], free["quest_mean"])
        mean, led = free["mean_key"] / best, rest[fraction, True]["mean_key"] / rest[fraction, True]["oracle"]
        title = f"{fraction:.1%} of pages"
        rows += [
            Claim(f"{title}: bound / oracle", ">= 0.90", f"{bound / best:.3f}", bool(bound >= 0.9 * best)),
            Claim(f"{title}: mean key / oracle", "< 0.75", f"{mean:.3f}", bool(mean < 0.75)),
            Claim(f"{title}: the same, first page forced, of the rest", ">= 0.75", f"{led:.3f}", bool(led >= 0.75)),
            Claim(
                f"{title}: mean over group >= max - 0.01",
                ">=",
                f"{free['quest_mean']:.3f} and {free['quest']:.3f}",
                bool(free["quest_mean"] >= free["quest"] - 0.01),
            ),
            Claim(
                f"{title}: forcing the first page gives mean key more than the bound",
                ">",
                f"{forced['mean_key'] - free['mean_key']:+.3f} and {forced['quest'] - free['quest']:+.3f}",
                bool(forced["mean_key"] - free["mean_key"] > forced["quest"] - free["quest"]),
            ),
        ]
        for method, before in FOUND_BEFORE[fraction].items():
            rows.append(Claim.near(f"{title}: {NAMES[method]}, as found before", before, free.to_dict()[method], 0.04))
    return rows


def draw(found: pd.DataFrame, path: Path) -> None:
    """Bars by method, a panel a fraction; the rest of each bar is what forcing the first page adds."""
    figure, panels = sheet(1, len(FRACTIONS), size=(10, 3.8), sharey=True)
    places = np.arange(len(NAMES))
    for axes, fraction in zip(panels, FRACTIONS, strict=True):
        of = found.set_index(["fraction", "first_page_forced", "method"]).share[fraction]
        free, forced = (np.array([of[is_forced, name] for name in NAMES]) for is_forced in (False, True))
        axes.barh(places - 0.2, free, 0.4, color=BLUE, label="pages by score")
        axes.barh(places + 0.2, forced, 0.4, color=ORANGE, label="first page forced")
        axes.axvline(free[-1], color=INK, lw=1, ls=":", label="the oracle")
        axes.set(xlim=(0, 1), xlabel="share of attention to full pages", title=f"{fraction:.1%} of pages read")
        axes.set_yticks(places, list(NAMES.values()))
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    save(figure, [path])


def reproduce(material: Material, output: Path, sizes: Sizes | None = None) -> int:
    """Writes recall.csv and recall.png; returns 1 if a claim fails."""
    sizes, began, rows = sizes or Sizes(), time.process_time(), []
    bench = Bench(material, ["task=perplexity"])
    tokens = material.tokens(sizes.start, sizes.num_tokens)[None]
    asked = {f"{fraction} {name}": each for fraction in FRACTIONS for name, each in methods(fraction).items()}
    model, where = bench.model, {"page_size": sizes.page_size, "positions": sizes.positions}
    for name, recall in page_recall(model.structure, model.params, tokens, asked, **where).items():
        fraction, _, method = name.partition(" ")
        rows.append(row(float(fraction), method, recall, sizes.first_layer))
    found = pd.DataFrame(rows)
    found.to_csv(output / "recall.csv", index=False, float_format="%.4g")
    draw(found, output / "recall.png")
    print(f"{time.process_time() - began:.0f} CPU seconds")
    return verdict(claims(found), "Recall of attention by pages, SmolLM2-135M (arXiv 2406.10774)")


def redraw(output: Path = HERE) -> None:
    """recall.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "recall.csv"), output / "recall.png")


def main(output: Path = HERE, results: Path | None = None) -> int:
    """As `reproduce`; 3, and a sentence, where the model or the text cannot be had."""
    return with_material(lambda material: reproduce(material, output))


if __name__ == "__main__":
    sys.exit(main())
