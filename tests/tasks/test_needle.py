"""The needle is where it should be, the labels are its digits, and a grid cell is one context and one depth."""

import jax
import numpy as np
import pytest

from kvlab.schema import ConfigError
from kvlab.tasks.needle import Needle, NeedleConfig


def test_every_example_hides_its_answer_once_at_its_depth(tmp_path):
    path = tmp_path / "hay.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 20_000, dtype=np.uint8)))
    config = NeedleConfig(contexts=(80, 200), depths=(0, 50, 100), path=str(path), num_test=5)
    task = Needle(config)
    slices = task.slices("test")
    assert [eval_slice.name for eval_slice in slices] == ["80@0", "80@50", "80@100", "200@0", "200@50", "200@100"]
    for eval_slice in slices:
        batch = task.eval_batch(jax.random.key(0), "test", eval_slice, 0, 5)
        rows = [bytes(row.tolist()).decode() for row in np.asarray(batch.tokens)]
        assert len(set(rows)) == 5
        for row, places, labels in zip(rows, np.asarray(batch.label_positions), np.asarray(batch.labels), strict=True):
            number = bytes(labels.tolist()).decode()
            assert number.isdigit()
            assert len(number) == 4
            assert len(row) == eval_slice.seq_len
            assert row.endswith("\nThe magic number is " + number)
            needle = "\nThe magic number is " + number + ".\n"
            body = row[: -len(needle) + 2]
            assert body.count(needle) == 1
            assert abs(body.index(needle) - (len(body) - len(needle)) * eval_slice.knob / 100) < 1
            assert all(row[place + 1] == digit for place, digit in zip(places.tolist(), number, strict=True))
        again = task.eval_batch(jax.random.key(0), "test", eval_slice, 3, 2)
        np.testing.assert_array_equal(again.tokens, batch.tokens[3:5])


@pytest.mark.parametrize("query_aware", [False, True])
def test_a_memory_compresses_before_the_question_or_behind_it(tmp_path, query_aware):
    path = tmp_path / "hay.txt"
    path.write_bytes(b"word " * 4000)
    task = Needle(NeedleConfig(contexts=(100,), depths=(20,), path=str(path), query_aware=query_aware))
    (part,) = task.slices("test")
    row = bytes(np.asarray(task.eval_batch(jax.random.key(0), "test", part, 0, 1).tokens)[0].tolist()).decode()
    asked = row.rindex("\nThe magic number is ")
    assert row[: part.prompt_len] == row[:asked] + "\nThe magic number is "
    assert part.compress_at == (part.prompt_len - 1 if query_aware else asked)


def test_wrong_grids_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="contexts = 40: must be at least 52"):
        NeedleConfig(contexts=(40, 200))
    with pytest.raises(ConfigError, match="must not name a value twice"):
        NeedleConfig(depths=(0, 0))
    with pytest.raises(ConfigError, match="tokenizer"):
        NeedleConfig(tokenizer=str(tmp_path / "none.json"))
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 900)
    with pytest.raises(ConfigError, match="must exceed every context"):
        _ = Needle(NeedleConfig(contexts=(300,), path=str(path))).haystack
