"""What eviction leaves of two pass keys: SmolLM2 asked about a text that its memory has compressed, before it saw the
question and behind it (after SnapKV, arXiv 2404.14469; SCBench, 2412.10319).

kvlab reproduce passkey_smollm2
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvlab.evaluation.score import SliceScore
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import save, sheet
from kvlab.lab.smollm2 import WORK, Bench, Material, with_material
from kvlab.lab.styles import BLUE, RED

HERE = Path(__file__).resolve().parent
BUDGETS = (0.5, 0.2)
METHODS: dict[str, dict[str, Any]] = {
    "h2o": {"type": "h2o"},
    "keydiff": {"type": "keydiff"},
    "random": {"type": "random"},
    "snapkv": {"type": "snapkv", "window": 16},
    "tova": {"type": "tova"},
    "knorm": {"type": "knorm"},
    "recency": {"type": "recency"},
}
"""All protect 4 sinks and the last 16 tokens, and keep as many slots in every head."""
FOUND_BEFORE = {
    ("h2o", False): ((0.94, 0.94), (0.53, 0.64)),
    ("keydiff", False): ((0.81, 0.94), (0.36, 0.44)),
    ("random", False): ((0.83, 0.78), (0.28, 0.31)),
    ("snapkv", False): ((0.17, 0.14), (0.06, 0.00)),
    ("tova", False): ((0.31, 0.28), (0.03, 0.06)),
    ("knorm", False): ((0.39, 0.39), (0.28, 0.08)),
    ("recency", False): ((0.28, 0.64), (0.03, 0.00)),
    ("h2o", True): ((0.94, 0.89), (0.58, 0.64)),
    ("keydiff", True): ((0.86, 0.97), (0.44, 0.61)),
    ("random", True): ((0.72, 0.78), (0.39, 0.31)),
    ("snapkv", True): ((0.53, 0.47), (0.44, 0.44)),
    ("tova", True): ((0.83, 0.83), (0.17, 0.36)),
    ("knorm", True): ((0.44, 0.39), (0.33, 0.14)),
    ("recency", True): ((0.28, 0.67), (0.03, 0.06)),
}
"""(method, query_aware): (first, second turn) at each budget, of 6 other contexts in another implementation, standard
error near 0.1. Not published."""


@dataclass(frozen=True)
class Sizes:
    """What is run; tests run less."""

    context: int = 512
    num_contexts: int = 4
    batch_size: int = 4
    chunk_len: int = 128
    sinks: int = 4
    recent: int = 16
    methods: Sequence[str] = tuple(METHODS)
    num_checked: int = 1
    """Contexts of which every logit is compared with the parallel form under the mask."""
    text: str = WORK


def bench_of(material: Material, sizes: Sizes, *, query_aware: bool, num_contexts: int) -> Bench:
    """The task for one of the two times at which a memory compresses."""
    overrides = [
        "task=passkey",
        f"task.path={sizes.text}",
        f"task.contexts=[{sizes.context}]",
        f"task.num_test={num_contexts}",
        "task.num_validation=1",
        "task.second_form=same",
        f"task.query_aware={str(query_aware).lower()}",
        f"memory.chunk_len={sizes.chunk_len}",
    ]
    return Bench(material, overrides, min(sizes.batch_size, num_contexts))


def memory_of(method: str, budget: float, sizes: Sizes) -> dict[str, Any]:
    """The memory of a cell."""
    protected = {"sinks": sizes.sinks, "recent": sizes.recent}
    return {"compression": METHODS[method] | protected, "budget": budget}


def rows_of(method: str, budget: float, aware: bool, slices: Sequence[SliceScore]) -> list[dict[str, Any]]:
    """A row a turn: the share of digits right, and the standard error over contexts."""
    rows = []
    for turn, part in enumerate(slices, 1):
        share = part.examples.correct.sum(axis=1) / part.examples.weight.sum(axis=1)
        error = share.std(ddof=1) / np.sqrt(len(share)) if len(share) > 1 else np.nan
        place = FOUND_BEFORE.get((method, aware))
        before = place[BUDGETS.index(budget)][turn - 1] if place and budget in BUDGETS else None
        rows.append(
            {
                "method": method,
                "budget": budget,
                "query_aware": aware,
                "turn": turn,
                "right": share.mean(),
                "standard_error": error,
                "first_digit": part.examples.right.reshape(len(share), -1)[:, 0].mean(),
                "contexts": len(share),
                "found_before": before,
            }
        )
    return rows


def measure(material: Material, sizes: Sizes, output: Path) -> pd.DataFrame:
    """Every cell; the table is written after each, so that a run that is cut leaves what it has."""
    rows: list[dict[str, Any]] = []
    for aware in (False, True):
        bench = bench_of(material, sizes, query_aware=aware, num_contexts=sizes.num_contexts)
        cells: list[tuple[str, float, Mapping[str, Any]]] = [("full", 1.0, {})]
        cells += [(name, budget, memory_of(name, budget, sizes)) for budget in BUDGETS[::-1] for name in sizes.methods]
        for method, budget, memory in cells:
            found = bench.through(memory, checked=False)
            rows += rows_of(method, budget, aware, found.slices)
            pd.DataFrame(rows).to_csv(output / "passkey.csv", index=False, float_format="%.4g")
            said = " and ".join(f"{row['right']:.2f}" for row in rows[-2:])
            print(f"aware {aware}, {method} {budget}: {said}; {found.cpu_s:.0f} CPU-s", flush=True)
    return pd.DataFrame(rows)


def worst_difference(material: Material, sizes: Sizes) -> float:
    """Of logits through pages that a compaction at the smaller budget has left, from the parallel form's."""
    bench = bench_of(material, sizes, query_aware=False, num_contexts=sizes.num_checked)
    return max(bench.through(memory_of(name, BUDGETS[-1], sizes)).worst for name in ("h2o", "keydiff"))


