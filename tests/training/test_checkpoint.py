"""Checkpoints: exact, kept n at a time, and survivors of damage."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.files import write_json
from kvlab.training.checkpoint import CheckpointError, Checkpoints, truncate_jsonl

TREE = {"blocks": {0: {"kernel": jnp.arange(6.0).reshape(2, 3)}, 1: {"kernel": jnp.ones((1,), jnp.bfloat16)}}}


def saved(directory, steps, keep=3):
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        tree = {"blocks": {0: {"kernel": TREE["blocks"][0]["kernel"] + step}, 1: TREE["blocks"][1]}}
        checkpoints.save(step, tree, {"call": step})
    return checkpoints


def test_round_trip_bit_for_bit(tmp_path):
    checkpoints = saved(tmp_path, [4])
    step, tree, note = checkpoints.restore(TREE)
    assert (step, note) == (4, {"call": 4})
    np.testing.assert_array_equal(tree["blocks"][0]["kernel"], TREE["blocks"][0]["kernel"] + 4)
    assert tree["blocks"][1]["kernel"].dtype == jnp.bfloat16
    checkpoints.close()


def test_keeps_the_last_n(tmp_path):
    saved(tmp_path, [0, 4, 8, 12], keep=2).close()
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [8, 12]


def test_nothing_there_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    assert checkpoints.restore(TREE) is None
    checkpoints.close()


def damage(directory):
    """Truncates every data file of a checkpoint."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > 0]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def test_a_damaged_checkpoint_gives_way_to_the_previous_one(tmp_path):
    saved(tmp_path, [4, 8]).close()
    damage(tmp_path / "8")
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.warns(RuntimeWarning, match=r"damaged checkpoint skipped: .*8"):
        step, tree, _ = checkpoints.restore(TREE)
    assert step == 4
    np.testing.assert_array_equal(tree["blocks"][0]["kernel"], TREE["blocks"][0]["kernel"] + 4)
    checkpoints.save(8, tree, {"call": 8})  # the damaged number can be written again
    assert checkpoints.restore(TREE)[0] == 8
    checkpoints.close()


def test_only_damaged_checkpoints_is_a_named_error(tmp_path):
    saved(tmp_path, [4]).close()
    damage(tmp_path / "4")
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match=r"no readable checkpoint; .*4"):
        checkpoints.restore(TREE)
    checkpoints.close()


def test_truncating_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    truncate_jsonl(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    with pytest.raises(CheckpointError, match="2 rows, but the checkpoint was taken after 5"):
        truncate_jsonl(path, 5)


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "x.json", {"value": float("nan")})
    assert not (tmp_path / "x.json").exists()
