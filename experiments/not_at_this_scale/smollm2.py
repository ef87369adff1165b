"""The claims on budgets and on KVzip with published weights: SmolLM2 asked for pass keys, as in passkey_smollm2, whose
task this is, at equal slots.

python experiments/not_at_this_scale/smollm2.py      # this half alone
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvlab.evaluation.score import SliceScore
from kvlab.lab.experiments import load_figure
from kvlab.lab.smollm2 import Material, with_material

HERE = Path(__file__).resolve().parent
HALF, FIFTH = 240, 96
"""Slots a head of a prompt of some 480 tokens: whole pages of 16, so that heads of different counts hold as many."""


@dataclass(frozen=True)
class Cell:
    """A memory, the slots it keeps (None: all), and whether it saw the first question before it dropped any."""

    method: str
    slots: int | None = None
    query_aware: bool = False
    fields: dict[str, Any] = field(default_factory=dict)

    def memory(self, sinks: int, recent: int) -> dict[str, Any]:
        """The fields of the memory's section."""
        if self.slots is None:
            return {}
        return {"compression": {"sinks": sinks, "recent": recent} | self.fields, "budget": self.slots}


SNAPKV = {"type": "snapkv", "window": 16}
CELLS = (
    Cell("full"),
    Cell("H2O", HALF, False, {"type": "h2o"}),
    Cell("random, each head", HALF, False, {"type": "random"}),
    Cell("Knorm", HALF, False, {"type": "knorm"}),
    Cell("KVzip", HALF, False, {"type": "kvzip"}),
    Cell("SnapKV", FIFTH, True, SNAPKV),
    Cell("SnapKV, pyramid", FIFTH, True, {**SNAPKV, "layers": "pyramid"}),
    Cell("SnapKV, ada", FIFTH, True, {**SNAPKV, "heads": "ada"}),
)
"""SnapKV looks through a window, so that it must have seen the question; the others are asked unprepared."""


def rows_of(cell: Cell, slices: Sequence[SliceScore]) -> list[dict[str, Any]]:
    """A row for each context and turn: the share of its digits that are right. Behind a question that was seen, its own
    turn alone."""
    rows = []
    for turn, part in enumerate(slices[: 1 if cell.query_aware else None], 1):
        shares = part.examples.correct.sum(axis=1) / part.examples.weight.sum(axis=1)
        place = {"method": cell.method, "slots": cell.slots, "query_aware": cell.query_aware, "turn": turn}
        rows += [place | {"context": context, "right": share} for context, share in enumerate(np.asarray(shares))]
    return rows


def measure(material: Material, output: Path, cells: Sequence[Cell] = CELLS, sizes: Any = None) -> pd.DataFrame:
    """Every cell; the table is written after each, so that a run that is cut leaves what it has."""
    passkey = load_figure("passkey_smollm2")
    sizes, rows, benches = sizes or passkey.Sizes(), list[dict[str, Any]](), dict[bool, Any]()
    for cell in cells:
        aware = cell.query_aware
        if aware not in benches:
            benches = {aware: passkey.bench_of(material, sizes, query_aware=aware, num_contexts=sizes.num_contexts)}
        found = benches[aware].through(cell.memory(sizes.sinks, sizes.recent), checked=False)
        rows += rows_of(cell, found.slices)
        pd.DataFrame(rows).to_csv(output / "smollm2.csv", index=False, float_format="%.4g")
        right = np.mean([row["right"] for row in rows if row["method"] == cell.method])
        print(f"{cell.method}, {cell.slots} slots: {right:.2f} right, {found.cpu_s:.0f} CPU-s", flush=True)
    return pd.DataFrame(rows)


def main(output: Path = HERE, results: Path | None = None) -> int:
    """Writes smollm2.csv; 3, and a sentence, where the model or the text cannot be had."""
    return with_material(lambda material: int(measure(material, output).empty))


if __name__ == "__main__":
    sys.exit(main())
