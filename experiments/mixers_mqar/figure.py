"""Recall of mixers whose state is of constant size, at about equal states: MQAR, plain and with overwritten keys.

kvlab reproduce mixers_mqar
python experiments/mixers_mqar/figure.py [results/mixers_mqar]
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from kvlab.lab.axes import byte_axis
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import save, sheet
from kvlab.lab.record import Done
from kvlab.lab.results import interval_half_width, read_records
from kvlab.lab.styles import colour

HERE = Path(__file__).resolve().parent
TASKS = {"overwritten": ("task=mqar", "task.writes=2"), "plain": ("task=mqar", "task.writes=1")}
TITLES = {"plain": "MQAR", "overwritten": "every key written twice"}


@dataclass(frozen=True)
class Arm:
    """A mixer: the words that choose it, and fields that say how large its state is, the last the one that varies."""

    name: str
    mixer: str
    colour: str
    words: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    tasks: tuple[str, ...] = ("overwritten", "plain")

    @property
    def sweep(self) -> tuple[str, ...]:
        """The overrides of its runs."""
        return (f"mixer={self.mixer}", *self.words, *(f"mixer.{field}={value}" for field, value in self.sizes))

    def is_of(self, config: dict[str, Any]) -> bool:
        """Whether a record's configuration is of this arm."""
        mixer = config["mixer"]
        if mixer["name"] != self.mixer:
            return False
        places = [(*name.split("."), value) for name, value in self.sizes]
        return all(mixer[layer][field] == value for layer, field, value in places)


TWO_HEADS, ONE_HEAD = ("L.num_heads", 2), ("L.num_heads", 1)


def gated(key_dim: int, tasks: tuple[str, ...]) -> Arm:
    """Gated DeltaNet with two heads, whose keys have that many numbers."""
    name, mixer = f"Gated DeltaNet, K = {key_dim}", "gated_deltanet"
    return Arm(name, mixer, colour(mixer), (), (TWO_HEADS, ("L.key_dim", key_dim)), tasks)


def mamba2(state_dim: int, tasks: tuple[str, ...]) -> Arm:
    """Mamba-2 with that many numbers a channel."""
    return Arm(f"Mamba-2, N = {state_dim}", "mamba2", colour("mamba2"), (), (("M.state_dim", state_dim),), tasks)


BOTH, OVERWRITTEN, PLAIN = ("overwritten", "plain"), ("overwritten",), ("plain",)
GATED, MAMBA2 = gated(16, BOTH), mamba2(16, BOTH)
WRITE_GATE = ("mixer.L.write_gate=true",)
LINEAR = Arm("linear attention", "linear_attention", colour("linear_attention"), WRITE_GATE, (TWO_HEADS,))
DELTA = Arm("DeltaNet", "deltanet", colour("deltanet"))
EQUAL = (
    GATED,
    MAMBA2,
    LINEAR,
    DELTA,
    Arm("KDA", "kda", colour("kda")),
    Arm("Mamba-3", "mamba3", colour("mamba3")),
    Arm("GLA", "gla", colour("gla")),
    Arm("RetNet", "retnet", colour("retnet")),
    Arm("Lightning", "lightning", colour("lightning"), ("mixer.L.conv_len=3",)),
    Arm("DeltaProduct", "deltaproduct", colour("deltaproduct")),
    Arm("Based", "based", colour("based"), (), (("L.key_dim", 4),)),
    Arm("RG-LRU", "rglru", colour("rglru"), (), (("R.width", 320),)),
)
"""Mixers at 5 to 6 KiB a sequence, columns of convolutions included. Linear attention has a write gate, as METHODS B.3
measured it; Lightning has the others' convolution. The width of the RG-LRU is what its bytes buy, most of which are its
convolution's columns."""
GATED_BY_SIZE = (gated(8, PLAIN), GATED, gated(32, PLAIN))
MAMBA2_BY_SIZE = (MAMBA2, mamba2(64, PLAIN))
LARGE = (ONE_HEAD, ("L.value_dim", 64), ("L.key_dim", 32))
TWICE = (
    Arm("Gated DeltaNet, 32 x 64", "gated_deltanet", colour("gated_deltanet"), (), LARGE, OVERWRITTEN),
    mamba2(32, OVERWRITTEN),
    Arm("linear attention, 32 x 64", "linear_attention", colour("linear_attention"), WRITE_GATE, LARGE, OVERWRITTEN),
)
"""At the sizes of METHODS B.3, about twice those of the others. Added once it was seen that with half of that Mamba-2
is ahead of linear attention by less."""
CEILING = Arm("MHA", "mha", colour("mha"))
ARMS = tuple(dict.fromkeys((GATED, MAMBA2, LINEAR, *GATED_BY_SIZE, *MAMBA2_BY_SIZE, *EQUAL, CEILING, *TWICE)))
"""In the order of their runs: those of the claims first."""
RUNS = tuple((*TASKS[task], *arm.sweep) for arm in ARMS for task in arm.tasks)
OVER_MAMBA2, OVER_LINEAR = 0.04, 0.3
"""What Gated DeltaNet is ahead of Mamba-2, and Mamba-2 of linear attention, where keys are overwritten (B.3)."""


