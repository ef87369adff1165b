"""Tables for a terminal: runs to come, runs that were done, and what a sweep holds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from kvlab import terminal
from kvlab.config import Config
from kvlab.evaluation.verify import in_short
from kvlab.lab.labels import run_labels
from kvlab.lab.narrow import UNKNOWN, flips_of, print_rows
from kvlab.lab.plan import Plan
from kvlab.lab.protocol import SHARE, protocol_rows
from kvlab.lab.record import AnyRecord, Unfinished
from kvlab.lab.results import Point, points
from kvlab.lab.runs import Run
from kvlab.lab.written_tables import written
from kvlab.tasks.metrics import metric_label
from kvlab.units import counted, human_bytes

SIZES = {"logical_bytes": "live/seq", "allocated_bytes": "held/seq", "read_bytes_per_token": "read/tok"}
"""The bytes that tables show, and their headings."""
SPARE = ("step ms", "live/seq", "seeds", "metric", "tok/s", "checked", "flips", "tells", "dropped")
"""What tables of records leave out first where there is no room."""
PLANNED = ("held/seq", "held peak/seq", "read/tok")
"""Headings of what a plan says of one sequence's memory."""
SPARE_PLANNED = ("optimizer", "activations", "weights", "temporaries", "state", "params", "FLOPs", "memory", "training")
"""What tables of plans leave out first where there is no room."""


MAX_REASON = 1500
"""Characters of a reason that tables show."""


