"""What does not hold at this scale: published claims on small models that were trained here, and on SmolLM2.

kvlab reproduce not_at_this_scale
python experiments/not_at_this_scale/figure.py [results/not_at_this_scale]

A claim that does not hold here is a finding, not a failure: the exit status is 1 only where what makes the findings
worth anything fails, such as a model that has learned nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.table import Table

from kvlab.lab.claims import Claim, verdict
from kvlab.lab.experiments import load_part
from kvlab.lab.record import Done
from kvlab.lab.results import interval_half_width, read_records
from kvlab.lab.smollm2 import Missing, material
from kvlab.tasks.metrics import ACCURACY
from kvlab.terminal import console

HERE = Path(__file__).resolve().parent
PARTS = "runs", "toys", "mixers", "smollm2", "ruler", "panels"
runs, toys, mixers, smollm2, ruler, panels = (load_part("not_at_this_scale", part) for part in PARTS)
SINK = panels.SINK
RUNS = (*runs.RUNS, *mixers.RUNS)
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


TRAINED = (
    ("an eighth of the slots after 1,000 steps of training (DMS)", "2506.05345"),
    ("a cache that is trained for a text in place of the text's own (Cartridges)", "2506.06266"),
)
"""Methods that must be trained, which kvlab does not have."""


class Tables(NamedTuple):
    """What findings follow from, as it is written beside them; SmolLM2's two are empty where it was not run."""

    runs: pd.DataFrame
    heads: pd.DataFrame
    axes: pd.DataFrame
    smollm2: pd.DataFrame
    mixers: pd.DataFrame
    lengths: pd.DataFrame
    ruler: pd.DataFrame


class Cells:
    """Values by method and slots, one for each seed or context, which two methods have in the same order."""

    def __init__(self, frame: Any, value: str, by: str, at: str = "slots"):
        """Of a table with a column `method`, and perhaps `at`; `by` tells the values of a cell apart."""
        found = dict[tuple[str, int], dict[int, list[float]]]()
        for row in frame.to_dict("records"):
            place = row["method"], 0 if pd.isna(row.get(at)) else int(row[at])
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


def findings(tables: Tables) -> list[Finding]:
    """Every row."""
    frame = tables.runs
    recall = Cells(frame[frame.task == "mqar"], "value", "seed")
    passkey = Cells(tables.smollm2, "right", "context")
    return [
        *_sinks(frame, tables.heads, recall),
        *_axes(tables.axes),
        *_methods(recall, passkey),
        _gain(tables.mixers),
        *_lengths(Cells(tables.lengths, "value", "seed", "length")),
        *_ruler(tables.ruler),
        *(
            Finding(claim, arxiv, "", "not asked: it must be trained, and kvlab does not", None)
            for claim, arxiv in TRAINED
        ),
    ]


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


def _gain(frame: pd.DataFrame) -> Finding:
    """7: a decay for each channel beside one for each head."""
    claim, arxiv, where = (
        "a decay for each channel: perplexity below Gated DeltaNet's",
        "2510.26692",
        "text by the byte",
    )
    lost = Cells(frame.assign(value=-frame.value), "value", "seed")
    said, holds = lost.above(mixers.KDA, [mixers.GATED], 0)
    if holds is None:
        return Finding.not_run(claim, arxiv, where)
    of = 2 ** frame.groupby("method").value.mean()
    said = f"{of[mixers.KDA]:.3f}; {mixers.GATED} {of[mixers.GATED]:.3f}; minus bits a byte {said}"
    return Finding(claim, arxiv, where, said, holds)


def _lengths(recall: Cells) -> list[Finding]:
    """8: recall of sequences that are longer than those of the training, beside recall of those."""
    rows, arxiv, trained, longest = list[Finding](), "2412.06464", mixers.TRAINED_LEN, max(mixers.LENGTHS)
    where = f"recall {longest}:{mixers.PAIRS}, trained on {trained}"
    for name in mixers.INITIALISED:
        said, holds = recall.above(name, [mixers.UNGATED], longest)
        if holds is not None:
            before = [recall.mean(each, trained) or 0 for each in (name, mixers.UNGATED)]
            said += f"; at {trained} {before[0]:.3f} and {before[1]:.3f}"
        rows.append(Finding(f"{name}: above DeltaNet behind its training length", arxiv, where, said, holds))
    claim = "the rule decides more than how the decay is initialised"
    effects = [effect for length in (longest, trained) if (effect := _effects(recall, length))]
    if len(effects) < 2:
        return [*rows, Finding.not_run(claim, arxiv, where)]
    (rule, spread), (rule_before, spread_before) = effects
    said = f"{rule:.3f} between the delta and the plain rule, {spread:.3f} between initialisations; "
    said += f"at {trained} {rule_before:.3f} and {spread_before:.3f}"
    return [*rows, Finding(claim, arxiv, where, said, rule > spread)]


def _effects(recall: Cells, length: int) -> tuple[float, float] | None:
    """At a length: the difference between the delta and the plain rule, decays as published, and the range over the
    initialisations of the delta rule's, of means over seeds; None: not run."""
    plain, *found = (recall.mean(name, length) for name in (mixers.PLAIN, *mixers.INITIALISED))
    values = [value for value in found if value is not None]
    if plain is None or len(values) < len(mixers.INITIALISED):
        return None
    return abs(values[0] - plain), max(values) - min(values)


