"""A run of seconds, which the tests of this folder configure, start from outside and read."""

import json
import sys

from kvlab.compose import compose

SMALL = [
    "model.model_dim=16", "mixer.A.head_dim=4", "task.vocab_size=32", "task.train=[16:2]", "task.train_weights=[1]",
    "task.test=[16:2,24:3]", "task.num_test=6", "task.num_validation=6", "measure.batch_size=4",
    "measure.decode_steps=4", "train.batch_size=4", "train.num_steps=16", "train.steps_per_call=2",
    "train.eval_every=8", "train.checkpoint_every=4", "memory.page_size=4", "memory.chunk_len=3",
    "train.stop_at=null", "optimizer.learning_rate=0.01",
]  # fmt: skip
TUNED = ["tune.learning_rate=[0.01,0.001]"]
"""The training that tests share: `conftest.finished_runs`."""
MEASURED = [*TUNED, "measure.context_len=40"]
"""The run of it that is done there."""

FIRST_RECIPE = ["model.dtype=float32", "optimizer.name=adamw", "optimizer.learning_rate=0.01", "train.num_steps=1600",
                "train.eval_every=200", "train.checkpoint_every=800"]  # fmt: skip
"""How recall was trained in the first runs, whose hashes are known."""


def small(results_dir, *overrides):
    """Its config, with its results in a folder."""
    return compose([*SMALL, f"results_dir={results_dir}", *overrides])


def command(results_dir, *overrides):
    """The same run as a child process."""
    return [sys.executable, "-m", "kvlab", "run", *SMALL, f"results_dir={results_dir}", *overrides]


def rows(config):
    """What its training wrote of each call."""
    return [json.loads(line) for line in (config.training_dir / "metrics.jsonl").read_text().splitlines()]
