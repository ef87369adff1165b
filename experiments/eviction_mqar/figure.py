"""What eviction costs in recall: accuracy against bytes held, every method through pages, and a pass/fail table.

kvlab reproduce eviction_mqar
python experiments/eviction_mqar/figure.py [results/eviction_mqar]

One layer of multi-head attention behind a short convolution. The value's slot then holds key and value, so that half of
the prompt is enough, and a perfect method scores at least 2f of a fraction f below that.
"""

import importlib.util
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from kvlab.config import Config
from kvlab.lab.axes import byte_axis
from kvlab.lab.ceilings import Ceilings
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.compare import Scored, flips, paired
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.plots import save, sheet
from kvlab.lab.record import Done
from kvlab.lab.results import interval_half_width, read_records
from kvlab.ledger.classes import Lengths
from kvlab.tasks.mqar import kept_accuracy

HERE = Path(__file__).resolve().parent
_SPEC = importlib.util.spec_from_file_location("experiments.eviction_mqar.methods", HERE / "methods.py")
assert _SPEC is not None
assert _SPEC.loader is not None
methods = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = methods  # where dataclasses look their module up
_SPEC.loader.exec_module(methods)

RUNS = methods.runs()
LONG = "128:32"


def held_bytes(config: Config, length: int, prompt_len: int) -> int:
    """Bytes of the pages that one sequence of `length` tokens holds at its end: the ledger's, run without a device."""
    lab = Laboratory.of(config, abstract=True)
    ledger = lab.layout(length, 1, prompt_len=prompt_len).ledger()
    done = 0
    while done < length:
        count = min(ledger.chunk_len, prompt_len - done) if done < prompt_len else 1
        lengths = None if done else Lengths(prompt_len, max(prompt_len, count))
        if not ledger.reserve(0, count, lengths=lengths).ready:
            raise MemoryError(f"a sequence of {length} tokens does not fit the memory made for it")
        ledger.commit(0, count)
        done += count
        if due := ledger.due([0]):
            ledger.compact(due)
    return sum(account.allocated for account in ledger.audit())


def method_of(record: Done) -> str | None:
    """The name that a record's method has here; "full" without one, None for another."""
    section = record.config["memory"].get("compression")
    if section is None:
        return "full"
    return next((method.name for method in methods.METHODS if method.is_of(section)), None)


def read(results: Path) -> list[Done]:
    """The finished runs of this experiment."""
    return [record for record in read_records(results) if isinstance(record, Done)]


def table(records: list[Done]) -> pd.DataFrame:
    """A row for each method, budget and slice of the runs of a single turn, over their seeds."""
    ceilings, groups = Ceilings(records), dict[tuple[str, Any], list[Done]]()
    for record in records:
        if (name := method_of(record)) and record.config["task"]["num_turns"] == 1:
            groups.setdefault((name, record.config["memory"].get("budget")), []).append(record)
    rows = []
    for (name, budget), group in groups.items():
        rows += [_row(name, budget, slice_name, group, ceilings) for slice_name in group[0].quality.slices]
    order = ["full", *methods.NAMED]
    frame = pd.DataFrame(rows).sort_values(
        ["method", "budget", "slice"], key=lambda column: column.map(order.index) if column.name == "method" else column
    )
    return frame.reset_index(drop=True)


def _row(name: str, budget: Any, slice_name: str, group: list[Done], ceilings: Ceilings) -> dict[str, Any]:
    """One cell, as the protocol has it: its ceiling, and which labels flipped against that."""
    values = [record.quality.slices[slice_name] for record in group]
    full = [ceiling for record in group if (ceiling := ceilings.of(record))]
    known = len(full) == len(group)
    flipped = None
    if known and name != "full":
        pairs, _ = paired([Scored.of(each) for each in full], [Scored.of(each) for each in group])
        flipped = flips(pairs, (slice_name, None))
    length, pairs_of = (int(part) for part in slice_name.split(":"))
    method = methods.NAMED.get(name)
    found_before = None
    if method and method.before and slice_name == LONG:
        found_before = method.before[method.budgets.index(budget)]
    return {
        "method": name,
        "budget": budget,
        "slice": slice_name,
        "accuracy": statistics.fmean(values),
        "half_width": interval_half_width(values),
        "num_seeds": len(values),
        "found_before": found_before,
        "held_bytes": held_bytes(Config.build(group[0].config), length, 2 * pairs_of),
        "ceiling": statistics.fmean(each.quality.slices[slice_name] for each in full) if known else None,
        "right_to_wrong": flipped.lost if flipped else None,
        "wrong_to_right": flipped.won if flipped else None,
        "labels": flipped.num_labels if flipped else None,
        "logit_error": max(record.lossy.logit_error for record in group if record.lossy) if flipped else None,
    }


