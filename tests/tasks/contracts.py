"""The contract of a task, as plain functions over any of them."""

import jax
import jax.numpy as jnp
import numpy as np

from kvlab.random import named_key
from kvlab.tasks import TASKS, Batch, Task
from kvlab.tasks.metrics import METRICS

SMALL: dict[str, dict] = {
    "mqar": {
        "vocab_size": 32, "train": ("16:2", "24:3"), "train_weights": (2, 1), "test": ("16:2", "24:3"),
        "num_validation": 3, "num_test": 5, "num_turns": 2,
    },
    "text": {
        "seq_len": 24, "decode_len": 4, "num_validation": 3, "num_test": 5, "num_scored": 10, "max_bigram_count": 900,
    },
    "perplexity": {
        "seq_len": 24, "decode_len": 4, "num_validation": 3, "num_test": 5, "num_scored": 10, "whole": False,
        "max_bigram_count": 900,
    },
    "needle": {"contexts": (60, 80), "depths": (0, 50), "num_validation": 3, "num_test": 5},
    "passkey": {"contexts": (300, 320), "num_validation": 3, "num_test": 5},
}  # fmt: skip
"""Smaller configs, where the defaults are too large for tests; those of text read the standard library, once a
process."""


def make(name: str, **changes: object) -> Task:
    """A task of the matrix, with fields changed."""
    build = TASKS[name]
    return build(build.Config(**{**SMALL.get(name, {}), **changes}))  # type: ignore[call-arg]


def assert_batch(batch: Batch, task: Task, num_rows: int, seq_len: int) -> None:
    """Tokens and labels of the vocabulary, positions inside the sequence, weights that are not negative."""
    batch = jax.tree.map(np.asarray, batch)
    assert batch.tokens.shape == (num_rows, seq_len)
    assert batch.label_positions.shape == batch.labels.shape == batch.weights.shape
    assert batch.labels.shape[0] == num_rows
    real = batch.weights > 0
    assert real.any(axis=1).all()
    assert (batch.weights >= 0).all()
    for tokens in (batch.tokens, batch.labels[real]):
        assert tokens.min() >= 0
        assert tokens.max() < task.vocab_size
    assert batch.label_positions[real].min() >= 0
    assert batch.label_positions[real].max() < seq_len


def assert_training(name: str) -> None:
    """Training compiles for the shapes that the task says, and a batch is a function of its key."""
    task = make(name)
    used = {task.train_call(call, 2)[0] for call in range(12)}
    assert used == set(task.train_shapes())
    for call in range(3):
        seq_len, knobs = task.train_call(call, 2)
        assert len(knobs) == 2
        knob = jnp.asarray(knobs[0], jnp.int32)
        batches = [task.train_batch(task.train_data(), named_key(seed, "x"), 4, seq_len, knob) for seed in (0, 0, 1)]
        assert_batch(batches[0], task, 4, seq_len)
        jax.tree.map(np.testing.assert_array_equal, batches[0], batches[1])
        assert not np.array_equal(batches[0].tokens, batches[2].tokens)


def assert_evaluation(name: str) -> None:
    """An example is the same whatever batch it comes in; the splits share none; memory is measured at the longest
    slice."""
    task, key = make(name), named_key(0, "eval")
    rows: dict[str, set[bytes]] = {}
    for number, split in enumerate(("validation", "test")):
        split_key = jax.random.fold_in(key, number)
        rows[split] = set()
        for part in task.slices(split):
            assert 0 < part.prompt_len < part.seq_len
            assert part.compress_at is None or 0 < part.compress_at <= part.prompt_len
            assert list(part.turns) == sorted(set(part.turns))
            assert all(part.compress_at <= turn < part.seq_len for turn in part.turns)
            batch = task.eval_batch(split_key, split, part, 0, part.num_examples)
            assert_batch(batch, task, part.num_examples, part.seq_len)
            if parts := task.label_parts(batch):
                assert np.all(sum(chosen.astype(int) for chosen in parts.values()) == 1), "a label is in one part"
                assert all(chosen.shape == batch.labels.shape for chosen in parts.values())
            tail = task.eval_batch(split_key, split, part, 1, 2)
            np.testing.assert_array_equal(tail.tokens, np.asarray(batch.tokens)[1:3])
            np.testing.assert_array_equal(tail.labels, np.asarray(batch.labels)[1:3])
            rows[split] |= {row.tobytes() for row in np.asarray(batch.tokens)}
    assert not rows["validation"] & rows["test"]
    assert task.context_len == max(part.seq_len for part in task.slices("test"))


def assert_evaluation_fields(name: str) -> None:
    """A field that only evaluates leaves training and validation as they are."""
    task = make(name)
    for field in task.evaluation_fields:
        value = getattr(task.config, field)
        changed = make(name, **{field: not value if isinstance(value, bool) else value - 1})
        assert changed.config != task.config
        assert changed.train_shapes() == task.train_shapes()
        assert changed.train_call(3, 2) == task.train_call(3, 2)
        jax.tree.map(np.testing.assert_array_equal, changed.train_data(), task.train_data())
        for ours, theirs in zip(task.slices("validation"), changed.slices("validation"), strict=True):
            assert ours.num_examples == theirs.num_examples
            batches = [
                which.eval_batch(named_key(0, "eval"), "validation", part, 0, 3)
                for which, part in ((task, ours), (changed, theirs))
            ]
            jax.tree.map(np.testing.assert_array_equal, *batches)


def assert_training_fields(name: str) -> None:
    """A field that only trains leaves the test as it is."""
    task = make(name)
    values = {field: getattr(task.config, field) for field in task.training_fields}
    changed = make(
        name, **{field: value[:1] if isinstance(value, tuple) else value - 1 for field, value in values.items()}
    )
    assert all(getattr(changed.config, field) != value for field, value in values.items())
    assert not {*task.training_fields} & {*task.evaluation_fields}
    assert changed.slices("test") == task.slices("test")
    for part in task.slices("test"):
        batches = [which.eval_batch(named_key(0, "eval"), "test", part, 0, 3) for which in (task, changed)]
        jax.tree.map(np.testing.assert_array_equal, *batches)


def assert_known(name: str) -> None:
    """Reports know the metric, and the YAML composes to a run of this task."""
    from kvlab.compose import compose

    assert METRICS[TASKS[name].metric.name] is TASKS[name].metric
    assert compose([f"task={name}"]).task_name == name


CONTRACT = (assert_training, assert_evaluation, assert_evaluation_fields, assert_training_fields, assert_known)
