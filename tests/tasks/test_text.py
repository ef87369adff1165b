"""The text task: files stay whole, splits stay apart, windows are what the corpus says."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.random import named_key
from kvlab.schema import ConfigError
from kvlab.tasks.text import Text, TextConfig


@pytest.fixture
def folder(tmp_path):
    for index in range(200):
        (tmp_path / f"module{index}.py").write_text(f"# file {index}\n" + f"value = {index}\n" * 20)
    return tmp_path


def test_each_file_is_in_one_split(folder):
    corpus = Text(TextConfig(path=str(folder), seq_len=32, decode_len=4)).corpus
    owners = {
        name: {line for line in bytes(data).split(b"\n") if line.startswith(b"#")} for name, data in corpus.items()
    }
    assert sum(len(lines) for lines in owners.values()) == 200
    assert not owners["train"] & owners["test"]
    assert not owners["train"] & owners["validation"]
    assert len(owners["train"]) > 150


def test_labels_are_the_next_bytes(folder):
    task = Text(TextConfig(path=str(folder), seq_len=32, decode_len=4))
    batch = task.train_batch(task.train_data(), named_key(0, "x"), 8, 32, jnp.asarray(0, jnp.int32))
    tokens, labels = np.asarray(batch.tokens), np.asarray(batch.labels)
    np.testing.assert_array_equal(tokens[:, 1:], labels[:, :-1])
    data = bytes(task.corpus["train"])
    assert all(bytes(row.astype(np.uint8)) in data for row in tokens)


def test_evaluation_windows_are_fixed_and_cover_the_split(folder):
    task = Text(TextConfig(path=str(folder), seq_len=32, decode_len=4, num_test=5))
    (eval_slice,) = task.slices("test")
    assert (eval_slice.prompt_len, eval_slice.seq_len) == (28, 32)
    batch = task.eval_batch(named_key(0, "a"), "test", eval_slice, 0, 5)
    same = task.eval_batch(named_key(9, "b"), "test", eval_slice, 0, 5)
    np.testing.assert_array_equal(batch.tokens, same.tokens)
    assert bytes(np.asarray(batch.tokens[0]).astype(np.uint8)) == bytes(task.corpus["test"][:32])


@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_prompt_is_not_scored(folder, in_chunks):
    """The last labels of the test's windows are all that is left; validation and tokens are as without."""
    config = TextConfig(path=str(folder), seq_len=32, decode_len=4, num_test=5)
    plain, task = Text(config), Text(replace(config, num_scored=10, scored_in_chunks=in_chunks))
    (part,) = task.slices("test")
    assert (part.prompt_len, part.compress_at, part.turns) == (28 if in_chunks else 22, 22, ())
    batch = task.eval_batch(named_key(0, "a"), "test", part, 0, 5)
    data = task.corpus["test"]
    for row, start in enumerate(np.linspace(0, len(data) - 33, 5).astype(int)):
        window = data[start : start + 33]
        assert np.asarray(batch.tokens[row]).tolist() == window[:32].tolist()
        assert np.asarray(batch.label_positions[row]).tolist() == list(range(22, 32))
        assert np.asarray(batch.labels[row]).tolist() == window[23:].tolist()
    assert np.asarray(batch.weights).tolist() == [[1.0] * 10] * 5
    (validation,) = plain.slices("validation")
    batches = [which.eval_batch(named_key(0, "a"), "validation", validation, 0, 5) for which in (plain, task)]
    jax.tree.map(np.testing.assert_array_equal, *batches)


def test_one_file_is_split_by_position(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(256)) * 40)
    corpus = Text(TextConfig(path=str(path), seq_len=32, decode_len=4)).corpus
    assert [len(corpus[name]) for name in ("train", "validation", "test")] == [9216, 512, 512]


def test_the_standard_library_is_the_default_corpus():
    task = Text(TextConfig())
    assert len(task.corpus["train"]) > 1_000_000
    assert b"def " in bytes(task.corpus["test"])
    assert len(task.fingerprint()) == 64


def test_too_short_a_corpus_is_refused(tmp_path):
    (tmp_path / "small.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"task\.seq_len = 32: the validation split of .*small\.txt has 0 tokens"):
        _ = Text(TextConfig(path=str(tmp_path / "small.txt"), seq_len=32, decode_len=4)).corpus


def test_what_training_has_too_often_is_no_recall(tmp_path):
    """At every threshold that tells two bigrams apart, and at one that is a bigram's own count."""
    path = tmp_path / "letters.txt"
    path.write_bytes(np.random.default_rng(0).choice([97, 98, 99], 1200, p=[0.6, 0.3, 0.1]).astype(np.uint8).tobytes())
    config = TextConfig(path=str(path), seq_len=40, decode_len=4, num_test=3)
    task = Text(config)
    counts = Counter(pairwise(bytes(task.corpus["train"])))
    (part,) = task.slices("test")
    batch = task.eval_batch(named_key(0, "a"), "test", part, 0, 3)
    rows = [[*np.asarray(row).tolist(), int(last)] for row, last in zip(batch.tokens, batch.labels[:, -1], strict=True)]
    for most in (None, 0, *counts.values(), 10**6):
        found = Text(replace(config, max_bigram_count=most)).label_parts(batch)
        expected = [
            [pair in pairs[:place] and (most is None or counts[pair] <= most) for place, pair in enumerate(pairs)]
            for pairs in (list(pairwise(row)) for row in rows)
        ]
        np.testing.assert_array_equal(found["recall"], expected)
        np.testing.assert_array_equal(found["rest"], ~np.array(expected))