def second_turns(records: list[Done]) -> pd.DataFrame:
    """A row for each method of the second turn on 128:32, over seeds: that turn's accuracy where the prompt was
    compacted before any question, and where it had seen the first turn's; and of the full memory."""
    rows = []
    for name in ("full", *methods.SECOND_TURN):
        row: dict[str, Any] = {"method": name}
        for label, aware in (("before any question", False), ("after the first turn", True)):
            values = [
                turns[1]
                for record in records
                if method_of(record) == name
                and record.config["task"]["num_turns"] == 2
                and record.config["task"]["query_aware"] == aware
                and (turns := record.quality.turns[LONG])[1] is not None
            ]
            row |= {label: statistics.fmean(values) if values else None, f"{label}, seeds": len(values)}
        rows.append(row)
    return pd.DataFrame(rows)


class Found:
    """Accuracies on 128:32 by method and budget, some of which may not have been run."""

    def __init__(self, frame: pd.DataFrame):
        rows: list[Any] = [row for row in frame.to_dict("records") if row["slice"] == LONG]
        self.full = next((float(row["accuracy"]) for row in rows if row["method"] == "full"), None)
        self._cells = {(row["method"], row["budget"]): float(row["accuracy"]) for row in rows}

    def __call__(self, name: str, budget: float) -> float | None:
        return self._cells.get((name, budget))

    def near(self, what: str, name: str, budget: float, expected: float, tolerance: float) -> Claim:
        """A cell within a tolerance."""
        found = self(name, budget)
        if found is None:
            return not_run(what, f"{expected:.3g} ± {tolerance:.3g}")
        return Claim.near(what, expected, found, tolerance)


def not_run(what: str, expected: str) -> Claim:
    """A claim whose runs are not at hand fails."""
    return Claim(what, expected, "not run", False)


def claims(frame: pd.DataFrame, turns: pd.DataFrame) -> list[Claim]:
    """Every claim of this experiment, on 128:32."""
    found = Found(frame)
    return [*_controls(found, frame), *_perfect(found), *_order(found), *_signs(found), *_turns(turns)]


def _controls(found: Found, frame: pd.DataFrame) -> list[Claim]:
    """1: what heads share loses as much as it drops; what each head draws for itself covers more."""
    config, rows = _task(frame), []
    for budget in methods.BUDGETS:
        for name, by in (("recency", "recency"), ("random, heads share", "random")):
            keep = round(64 * budget)
            expected = kept_accuracy(config, LONG, keep, 0, 0, by=by)
            tolerance = 0.01 if by == "recency" else 0.03
            rows.append(found.near(f"1. {name}, f = {budget:g}: closed form", name, budget, expected, tolerance))
    rows.append(found.near("1. random, each head, f = 0.5", "random, each head", 0.5, 0.708, 0.05))
    rows.append(found.near("1. random, each head, f = 0.25", "random, each head", 0.25, 0.381, 0.05))
    return rows


def _task(frame: pd.DataFrame) -> Any:
    return Config.build(frame.attrs["config"]).task


def _perfect(found: Found) -> list[Claim]:
    """2: these know which slots are values."""
    rows = []
    for name in ("KVzip", "Expected Attention", "Knorm, long keys"):
        value, what, expected = found(name, 0.5), f"2. {name}, f = 0.5", ">= full - 0.01"
        if value is None or found.full is None:
            rows.append(not_run(what, expected))
        else:
            rows.append(Claim(what, expected, f"{value:.3f} of {found.full:.3f}", value >= found.full - 0.01))
        rows.append(found.near(f"2. {name}, f = 0.25: above 2f", name, 0.25, 0.64, 0.04))
    return rows


