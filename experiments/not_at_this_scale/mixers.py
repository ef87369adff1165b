"""Claims on mixers of constant size that are trained here: KDA beside Gated DeltaNet on text by the byte, and recall of
sequences four times as long as those a mixer was trained on, by rule and by how its decay is initialised."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from kvlab.config import Config
from kvlab.evaluation.score import Scorer
from kvlab.lab.execute import load_params
from kvlab.lab.record import Done
from kvlab.random import named_key
from kvlab.tasks.mqar import Mqar

KDA, GATED = "KDA", "Gated DeltaNet"
TEXT = (
    "task=text",
    "task.seq_len=256",
    "optimizer.name=adamw",
    "task.num_scored=128",
    "task.scored_in_chunks=true",
    "task.decode_len=16",
    "memory.chunk_len=16",
    "mixer=gated_deltanet,kda",
    "mixer.L.rate_range=[0.01,16.0]",
    "optimizer.learning_rate=0.005",
    "tune.learning_rate=[0.01,0.005]",
    "train.num_steps=160",
    "train.eval_every=160",
    "train.checkpoint_every=160",
)
"""Scored as the other text is; every run keeps the rate that is better on validation. A state of either mixer has 2
heads of 16 x 32 numbers and the same columns of a convolution."""
TRAINED_LEN, PAIRS = 64, 8
LENGTHS = (64, 128, 256)
"""Tokens of the sequences that are asked: as trained on, twice and four times as long, with as many pairs."""
RECALL = (
    "task=mqar",
    "task.train=['64:4','64:8']",
    "task.train_weights=[1,1]",
    f"task.test=['{TRAINED_LEN}:{PAIRS}']",
    "model.num_layers=1",
    "optimizer.name=adamw",
    "train.num_steps=600",
    "train.eval_every=100",
    "train.checkpoint_every=600",
)
PUBLISHED = ("mixer=gated_deltanet", "mixer.L.rate_range=[0.01,16.0]")
SLOW, FAST, PLAIN, UNGATED = f"{GATED}, slow decay", f"{GATED}, fast decay", "plain rule, decay", "DeltaNet"
VARIANTS: dict[str, tuple[str, ...]] = {
    GATED: PUBLISHED,
    SLOW: ("mixer=gated_deltanet",),
    FAST: (*PUBLISHED, "mixer.L.dt_range=[0.1,1.0]"),
    PLAIN: (*PUBLISHED, "mixer.L.rule=plain"),
    UNGATED: ("mixer=deltanet",),
}
"""The decay a token is e to the minus (time step x rate), and first by the published ranges of the two: time steps in
[.001, .1], rates in [.01, 16]. Slow: rates in [.01, .1]. Fast: time steps in [.1, 1]. The plain rule adds to what a key
holds, and decays as published; DeltaNet has the delta rule, and no decay."""
INITIALISED = (GATED, SLOW, FAST)
RUNS = (TEXT, *((*RECALL, *words) for words in VARIANTS.values()))


def variant_of(config: dict[str, Any]) -> str | None:
    """The name here of the mixer of a record's configuration; None: an attention's run."""
    section = config["mixer"].get("L")
    if section is None:
        return None
    if config["task"]["type"] == "text":
        return KDA if section["decay"] == "channel" else GATED
    if section["decay"] == "none":
        return UNGATED
    if section["rule"] == "plain":
        return PLAIN
    return SLOW if section["rate_range"][1] < 1 else FAST if section["dt_range"][1] >= 1 else GATED


def gains(records: Sequence[Done]) -> pd.DataFrame:
    """A row a run on text: bits a byte, the rate that was chosen, parameters, and bytes of a sequence's state."""
    rows = [
        {
            "method": variant_of(record.config),
            "seed": record.config["seed"],
            "value": record.quality.value,
            "learning_rate": record.training.learning_rate,
            "num_params": record.num_params,
            "held_bytes": record.memory.allocated_bytes // record.memory.batch_size,
        }
        for record in records
        if record.config["task"]["type"] == "text"
    ]
    columns = ["method", "seed", "value", "learning_rate", "num_params", "held_bytes"]
    return pd.DataFrame(rows, columns=columns).sort_values(["method", "seed"], ignore_index=True)


def longer(records: Sequence[Done], asked: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    """A row for each run of one variant, and length: recall of the same sequences in each, in the parallel form."""
    rows, scorer = list[dict[str, Any]](), None
    for record in records:
        assert record.directory
        laboratory, params = load_params(Config.build(record.config), Path(record.directory))
        if scorer is None:  # its programs serve every seed
            assert isinstance(laboratory.task, Mqar)
            task = Mqar(replace(laboratory.task.config, test=tuple(f"{length}:{PAIRS}" for length in asked)))
            key, batch_size = named_key(laboratory.config.seed, "eval"), laboratory.config.measure.batch_size
            scorer = Scorer(laboratory.model.structure, task, key, batch_size)
        for length, part in zip(asked, scorer.parallel(params, "test"), strict=True):
            row = {"method": variant_of(record.config), "length": length, "seed": record.config["seed"]}
            rows.append(row | {"value": scorer.task.metric.from_sums(part), "steps": record.training.num_steps})
    return rows


def lengths(records: Sequence[Done]) -> pd.DataFrame:
    """`longer` of every run of recall."""
    by_variant = dict[str | None, list[Done]]()
    for record in sorted(records, key=lambda record: record.config["seed"]):
        if record.config["task"]["type"] == "mqar":
            by_variant.setdefault(variant_of(record.config), []).append(record)
    rows = [row for found in by_variant.values() for row in longer(found)]
    columns = ["method", "length", "seed", "value", "steps"]
    return pd.DataFrame(rows, columns=columns).sort_values(["method", "length", "seed"], ignore_index=True)
