"""Does a trained indexer find what attention needs? Recall against bytes held and bytes read, and a pass/fail table.

kvlab reproduce indexer
python experiments/indexer/figure.py [results/indexer]

One layer of grouped-query attention behind a short convolution. Dense attention reads every token; the other arms read
16 of up to 128, which an indexer chooses.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kvlab.lab.axes import byte_axis
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import beside_legend, save, sheet
from kvlab.lab.record import Done
from kvlab.lab.results import interval_half_width, read_records
from kvlab.lab.styles import GREEN, RED, SKY, colour

HERE = Path(__file__).resolve().parent
LONG, SELECTED = "128:32", 16


@dataclass(frozen=True)
class Arm:
    """One way to train: a mixer, what its loss beside the labels weighs, and how long it attends densely."""

    name: str
    mixer: str
    index_loss: float | None
    dense_share: float | None
    colour: str

    @property
    def words(self) -> tuple[str, ...]:
        """The overrides of its sweep."""
        fields = {"index_loss": self.index_loss, "dense_share": self.dense_share}
        given = (f"mixer.A.{name}={value}" for name, value in fields.items() if value is not None)
        return (f"mixer={self.mixer}", *given)

    def is_of(self, record: Done) -> bool:
        """Whether a run is of this arm."""
        mixer: Any = record.config["mixer"]
        layer = mixer["A"]
        return mixer["name"] == self.mixer and all(
            layer.get(name) == value
            for name, value in (("index_loss", self.index_loss), ("dense_share", self.dense_share))
        )


DENSE = Arm("dense", "gqa", None, None, SKY)
TRAINED = Arm("warm-up and sparse steps", "indexed", 1.0, 0.8, colour("indexed"))
WARM = Arm("warm-up only", "indexed", 1.0, 1.0, GREEN)
UNTRAINED = Arm("untrained indexer", "indexed", 0.0, 1.0, RED)
ARMS = (DENSE, TRAINED, WARM, UNTRAINED)
RUNS = tuple(arm.words for arm in ARMS)


def at_random(slice_name: str, num_selected: int = SELECTED) -> float:
    """The share of questions whose pair a random choice of tokens reads: the mean of num_selected / (t + 1) over the
    places of questions, taken as uniform over the even ones behind the pairs."""
    length, pairs = (int(part) for part in slice_name.split(":"))
    return statistics.fmean(min(1.0, num_selected / (place + 1)) for place in range(2 * pairs, length, 2))


def table(records: list[Done]) -> pd.DataFrame:
    """A row for each arm and slice, over seeds. Bytes are those at the longest context."""
    rows = []
    for arm in ARMS:
        group = [record for record in records if arm.is_of(record)]
        for name in group[0].quality.slices if group else ():
            values = [record.quality.slices[name] for record in group]
            memory = group[0].memory
            rows.append(
                {
                    "arm": arm.name,
                    "slice": name,
                    "accuracy": statistics.fmean(values),
                    "half_width": interval_half_width(values),
                    "lowest": min(values),
                    "highest": max(values),
                    "num_seeds": len(values),
                    "held_bytes": memory.allocated_bytes // memory.batch_size,
                    "read_bytes": memory.read_bytes_per_token,
                    "at_random": None if arm is DENSE else at_random(name),
                }
            )
    return pd.DataFrame(rows)


def claims(frame: pd.DataFrame) -> list[Claim]:
    """Every claim of this experiment, on 128:32. One whose runs are not at hand fails."""
    rows: dict[str, Any] = {row["arm"]: row for row in frame.to_dict("records") if row["slice"] == LONG}
    missing = [arm.name for arm in ARMS if arm.name not in rows]
    if missing:
        return [
            Claim("every arm was run", ", ".join(arm.name for arm in ARMS), f"not run: {', '.join(missing)}", False)
        ]
    dense, trained, untrained = rows[DENSE.name], rows[TRAINED.name], rows[UNTRAINED.name]
    share = trained["accuracy"] / dense["accuracy"]
    chance = at_random(LONG)
    return [
        Claim(
            "a warmed-up indexer keeps dense attention's accuracy, 16 of 128 tokens read",
            ">= 0.95 of dense",
            f"{share:.3f} ({trained['accuracy']:.3f} of {dense['accuracy']:.3f})",
            share >= 0.95,
        ),
        Claim(
            "an untrained indexer is no better than reading 16 tokens at random, to 0.1",
            f"<= {chance + 0.1:.3f}",
            f"{untrained['accuracy']:.3f}",
            untrained["accuracy"] <= chance + 0.1,
        ),
        Claim(
            "an index is held beside all that attention holds",
            "more bytes held than dense",
            f"{trained['held_bytes']:,} against {dense['held_bytes']:,}",
            trained["held_bytes"] > dense["held_bytes"],
        ),
        Claim(
            "fewer bytes are read for a token",
            "fewer than dense",
            f"{trained['read_bytes']:,} against {dense['read_bytes']:,}",
            trained["read_bytes"] < dense["read_bytes"],
        ),
    ]


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Accuracy on 128:32 against bytes held a sequence, and against bytes read for a decoded token; bars are 95% over
    seeds."""
    figure, panels = sheet(1, 2, size=(12, 4.4), sharey=True)
    labels = {"held_bytes": "bytes of pages and states held a sequence", "read_bytes": "bytes read for a decoded token"}
    for panel, (axis, label) in zip(panels, labels.items(), strict=True):
        for arm in ARMS:
            row: Any = frame[(frame.arm == arm.name) & (frame.slice == LONG)]
            # Two arms may lie on one another: one is a ring.
            face = {"mfc": "none", "mew": 2, "ms": 14} if arm is TRAINED else {"ms": 8}
            style = {"color": arm.colour, "marker": "o", "capsize": 3, "ls": "", **face}
            panel.errorbar(row[axis], row.accuracy, yerr=row.half_width, label=arm.name, **style)
        panel.axhline(at_random(LONG), color="0.5", ls=":", label="16 tokens at random")
        panel.set(xlabel=label, ylim=(-0.03, 1.05), xlim=(0, 1.25 * frame[axis].max()))
        byte_axis(panel, is_log=False)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy of recall")
    beside_legend(panels[1])
    figure.suptitle("Recall where an indexer chooses 16 of 128 tokens (MQAR 128:32, one layer)")
    save(figure, [path])


def redraw(output: Path = HERE) -> None:
    """indexer.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "indexer.csv"), output / "indexer.png")


def main(output: Path = HERE, results: Path = Path("results/indexer")) -> int:
    """Writes indexer.csv and indexer.png; returns 1 if a claim fails."""
    records = [record for record in read_records(results) if isinstance(record, Done)]
    frame = table(records)
    frame.to_csv(output / "indexer.csv", index=False, float_format="%.5g")
    draw(frame, output / "indexer.png")
    return verdict(claims(frame), "A warmed-up indexer (methods B.7, claim 15)")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/indexer")))