def _order(found: Found) -> list[Claim]:
    """3 and 4: the order of methods that know no question, and H2O's division by readers."""
    names = ("KVzip", "KeyDiff", "H2O, by readers", "SnapKV, window 8", "random, each head", "TOVA", "recency")
    values, what = [found(name, 0.5) for name in names], "3. KVzip > KeyDiff > H2O > SnapKV > random > TOVA > recency"
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        rows = [not_run(what, ">")]
    else:
        falls = all(high > low for high, low in itertools.pairwise(known))
        rows = [Claim(what, ">", " ".join(f"{value:.2f}" for value in known), falls)]
    ours, raw = found("H2O, by readers", 0.5), found("H2O, raw sums", 0.5)
    what = "4. H2O by readers less raw sums, f = 0.5"
    if ours is None or raw is None:
        return [*rows, not_run(what, ">= 0.05")]
    return [*rows, Claim(what, ">= 0.05 (0.11 before)", f"{ours - raw:.3f}", ours - raw >= 0.05)]


def _signs(found: Found) -> list[Claim]:
    """5: the published sign of Knorm is backwards in this model."""
    value, what = found("Knorm, short keys", 0.5), "5. Knorm as published, f = 0.5: worse than anything"
    if value is None:
        return [not_run(what, "<= 0.05")]
    return [Claim(what, "<= 0.05 (0.007 before)", f"{value:.3f}", value <= 0.05)]


def _turns(turns: pd.DataFrame) -> list[Claim]:
    """6: the first turn's questions say nothing of the second's; they mislead those that look at questions."""
    rows = []
    named = turns.set_index("method")
    for name in methods.SECOND_TURN:
        before, after = named.loc[name, "before any question"], named.loc[name, "after the first turn"]
        agnostic = name in ("KVzip", "Expected Attention")
        expected = "changes by <= 0.02" if agnostic else "changes by > 0.02"
        what = f"6. {name}, second turn, {methods.SECOND_SLOTS} slots"
        if pd.isna(before) or pd.isna(after):
            rows.append(not_run(what, expected))
            continue
        rows.append(
            Claim(what, expected, f"{before:.3f}, {after:.3f}", bool((abs(after - before) <= 0.02) == agnostic))
        )
    return rows


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A panel a slice: accuracy against the bytes of the pages that a sequence holds at its end; bars are 95% over
    seeds."""
    slices = sorted(frame.slice.unique(), key=lambda name: int(name.split(":")[0]))
    figure, panels = sheet(1, len(slices), size=(6.6 * len(slices), 5.6), squeeze=False, sharey=True)
    for panel, name in zip(panels[0], slices, strict=True):
        for method in methods.METHODS:
            rows: Any = frame[(frame.slice == name) & (frame.method == method.name)]
            if rows.empty or (method.budgets != methods.BUDGETS and name != LONG):
                continue
            rows = rows.sort_values("held_bytes")
            style = {"color": method.colour, "marker": method.marker, "ms": 6, "lw": 1, "capsize": 2}
            if method.name.startswith("oracle"):  # others lie on it
                style |= {"mfc": "none", "ms": 13, "zorder": 4}
            panel.errorbar(rows.held_bytes, rows.accuracy, yerr=rows.half_width, label=method.name, **style)
        full = frame[(frame.slice == name) & (frame.method == "full")]
        panel.plot(full.held_bytes, full.accuracy, "P", color="black", ms=10, label="full")
        panel.set(ylim=(-0.03, 1.05), title=f"{name} (length:pairs)", xlabel="pages held at the end")
        byte_axis(panel, is_log=False, most=8)
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("accuracy of recall")
    handles, labels = panels[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center")
    figure.suptitle("Recall after eviction (MQAR, one layer, 4 heads)")
    save(figure, [path])


def redraw(output: Path = HERE) -> None:
    """eviction.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "eviction.csv"), output / "eviction.png")


def main(output: Path = HERE, results: Path = Path("results/eviction_mqar")) -> int:
    """Writes eviction.csv, turns.csv and eviction.png; returns 1 if a claim fails."""
    records = read(results)
    frame, turns = table(records), second_turns(records)
    frame.attrs["config"] = records[0].config
    frame.to_csv(output / "eviction.csv", index=False, float_format="%.5g")
    turns.to_csv(output / "turns.csv", index=False, float_format="%.5g")
    draw(frame, output / "eviction.png")
    return verdict(claims(frame, turns), "Eviction on MQAR (methods B.1)")


if __name__ == "__main__":
    sys.exit(main(results=Path(sys.argv[1] if len(sys.argv) > 1 else "results/eviction_mqar")))