def table(records: Sequence[Done]) -> pd.DataFrame:
    """A row a run: accuracy, that of its slices, bytes of a sequence's state, the rate that was chosen."""
    rows = list[dict[str, Any]]()
    for record in records:
        task: Any = record.config["task"]
        rows += [
            {
                "task": "overwritten" if task["writes"] == 2 else "plain",
                "mixer": arm.name,
                "seed": record.config["seed"],
                "accuracy": record.quality.value,
                **{f"slice {name}": value for name, value in record.quality.slices.items()},
                "held_bytes": record.memory.allocated_bytes // record.memory.batch_size,
                "num_params": record.num_params,
                "learning_rate": record.training.learning_rate,
                "steps": record.training.num_steps,
            }
            for arm in ARMS
            if arm.is_of(record.config)
        ]
    order = {name: place for place, name in enumerate([*TASKS, *(arm.name for arm in ARMS)])}
    return pd.DataFrame(rows).sort_values(
        ["task", "mixer", "seed"],
        key=lambda column: column if column.name == "seed" else column.map(order),
        ignore_index=True,
    )


class Means:
    """The seeds' mean by task and mixer; not a number where it was not run, with which no comparison holds."""

    def __init__(self, frame: pd.DataFrame):
        self.frame = frame

    def __call__(self, task: str, arm: Arm) -> float:
        return float(self.frame[(self.frame.task == task) & (self.frame.mixer == arm.name)].accuracy.mean())


def claims(frame: pd.DataFrame) -> list[Claim]:
    """METHODS B.3, and B.7 claims 4 and 5, of the seeds' means."""
    means = Means(frame)

    def ahead(task: str, first: Arm, second: Arm, by: float) -> Claim:
        found = means(task, first), means(task, second)
        what = f"{TITLES[task]}: {first.name} over {second.name}"
        expected = f"by {by:g} or more" if by else "as good, or better"
        return Claim(what, expected, f"{found[0]:.3f}, {found[1]:.3f}", found[0] - found[1] >= by)

    def follows(arms: tuple[Arm, ...]) -> Claim:
        found = [means("plain", arm) for arm in arms]
        rises = all(low < high for low, high in pairwise(found))
        what = "MQAR: recall follows state, " + ", ".join([arms[0].name, *(f"{arm.sizes[-1][1]}" for arm in arms[1:])])
        return Claim(what, "rises", ", ".join(f"{value:.3f}" for value in found), rises)

    return [
        ahead("overwritten", GATED, MAMBA2, OVER_MAMBA2),
        ahead("overwritten", MAMBA2, LINEAR, OVER_LINEAR),
        ahead("overwritten", TWICE[0], TWICE[1], OVER_MAMBA2),
        ahead("overwritten", TWICE[1], TWICE[2], OVER_LINEAR),
        ahead("plain", LINEAR, MAMBA2, 0.0),
        follows(GATED_BY_SIZE),
        follows(MAMBA2_BY_SIZE),
    ]


def equal_states(panel: Any, frame: pd.DataFrame, task: str) -> None:
    """Accuracy of every seed of mixers with about equal states, the best on top."""
    rows = {arm: frame[(frame.task == task) & (frame.mixer == arm.name)] for arm in (*EQUAL, CEILING)}
    ordered = sorted((arm for arm in rows if len(rows[arm])), key=lambda arm: rows[arm].accuracy.mean())
    names = []
    for place, arm in enumerate(ordered):
        values = rows[arm].accuracy.tolist()
        panel.plot(values, [place] * len(values), "o", color=arm.colour, alpha=0.7)
        panel.plot(statistics.fmean(values), place, "|", color=arm.colour, ms=16, mew=2)
        names.append(f"{arm.name}, {rows[arm].held_bytes.iloc[0] / 1024:.1f} KiB")
    panel.set_yticks(range(len(names)), names)
    panel.set(title=TITLES[task], xlabel="accuracy of recall", xlim=(-0.02, 1.03))
    panel.grid(axis="x", alpha=0.25)


def by_state(panel: Any, frame: pd.DataFrame) -> None:
    """Accuracy on plain MQAR against bytes of state, for mixers that were run at several."""
    for arms, label in ((GATED_BY_SIZE, "Gated DeltaNet"), (MAMBA2_BY_SIZE, "Mamba-2")):
        groups = [frame[(frame.task == "plain") & (frame.mixer == arm.name)] for arm in arms]
        groups = [group for group in groups if len(group)]
        sizes = [group.held_bytes.iloc[0] for group in groups]
        style = {"color": arms[0].colour, "marker": "o", "capsize": 3, "label": label}
        widths = [interval_half_width(group.accuracy.tolist()) for group in groups]
        panel.errorbar(sizes, [group.accuracy.mean() for group in groups], yerr=widths, **style)
    panel.set(title="MQAR, state varied", xlabel="state of a sequence", ylabel="accuracy of recall", ylim=(None, 1.02))
    panel.set_xlim(left=0)
    byte_axis(panel, is_log=False, most=5)
    panel.grid(alpha=0.25)
    panel.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Both tasks at about equal states, and recall against the size of a state."""
    figure, panels = sheet(1, 3, size=(14.5, 4.6), width_ratios=(5, 5, 4))
    for panel, task in zip(panels, TITLES, strict=False):
        equal_states(panel, frame, task)
    by_state(panels[2], frame)
    figure.suptitle("Recall at constant state: one layer, three seeds, each at the better of two rates")
    save(figure, [path])


def redraw(output: Path = HERE) -> None:
    """mixers.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "mixers.csv"), output / "mixers.png")


def main(output: Path = HERE, results: Path = Path("results/mixers_mqar")) -> int:
    """Writes mixers.csv and mixers.png; returns 1 if a claim fails."""
    frame = table([record for record in read_records(results) if isinstance(record, Done)])
    frame.to_csv(output / "mixers.csv", index=False, float_format="%.5g")
    draw(frame, output / "mixers.png")
    return verdict(claims(frame), "Recall at constant state (methods B.3, and B.7 claims 4 and 5)")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/mixers_mqar")))