def _ruler(frame: pd.DataFrame) -> list[Finding]:
    """9: what a full cache scores on tasks that rank methods in larger models."""
    rows, arxiv = list[Finding](), "2404.06654"
    for task in ruler.TASKS:
        claim, cells = f"{task} tells methods apart: full cache {ACCURACY.floor:g} or more", frame[frame.task == task]
        if cells.empty:
            rows.append(Finding.not_run(claim, arxiv, "SmolLM2"))
        for context, of in cells.groupby("context"):
            right, chance = float(of.right.mean()), float(of.chance.mean())
            keys = frame[(frame.task == ruler.PASSKEY) & (frame.context == context)].right.mean()
            said = (
                f"{right:.3f} ± {interval_half_width(of.right.tolist()):.3f}; chance {chance:.3f}; pass keys {keys:.3f}"
            )
            holds = ACCURACY.is_discriminative(right, chance)
            rows.append(Finding(claim, arxiv, f"SmolLM2, {context:,} tokens", said, holds))
    return rows


def claims(tables: Tables) -> list[Claim]:
    """What must hold for the findings to mean anything."""
    frame, axes, asked = tables.runs, tables.axes, tables.smollm2
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
    rows += _learned(tables)
    if len(asked):
        full = asked[(asked.method == "full") & (asked.turn == 1)].right.mean()
        rows.append(Claim("SmolLM2 finds pass keys, full cache", ">= 0.92", f"{full:.2f}", bool(full >= 0.92)))
    return rows


def _learned(tables: Tables) -> list[Claim]:
    """Of the mixers of constant size: they have learned, and two that are compared hold as many bytes."""
    bits, held = tables.mixers.groupby("method").value.mean().max(), sorted(set(tables.mixers.held_bytes))
    trained: Any = tables.lengths[tables.lengths.length == mixers.TRAINED_LEN]
    least = trained[trained.method.isin((mixers.SLOW, mixers.UNGATED))].groupby("method").value.mean().min()
    return [
        Claim("KDA and Gated DeltaNet learn text: bits a byte", "<= 3.5", f"{bits:.3f}", bool(bits <= 3.5)),
        Claim("and hold as many bytes", "one number", ", ".join(map(str, held)), len(held) == 1),
        Claim("both delta rules recall at the training length", ">= 0.85", f"{least:.3f}", bool(least >= 0.85)),
    ]


def show(rows: Sequence[Finding]) -> None:
    """The findings as a table."""
    printed = Table(
        "published claim", "arXiv", "where", "measured", "here", title="At this scale", title_justify="left"
    )
    for row in rows:
        printed.add_row(row.claim, row.arxiv, row.where, row.measured, WORDS[row.holds])
    console(width=160).print(printed)


def published(output: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """SmolLM2's two tables; empty, and a sentence, where the model or the text cannot be had."""
    try:
        found = material()
    except Missing as error:
        print(f"kvlab: SmolLM2's rows are not run: {error}", file=sys.stderr)
        passkeys = pd.DataFrame(columns=["method", "slots", "query_aware", "turn", "context", "right"])
        return passkeys, pd.DataFrame(columns=["task", "context", "example", "tokens", "right", "chance"])
    return smollm2.measure(found, output), ruler.measure(found, output)


def redraw(output: Path = HERE) -> None:
    """not_at_this_scale.png, of the tables beside this file."""
    names = {name: f"{name}.csv" for name in Tables._fields}
    tables = Tables(**{name: pd.read_csv(HERE / file, keep_default_na=name != "axes") for name, file in names.items()})
    panels.draw(tables, output / "not_at_this_scale.png")


def main(output: Path = HERE, results: Path = Path("results/not_at_this_scale")) -> int:
    """Writes findings.csv, the tables behind it and not_at_this_scale.png; returns 1 if a precondition fails."""
    records = read(results)
    full = [record for record in records if runs.name_of(record.config) == "full"]
    constant = [record for record in records if mixers.variant_of(record.config)]
    frame, heads = table(records), pd.concat([toys.sinks(record) for record in full], ignore_index=True)
    axes = pd.DataFrame(
        [row for record in full if record.config["task"]["type"] == "text" for row in toys.axes(record)]
    )
    layers = pd.DataFrame([row for record in full for row in toys.silenced(record)])
    gains, lengths = mixers.gains(constant), mixers.lengths(constant)
    written = {"runs": frame, "heads": heads, "axes": axes, "layers": layers, "mixers": gains, "lengths": lengths}
    for name, each in written.items():
        each.to_csv(output / f"{name}.csv", index=False, float_format="%.5g")
    asked, ruled = published(output)
    tables = Tables(frame, heads, axes, asked, gains, lengths, ruled)
    panels.draw(tables, output / "not_at_this_scale.png")
    rows = findings(tables)
    pd.DataFrame([asdict(row) for row in rows]).to_csv(output / "findings.csv", index=False)
    show(rows)
    return verdict(claims(tables), "What the findings stand on")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/not_at_this_scale")))