def claims(found: pd.DataFrame, worst: float) -> list[Claim]:
    """Every claim of this experiment: what holds at this size, and what does not."""
    by = found.groupby(["method", "budget", "query_aware"]).right.mean()
    first = found[found.turn == 1].set_index(["method", "budget", "query_aware"]).right
    full = first["full", 1.0, False]
    low, others = BUDGETS[-1], [name for name in METHODS if name not in ("recency", "snapkv", "tova")]

    def versus(what: str, better: float, worse: float, least: float = 0.0) -> Claim:
        return Claim(what, f"more by {least:g}", f"{better:.2f} and {worse:.2f}", bool(better - worse > least))

    least = min(by[name, low, False] for name in others)
    seen, unseen = (first["snapkv", low, is_seen] for is_seen in (True, False))
    tova_seen, tova_unseen = (first["tova", BUDGETS[0], is_seen] for is_seen in (True, False))
    return [
        Claim("full cache, first turn", ">= 0.92", f"{full:.2f}", bool(full >= 0.92)),
        versus("20%: H2O over random by head, both turns", by["h2o", low, False], by["random", low, False]),
        versus("20%: SnapKV, question seen over not, its turn", seen, unseen, 0.2),
        versus("50%: TOVA, question seen over not, its turn", tova_seen, tova_unseen, 0.2),
        versus("20%: the least of the others over recency", least, by["recency", low, False]),
        versus("not as published, as found before: H2O over SnapKV", by["h2o", low, False], by["snapkv", low, False]),
        Claim("logits, pages against the mask", "<= 1e-4", f"{worst:.1e}", bool(worst <= 1e-4)),
    ]


def draw(found: pd.DataFrame, path: Path) -> None:
    """Dots by method, a panel for each budget and time of compression; whiskers are standard errors."""
    figure, panels = sheet(2, 2, size=(10, 6.6), sharex=True, sharey=True)
    by_cell = found.set_index(["query_aware", "turn", "budget", "method"]).sort_index()
    names = list(dict.fromkeys(name for name in found.method if name != "full"))
    places = np.arange(len(names))
    for row, aware in enumerate((False, True)):
        for column, budget in enumerate(BUDGETS):
            axes = panels[row, column]
            for turn, colour, shift in ((1, BLUE, -0.12), (2, RED, 0.12)):
                of = by_cell.loc[aware, turn]
                full = of.loc[1.0, "full"].right
                cells = of.loc[budget].reindex(names)
                label = "first question" if turn == 1 else "second question"
                axes.errorbar(
                    cells.right, places + shift, xerr=cells.standard_error.fillna(0), fmt="o", color=colour, label=label
                )
                axes.axvline(full, color=colour, ls=":", lw=0.8)
            seen = "first question seen" if aware else "no question seen"
            axes.set(title=f"{budget:.0%} kept, {seen}", xlim=(-0.03, 1.03))
            axes.set_yticks(places, names)
            axes.grid(alpha=0.25, axis="x")
    panels[0, 0].invert_yaxis()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"Pass keys, SmolLM2-135M: {found.contexts.max()} contexts, whiskers are standard errors")
    for axes in panels[1]:
        axes.set_xlabel("share of digits right (dotted: full cache)")
    save(figure, [path])


def reproduce(material: Material, output: Path, sizes: Sizes | None = None) -> int:
    """Writes passkey.csv and passkey.png; returns 1 if a claim fails."""
    sizes, began = sizes or Sizes(), time.process_time()
    worst = worst_difference(material, sizes)
    found = measure(material, sizes, output)
    draw(found, output / "passkey.png")
    print(f"{time.process_time() - began:.0f} CPU seconds")
    return verdict(claims(found, worst), "Pass keys through compressed memories, SmolLM2-135M")


def redraw(output: Path = HERE) -> None:
    """passkey.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "passkey.csv"), output / "passkey.png")


def main(output: Path = HERE, results: Path | None = None) -> int:
    """As `reproduce`; 3, and a sentence, where the model or the text cannot be had."""
    return with_material(lambda material: reproduce(material, output))


if __name__ == "__main__":
    sys.exit(main())