def as_cell(value: Any) -> str:
    """A value as tables for people show it; what is not known is a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{round(value, 4) + 0.0:.4f}" if isinstance(value, float) else str(value)  # no minus before nothing


def wide_console() -> Console:
    """Full width where nobody is watching, so that piped tables are not cut."""
    return terminal.console(width=200)


def print_plans(plans: Sequence[tuple[Config, Plan]], said: Sequence[str] = ()) -> None:
    """A row for each run: what it would hold and cost, and whether that fits. FLOPs stand at the first run of each
    training. Below are the kernels that runs would take, what budgets were solved for, and what is `said` of fields
    that change nothing."""
    names = ("run", "training", "label", "state", "params", "weights", "optimizer", "activations", "memory", *PLANNED)
    trainings = {config.training_id: config.run_id for config, _ in reversed(plans)}
    total = sum(plan.train_flops for config, plan in plans if trainings[config.training_id] == config.run_id)
    title = f"{counted(len(plans), 'run')} of {counted(len(trainings), 'training')}, {total:.2e} FLOPs"
    names, rows = (*names, "temporaries", "FLOPs", "fits"), []
    labels = run_labels([config.as_dict() for config, _ in plans])
    for label, (config, plan) in zip(labels, plans, strict=True):
        sizes = (plan.weights_bytes, plan.optimizer_bytes, plan.activations_bytes)
        sizes = (*sizes, plan.state_bytes, plan.held_bytes, plan.peak_bytes, plan.read_bytes_per_token)
        sizes = (*sizes, plan.temporaries_bytes)
        fits = f"{'yes' if plan.fits else 'NO'}: {human_bytes(max(plan.train_bytes, plan.decode_bytes))}"
        fits += f" of {human_bytes(plan.hardware_bytes)} ({plan.hardware})"
        flops = f"{plan.train_flops:.2e}" if trainings[config.training_id] == config.run_id else "shared"
        cells = [config.run_id, config.training_id, label, Run(config).state, f"{plan.num_params:,}"]
        cells += [*(human_bytes(size) for size in sizes), flops, fits]
        rows.append(dict(zip(names, cells, strict=True)))
    console = wide_console()
    print_rows(console, rows, kept=("run", "label", "held/seq"), spare=SPARE_PLANNED, title=title)
    lines = [_kernels_line(plan) for _, plan in plans]
    for label, (config, plan) in zip(labels, plans, strict=True):
        name = f"{label} [{config.run_id}]"
        lines += [*_skipped_lines(plan, name), *budget_lines(config, label)]
    for line in dict.fromkeys([*lines, *said]):
        console.print(line, markup=False)


def budget_lines(config: Config, label: str = "") -> list[str]:
    """Said of what the budget of a run was solved for, which has a label among others or (empty) its own."""
    budget = config.equal_budget
    if budget is None or budget.is_ceiling:
        return []
    return [f"{label or config.label} [{config.run_id}]: {budget.words}"]


def _skipped_lines(plan: Plan, name: str) -> list[str]:
    """Said of a run whose memory leaves some states as they are: which, and why."""
    by_reason: dict[str, list[str]] = {}
    for state, reason in plan.skipped.items():
        by_reason.setdefault(reason, []).append(state)
    return [f"{name}: {', '.join(states)} left as computed ({reason})" for reason, states in by_reason.items()]


def _kernels_line(plan: Plan) -> str:
    """The implementations that a run would take, and why it would not take the kernels of such a device."""
    chosen = plan.kernels.items()
    said = (f"{op} {choice.taken}" + (f" ({choice.reason})" if choice.reason else "") for op, choice in chosen)
    return f"on {plan.hardware}: {', '.join(said)}"


def sweep_summary(configs: Sequence[Config]) -> str:
    """How many runs of a sweep are in which state."""
    states = Counter(Run(config).state for config in configs)
    words = {"new": "to run", "cut": "to resume", "failed": "to retry", "done": "done already"}
    return f"{counted(len(configs), 'run')}: " + ", ".join(f"{count} {words[state]}" for state, count in states.items())


def print_runs(configs: Sequence[Config]) -> None:
    """The records of runs that have one, as `print_records` prints them."""
    records = [record for config in configs if (record := Run(config).record)]
    if records:
        print_records(records)


SPREAD = "step ms, tok/s: medians of one process's samples [quartiles]; other runs differ by more"
"""Said below speeds."""


def print_records(records: list[AnyRecord]) -> None:
    """One row a point, with turns, and with what lossy memories cost, where there are some; failed and cut runs below
    with their reasons."""
    console, (rows, below) = wide_console(), _rows(records)
    if rows:
        shares = [heading for heading in rows[0] if heading.endswith(SHARE)]
        print_rows(console, rows, kept=("variant", "value"), spare=(*shares, *SPARE))
    for line in below:
        console.print(line, markup=False)


def written_records(records: list[AnyRecord], form: str) -> str:
    """The same table as "markdown" or "latex", without the shares of labels; a mean and its interval are one column."""
    rows, below = _rows(records)
    return written(form, "", list(map(_for_print, rows)), kept=("variant", VALUE), below=below)


VALUE = "value ± 95%"


def _for_print(row: Mapping[str, str]) -> dict[str, str]:
    """A row of `print_records` for a paper."""
    found: dict[str, str] = {}
    for heading, text in row.items():
        if heading == "value":
            found[VALUE] = text if row["± 95%"] == UNKNOWN else f"{text} ± {row['± 95%']}"
        elif heading != "± 95%" and not heading.endswith(SHARE):
            found[heading] = text
    return found


def _rows(records: list[AnyRecord]) -> tuple[list[dict[str, str]], list[str]]:
    """A row for each point, and what is said below them: of speeds, and of each run that has not finished."""
    found = points(records)
    rows = [_point_row(*each) for each in zip(found, protocol_rows(found, records), strict=True)]
    below = [SPREAD] if any(point.speeds.get("num_decode_samples") for point in found) else []
    for record, label in zip(records, run_labels([record.config for record in records]), strict=True):
        if isinstance(record, Unfinished):
            below.append(f"{record.status}: {label} [{record.run_id}] {record.reason[:MAX_REASON]}")
    return rows, below


def _point_row(point: Point, added: Mapping[str, Any]) -> dict[str, str]:
    """A point by heading, with what the protocol adds: flips in one column, and in one word what logits were checked
    against."""
    row = {"variant": point.name, "task": point.task, "metric": metric_label(point.metric)}
    row |= {"value": as_cell(point.value), "± 95%": as_cell(point.half_width)}
    row["seeds"] = str(point.num_seeds)
    sizes = {heading: point.bytes_per_sequence.get(axis) for axis, heading in SIZES.items()}
    row |= {heading: "-" if size is None else human_bytes(size) for heading, size in sizes.items()}
    row |= {"context": str(point.context_len), "batch": str(point.batch_size)}
    row |= {"step ms": _speed(point, "train_step_ms", "train_step_low_ms", "train_step_high_ms", ".1f")}
    speeds = ("decode_tokens_per_s", "decode_low_tokens_per_s", "decode_high_tokens_per_s")
    row["tok/s"] = _speed(point, *speeds, ",.0f")
    cells = {name: as_cell(value) for name, value in added.items()}
    if "dropped" in added:
        cells["dropped"] = _dropped_cell(added["dropped"])
    if "verified by" in cells:
        cells["checked"] = in_short(cells.pop("verified by"))
        cells["flips"] = flips_of(cells, *(flips := ("right to wrong", "wrong to right", "labels")))
        cells = {name: text for name, text in cells.items() if name not in flips}
    return row | cells


def _speed(point: Point, median: str, low: str, high: str, form: str) -> str:
    """A median, and the quartiles of its samples where they are known."""
    found, below, above = (point.speeds.get(name) for name in (median, low, high))
    if found is None:
        return UNKNOWN
    spread = "" if below is None or above is None else f" [{below:{form}}, {above:{form}}]"
    return f"{found:{form}}{spread}"


def _dropped_cell(fraction: float | None) -> str:
    """The share of tokens that a compression dropped; in a word where it never did."""
    if fraction is None:
        return UNKNOWN
    return f"{100 * fraction:.1f}%" if fraction else "nothing"
