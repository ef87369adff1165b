"""Who tracks a state behind the length it was trained on: parity, S3 and S5, with and without negative eigenvalues.

kvlab reproduce state_tracking
python experiments/state_tracking/figure.py [results/state_tracking]
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import save, sheet
from kvlab.lab.record import Done
from kvlab.lab.results import read_records
from kvlab.lab.styles import GREY, RED

HERE = Path(__file__).resolve().parent
RECIPE = ("optimizer.name=muon", "optimizer.learning_rate=0.02", "optimizer.weight_decay=0")
"""The rate was chosen on seeds 3 and 4 of Gated DeltaNet and DeltaProduct. Weight decay pulls a beta back from 2, so
that signs are not turned quite: METHODS A.1 says to train without."""


def lengths(group: str, near: int, far: int, steps: int, rows: int) -> tuple[str, ...]:
    """A group that is trained on `near` tokens, for so many steps of so many sequences, and tested to `far`."""
    often = [f"train.{field}={steps}" for field in ("num_steps", "eval_every", "checkpoint_every")]
    task = ("task=state_tracking", f"task.group={group}", f"task.seq_len={near}", f"task.test_len={far}")
    return (*task, *often, f"train.batch_size={rows}")


@dataclass(frozen=True)
class Study:
    """A group to track and how it is trained: the words that choose both, what a guess scores, and the length of the
    training and of the test."""

    name: str
    words: tuple[str, ...]
    group: str
    guess: float
    lengths: tuple[int, int]

    def is_of(self, config: dict[str, Any]) -> bool:
        """Whether a record's configuration is of this study; not one that was trained by another recipe."""
        optimizer = config["optimizer"]
        is_of_recipe = optimizer.get("name") == "muon" and optimizer["weight_decay"] == 0
        return is_of_recipe and config["task"]["group"] == self.group


PARITY = Study("parity", (*RECIPE, *lengths("parity", 40, 256, steps=500, rows=32)), "parity", 1 / 2, (40, 256))
OF_THREE = Study("S3", (*RECIPE, *lengths("s3", 16, 64, steps=3000, rows=64)), "s3", 1 / 6, (16, 64))
OF_FIVE = Study("S5", (*RECIPE, *lengths("s5", 4, 32, steps=3000, rows=256)), "s5", 1 / 120, (4, 32))
STUDIES = (PARITY, OF_THREE, OF_FIVE)
SIGN_ALONE = {OF_THREE: 1 / 3, OF_FIVE: 1 / 60}
"""For who knows whether a permutation is even, and guesses among those that are as even."""
CHUNKS = "mixer.L.chunk_len=20"
"""Tokens of the training length are two whole chunks."""
PUBLISHED = ("mixer.L.rate_range=[0.01,16.0]",)
"""Rates of decay at the start, where there are any; `configs/mixer/` has slower ones, which recall wants."""


@dataclass(frozen=True)
class Arm:
    """A mixer: the words that choose it, and whether it can reverse its state (negative eigenvalues of a delta rule);
    None: another kind of mixer."""

    name: str
    words: tuple[str, ...]
    reverses: bool | None
    studies: tuple[Study, ...] = (PARITY,)
    householders: int = 1

    def is_of(self, config: dict[str, Any]) -> bool:
        """Whether a record's configuration is of this arm."""
        mixer = config["mixer"]
        of_delta = (mixer["L"]["negative_eigenvalues"], mixer["L"]["householders"]) if "L" in mixer else (None, 1)
        return (f"mixer={mixer['name']}", *of_delta) == (self.words[0], self.reverses, self.householders)


def delta(name: str, mixer: str, reverses: bool, studies: tuple[Study, ...], householders: int = 1) -> Arm:
    """A mixer of the delta rule without its convolution, of so many steps a token."""
    flag = f"mixer.L.negative_eigenvalues={str(reverses).lower()}"
    words = (f"mixer={mixer}", "mixer.L.conv_len=0", CHUNKS, flag, f"mixer.L.householders={householders}", *PUBLISHED)
    return Arm(f"{name}, {'negative' if reverses else 'positive'}", words, reverses, studies, householders)


