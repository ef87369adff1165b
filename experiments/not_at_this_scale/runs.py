"""What not_at_this_scale trains and evaluates: two tasks, and on each the memories that its claims compare."""

from collections.abc import Iterable
from typing import Any

HALF, QUARTER = 32, 16
"""Slots a head, of the 64 of a prompt of 32 pairs: whole pages, so that heads of different counts hold as many."""
STREAMED = 64
"""Slots of a text of 256 bytes."""
MQAR = (
    "task=mqar",
    "task.test=['128:32']",
    "train.num_steps=400",
    "train.eval_every=100",
    "train.checkpoint_every=400",
    "optimizer.name=adamw",
    "optimizer.learning_rate=0.01",
)
TEXT = (
    "task=text",
    "task.seq_len=256",
    "train.num_steps=600",
    "train.eval_every=200",
    "train.checkpoint_every=600",
    "optimizer.name=adamw",
    "optimizer.learning_rate=0.005",
    "mixer.A.rope_fraction=0.5",
    "mixer.A.rope_base=10000",
    "mixer.A.qk_norm=false",
    "mixer.A.local_start=0",
    "task.num_scored=128",
    "task.scored_in_chunks=true",
    "task.decode_len=16",
    "memory.chunk_len=16",
)
BARE = {"sinks": 0, "recent": 0}
"""Nothing is protected, so that a method is its scores alone."""
SNAPKV = {"type": "snapkv", "sinks": 0, "recent": 8, "window": 8, "pool": 1}
RECALL: dict[str, dict[str, Any]] = {
    "recency": {"type": "recency", **BARE},
    "recency, 4 sinks": {"type": "recency", "sinks": 4, "recent": 0},
    "random, each head": {"type": "random", "share": "head", **BARE},
    "Knorm": {"type": "knorm", "keep": "short", **BARE},
    "SnapKV": {**SNAPKV, "layers": "uniform", "heads": "uniform"},
    "SnapKV, pyramid": {**SNAPKV, "layers": "pyramid", "heads": "uniform"},
    "SnapKV, ada": {**SNAPKV, "layers": "uniform", "heads": "ada"},
    "H2O": {"type": "h2o", **BARE},
    "Expected Attention": {"type": "expected", **BARE},
    "KVzip": {"type": "kvzip", "share": "head", **BARE},
}
"""Methods that compact a prompt of pairs before anybody has asked."""
AT_HALF = ("recency", "recency, 4 sinks", "random, each head", "Knorm", "SnapKV", "SnapKV, pyramid", "SnapKV, ada")
AT_QUARTER = ("SnapKV", "SnapKV, pyramid", "H2O", "Expected Attention", "KVzip")
"""Which of them are asked at which slots. At half of the prompt KVzip loses nothing, and cannot be told from others; at
a quarter heads of different counts had the accuracy of equal ones to the last digit."""
WINDOWS: dict[str, dict[str, Any]] = {
    "window": {"type": "streaming", "sinks": 0},
    "window, 4 sinks": {"type": "streaming", "sinks": 4},
}
"""Memories of the text, which forget while it is read."""


def name_of(config: dict[str, Any]) -> str | None:
    """The memory of an attention's record by its name here: "full" without a compression, None for another, and for
    another mixer."""
    section = config["memory"].get("compression")
    if config["mixer"]["name"] != "mha":
        return None
    if section is None:
        return "full"
    methods = RECALL if config["task"]["type"] == "mqar" else WINDOWS
    return next((name for name, of in methods.items() if all(section.get(key) == of[key] for key in of)), None)


def swept(methods: Iterable[dict[str, Any]], slots: int) -> tuple[str, str]:
    """A sweep over methods at one budget, as Hydra reads it."""
    words = [",".join(f"{key}:{str(value).lower()}" for key, value in section.items()) for section in methods]
    return "memory.compression=" + ",".join(f"{{{each}}}" for each in words), f"memory.budget={slots}"


RUNS = (
    MQAR,
    (*MQAR, *swept([RECALL[name] for name in AT_HALF], HALF)),
    (*MQAR, *swept([RECALL[name] for name in AT_QUARTER], QUARTER)),
    TEXT,
    (*TEXT, *swept(WINDOWS.values(), STREAMED)),
)
"""The full memory first, which trains."""
