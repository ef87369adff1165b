"""How many layers of attention does recall need? Four layers, of which none, one, two or all attend.

kvlab reproduce hybrid_ratio
python experiments/hybrid_ratio/figure.py [results/hybrid_ratio]
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kvlab.lab.axes import byte_axis
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import beside_legend, save, sheet
from kvlab.lab.record import Done
from kvlab.lab.results import interval_half_width, read_records
from kvlab.lab.styles import BLUE, INK, ORANGE, RED

HERE = Path(__file__).resolve().parent
RUNS = ((),)  # the sweep of the configuration of this name
PATTERNS = ("L L L L", "L L L A", "L A L A", "A A A A")
"""L is Gated DeltaNet, A multi-head attention; the first layer reads the embedding."""
SHARE = 0.99
"""Of full attention's accuracy: what one layer of four reaches, and none stays below."""
FULL, GUESS = 0.98, 0.05
"""Accuracy that full attention must reach, and that models without it must pass: claims on what has learned nothing
say nothing. A guess among the 256 values has 0.004."""
COLOURS = {"L L L L": ORANGE, "L L L A": RED, "L A L A": BLUE, "A A A A": INK}


def table(records: Sequence[Done]) -> pd.DataFrame:
    """A row a run: accuracy at 128:32, the steps that it took, and bytes of a sequence at its end, of keys and values
    and of everything."""
    rows = list[dict[str, Any]]()
    for record in records:
        mixer: Any = record.config["mixer"]
        memory = record.memory
        keys_and_values = sum(layer["allocated_bytes"] for layer in memory.layers if layer["state"] == "kv")
        rows.append(
            {
                "pattern": mixer["pattern"],
                "attention": mixer["pattern"].split().count("A"),
                "seed": record.config["seed"],
                "accuracy": record.quality.value,
                "steps": record.training.num_steps,
                "num_params": record.num_params,
                "kv_bytes": keys_and_values // memory.batch_size,
                "held_bytes": memory.allocated_bytes // memory.batch_size,
            }
        )
    return pd.DataFrame(rows).sort_values(["attention", "seed"], ignore_index=True)


def claims(frame: pd.DataFrame) -> list[Claim]:
    """METHODS B.7, claim 9, of the seeds' means. What was not run fails."""
    means = {pattern: group.accuracy.mean() for pattern, group in frame.groupby("pattern")}
    sizes = {pattern: int(group.kv_bytes.iloc[0]) for pattern, group in frame.groupby("pattern")}
    if missing := [pattern for pattern in PATTERNS if pattern not in means]:
        return [Claim("every pattern was run", ", ".join(PATTERNS), f"not run: {', '.join(missing)}", False)]
    none, one, _, every = (means[pattern] for pattern in PATTERNS)
    return [
        Claim("4 of 4: accuracy", f"at least {FULL}", f"{every:.4f}", bool(every >= FULL)),
        Claim("0 of 4: accuracy", f"above {GUESS}", f"{none:.4f}", bool(none > GUESS)),
        Claim("1 of 4: accuracy : all of 4", f"at least {SHARE}", f"{one / every:.4f}", bool(one >= SHARE * every)),
        Claim("0 of 4: accuracy : all of 4", f"below {SHARE}", f"{none / every:.4f}", bool(none < SHARE * every)),
        Claim.near("1 of 4: keys and values : all of 4", 0.25, sizes[PATTERNS[1]] / sizes[PATTERNS[3]], 0.0),
    ]


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Accuracy of every seed against the bytes that a sequence holds, and their mean with its 95% interval."""
    figure, panel = sheet(size=(8.6, 4.4))
    for pattern in PATTERNS:
        rows = frame[frame.pattern == pattern]
        if rows.empty:
            continue
        sizes, values = rows.held_bytes, rows.accuracy.tolist()
        label = f"{pattern.replace(' ', '')}: {pattern.count('A')} of 4 attend"
        panel.plot(sizes, values, "o", color=COLOURS[pattern], alpha=0.6, label=label)
        style = {"color": COLOURS[pattern], "marker": "_", "ms": 18, "mew": 2, "capsize": 4}
        panel.errorbar(sizes.iloc[:1], [statistics.fmean(values)], yerr=interval_half_width(values), **style)
    panel.set(xlabel="held by a sequence of 128 tokens", ylabel="accuracy of recall")
    panel.set_xlim(left=0)
    byte_axis(panel, is_log=False)
    panel.margins(y=0.1)
    panel.grid(alpha=0.25)
    beside_legend(panel)
    figure.suptitle("Attention layers among Gated DeltaNet (MQAR 128:32, 4 layers, 3 seeds)")
    save(figure, [path])


def redraw(output: Path = HERE) -> None:
    """hybrid.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "hybrid.csv"), output / "hybrid.png")


def main(output: Path = HERE, results: Path = Path("results/hybrid_ratio")) -> int:
    """Writes hybrid.csv and hybrid.png; returns 1 if a claim fails."""
    frame = table([record for record in read_records(results) if isinstance(record, Done)])
    frame.to_csv(output / "hybrid.csv", index=False, float_format="%.5g")
    draw(frame, output / "hybrid.png")
    return verdict(claims(frame), "Attention layers that recall needs (methods B.7, claim 9)")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/hybrid_ratio")))