DELTA = delta("DeltaNet", "deltanet", True, (PARITY, OF_THREE))
DELTA_PLUS = delta("DeltaNet", "deltanet", False, (PARITY,))
GATED = delta("Gated DeltaNet", "gated_deltanet", True, (PARITY,))
GATED_PLUS = delta("Gated DeltaNet", "gated_deltanet", False, (PARITY,))
PRODUCT = delta("DeltaProduct", "deltaproduct", True, (PARITY, OF_THREE), householders=2)
PRODUCT_OF_FOUR = delta("DeltaProduct of 4", "deltaproduct", True, (OF_FIVE,), householders=4)
MAMBA2 = Arm("Mamba-2", ("mixer=mamba2", "mixer.M.short_conv=0"), None)
MAMBA3 = Arm("Mamba-3", ("mixer=mamba3", "mixer.M.short_conv=0"), None)
MHA = Arm("MHA", ("mixer=mha", "mixer.A.short_conv=0"), None, STUDIES)
ARMS = (DELTA, DELTA_PLUS, GATED, GATED_PLUS, PRODUCT, PRODUCT_OF_FOUR, MAMBA2, MAMBA3, MHA)
RUNS = tuple((*study.words, *arm.words) for study in STUDIES for arm in ARMS if study in arm.studies)
TRACKS, LOST = 0.99, 0.55
"""What is behind the training length must be at least, or at most (METHODS B.4)."""
SOLVE, FAIL = (DELTA, GATED, PRODUCT), (DELTA_PLUS, GATED_PLUS, MAMBA2)


def table(records: Sequence[Done]) -> pd.DataFrame:
    """A row a run: accuracy within the training length and behind it, over sequences of the test's length."""
    rows = list[dict[str, Any]]()
    for record in records:
        task: Any = record.config["task"]
        near, far = task["seq_len"], task["test_len"]
        rows += [
            {
                "study": study.name,
                "mixer": arm.name,
                "seed": record.config["seed"],
                "within": record.quality.slices[f"0 to {near}"],
                "behind": record.quality.slices[f"{near} to {far}"],
                "num_params": record.num_params,
                "held_bytes": record.memory.allocated_bytes // record.memory.batch_size,
            }
            for study in STUDIES
            for arm in ARMS
            if study.is_of(record.config) and arm.is_of(record.config)
        ]
    columns = ["study", "mixer", "seed", "within", "behind", "num_params", "held_bytes"]
    order = {each.name: place for place, each in enumerate((*STUDIES, *ARMS))}
    return pd.DataFrame(rows, columns=columns).sort_values(
        columns[:3], key=lambda column: column if column.name == "seed" else column.map(order), ignore_index=True
    )


def claims(frame: pd.DataFrame) -> list[Claim]:
    """METHODS B.7, claim 6, of the seeds' mean: parity behind the training length is solved with negative eigenvalues,
    and a guess without them and with Mamba-2."""
    rows = list[Claim]()
    for arm in (*SOLVE, *FAIL):
        values = frame[(frame.study == PARITY.name) & (frame.mixer == arm.name)].behind.tolist()
        solves = arm in SOLVE
        expected = f"at least {TRACKS}" if solves else f"at most {LOST}"
        mean = statistics.fmean(values) if values else float("nan")
        passed = mean >= TRACKS if solves else mean <= LOST
        rows.append(Claim(f"parity, behind 40 tokens: {arm.name}", expected, f"{mean:.4f}", passed))
    return rows


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A panel a study: accuracy of every seed within the training length and behind it, a row a mixer."""
    figure, panels = sheet(1, len(STUDIES), size=(15, 4.4))
    for panel, study in zip(panels, STUDIES, strict=True):
        arms = [arm for arm in reversed(ARMS) if study in arm.studies]
        for place, arm in enumerate(arms):
            rows = frame[(frame.study == study.name) & (frame.mixer == arm.name)]
            for column, colour, shift, label in (
                ("within", GREY, 0.13, "within the training length"),
                ("behind", RED, -0.13, "behind it"),
            ):
                style = {"color": colour, "alpha": 0.75, "label": label if place == 0 else None}
                panel.plot(rows[column], [place + shift] * len(rows), "o", **style)
        panel.axvline(study.guess, color="0.4", ls=":", label="a guess")
        panel.axvline(SIGN_ALONE.get(study, -1), color="0.4", ls="--", label="a guess that knows the sign")
        panel.set_yticks(range(len(arms)), [arm.name for arm in arms])
        title = "{}: trained on {} tokens, tested to {}".format(study.name, *study.lengths)
        panel.set_title(title, fontsize=10)
        panel.set(xlabel="accuracy, three seeds", xlim=(0, 1.03), ylim=(-0.6, len(arms) - 0.4))
        panel.grid(axis="x", alpha=0.25)
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle("A state behind the training length: two layers without convolutions")
    save(figure, [path])


def redraw(output: Path = HERE) -> None:
    """tracking.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "tracking.csv"), output / "tracking.png")


def main(output: Path = HERE, results: Path = Path("results/state_tracking")) -> int:
    """Writes tracking.csv and tracking.png; returns 1 if a claim fails."""
    frame = table([record for record in read_records(results) if isinstance(record, Done)])
    frame.to_csv(output / "tracking.csv", index=False, float_format="%.5g")
    draw(frame, output / "tracking.png")
    return verdict(claims(frame), "Parity behind the training length (methods B.7, claim 6)")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/state_tracking")))
