"""What was measured while models were trained: losses and validations by step, by task and length."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvlab.lab.labels import point_labels, without_seed
from kvlab.lab.panels import task_names
from kvlab.lab.record import AnyRecord, Done
from kvlab.lab.results import read_metrics
from kvlab.lab.styles import DASHES, styles
from kvlab.tasks import TASKS
from kvlab.tasks.metrics import metric_label

MAX_CURVE_POINTS = 200


def curve_groups(records: Sequence[AnyRecord]) -> list[dict[str, Any]]:
    """Groups of trainings that saw the same data, each with its `task`, its `metric` and the `curves`: name, seed,
    colour, dash, steps and losses (nats), and the steps and values of its validations. A training that several runs
    share is there once; one without rows is not."""
    trainings = list({_training_of(record): record for record in records}.values())
    configs = [_trained_half(record.config) for record in trainings]
    labels, looks = point_labels(configs), styles(configs)
    groups: dict[str, list[dict[str, Any]]] = {}
    tasks: dict[str, Mapping[str, Any]] = {}
    metrics: dict[str, str] = {}
    for record, config, label, look in zip(trainings, configs, labels, looks, strict=True):
        if (curve := _curve(record)) is None:
            continue
        key = json.dumps(config["task"], sort_keys=True, default=str)
        curve |= {"name": label, "seed": record.seed, "colour": look.colour, "dash": DASHES[look.marker]}
        groups.setdefault(key, []).append(curve)
        tasks[key] = config["task"]
        if isinstance(record, Done):
            metrics[key] = metric_label(record.quality.metric)
    names = task_names(list(tasks.values()))
    return [
        {"task": name, "metric": metrics.get(key, "metric"), "curves": curves}
        for name, (key, curves) in zip(names, groups.items(), strict=True)
    ]


def _training_of(record: AnyRecord) -> str:
    """What is equal where two runs share a training; an older run has its own."""
    return (record.training.training_id if record.training else "") or f"run {record.run_id} {record.directory}"


def _trained_half(config: Mapping[str, Any]) -> dict[str, Any]:
    """What runs of one training have in common, apart from the seed."""
    task = TASKS.get(config["task"]["type"])
    evaluated = task.evaluation_fields if task else ()
    half = {name: value for name, value in without_seed(config).items() if name not in ("memory", "measure")}
    return half | {"task": {name: value for name, value in config["task"].items() if name not in evaluated}}


def _curve(record: AnyRecord) -> dict[str, Any] | None:
    """Losses of a run's chosen trial (of all its rows while there is none), thinned, and all its validations."""
    chosen = record.training.learning_rate if isinstance(record, Done) else None
    rows = [row for row in read_metrics(record) if chosen is None or row["learning_rate"] == chosen]
    if not rows:
        return None
    validated = [row for row in rows if isinstance(row.get("validation"), int | float)]
    thinned = rows[:: max(1, len(rows) // MAX_CURVE_POINTS)]
    return {
        "steps": [row["step"] for row in thinned],
        "losses": [row["loss"] for row in thinned],
        "validated": [row["step"] for row in validated],
        "validations": [row["validation"] for row in validated],
    }
