"""Who tracks a state behind the length it was trained on: parity and S3, with and without negative eigenvalues.

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
PARITY = (
    "task=state_tracking",
    "task.group=parity",
    "task.seq_len=40",
    "task.test_len=256",
    "optimizer.learning_rate=0.003",
    "train.num_steps=500",
    "train.batch_size=32",
    "train.eval_every=500",
    "train.checkpoint_every=500",
)
S3 = (
    "task=state_tracking",
    "task.group=s3",
    "task.seq_len=16",
    "task.test_len=64",
    "optimizer.learning_rate=0.01",
    "optimizer.weight_decay=0",
    "train.num_steps=800",
    "train.batch_size=64",
    "train.eval_every=800",
    "train.checkpoint_every=800",
)


@dataclass(frozen=True)
class Study:
    """A group to track and how it is trained: the words that choose both, what a guess scores, and the length of the
    training and of the test."""

    name: str
    words: tuple[str, ...]
    group: str
    decays_weights: bool
    guess: float
    lengths: tuple[int, int]

    def is_of(self, config: dict[str, Any]) -> bool:
        """Whether a record's configuration is of this study."""
        decays = config["optimizer"]["weight_decay"] > 0
        return (config["task"]["group"], decays) == (self.group, self.decays_weights)


DECAYED = Study("parity", (*PARITY, "optimizer.weight_decay=0.1"), "parity", True, 1 / 2, (40, 256))
UNDECAYED = Study("parity, no weight decay", (*PARITY, "optimizer.weight_decay=0"), "parity", False, 1 / 2, (40, 256))
OF_THREE = Study("S3", S3, "s3", False, 1 / 6, (16, 64))
STUDIES = (DECAYED, UNDECAYED, OF_THREE)
"""Weight decay pulls a beta back from 2, so that signs are not turned quite: METHODS A.1 says to train without."""
SIGN_ALONE = 1 / 3
"""Of S3, for who knows whether a permutation is even, and guesses among the three that are."""
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
    studies: tuple[Study, ...] = (DECAYED,)

    def is_of(self, config: dict[str, Any]) -> bool:
        """Whether a record's configuration is of this arm."""
        mixer = config["mixer"]
        flag = mixer["L"]["negative_eigenvalues"] if "L" in mixer else None
        return f"mixer={mixer['name']}" == self.words[0] and flag == self.reverses


def delta(name: str, mixer: str, reverses: bool, studies: tuple[Study, ...] = (DECAYED,)) -> Arm:
    """A mixer of the delta rule without its convolution."""
    words = (f"mixer={mixer}", "mixer.L.conv_len=0", CHUNKS, f"mixer.L.negative_eigenvalues={str(reverses).lower()}")
    return Arm(f"{name}, {'negative' if reverses else 'positive'}", (*words, *PUBLISHED), reverses, studies)


DELTA, DELTA_PLUS = delta("DeltaNet", "deltanet", True, STUDIES), delta("DeltaNet", "deltanet", False, STUDIES[:2])
GATED = delta("Gated DeltaNet", "gated_deltanet", True, STUDIES[:2])
GATED_PLUS = delta("Gated DeltaNet", "gated_deltanet", False)
PRODUCT = delta("DeltaProduct", "deltaproduct", True, STUDIES)
MAMBA2 = Arm("Mamba-2", ("mixer=mamba2", "mixer.M.short_conv=0"), None, STUDIES[:2])
MAMBA3 = Arm("Mamba-3", ("mixer=mamba3", "mixer.M.short_conv=0"), None)
MHA = Arm("MHA", ("mixer=mha", "mixer.A.short_conv=0"), None, (DECAYED, OF_THREE))
ARMS = (DELTA, DELTA_PLUS, GATED, GATED_PLUS, PRODUCT, MAMBA2, MAMBA3, MHA)
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
    for study in (DECAYED, UNDECAYED):
        for arm in (each for each in (*SOLVE, *FAIL) if study in each.studies):
            values = frame[(frame.study == study.name) & (frame.mixer == arm.name)].behind.tolist()
            solves = arm in SOLVE
            expected = f"at least {TRACKS}" if solves else f"at most {LOST}"
            mean = statistics.fmean(values) if values else float("nan")
            passed = mean >= TRACKS if solves else mean <= LOST
            rows.append(Claim(f"{study.name}, behind 40 tokens: {arm.name}", expected, f"{mean:.4f}", passed))
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
        panel.axvline(
            SIGN_ALONE if study is OF_THREE else -1, color="0.4", ls="--", label="a guess that knows the sign"
        )
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
