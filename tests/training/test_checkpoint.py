"""Checkpoints: exact, kept n at a time, and survivors of damage."""

import gc
import random
import shutil
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kvlab.files import write_json
from kvlab.training.checkpoint import CheckpointError, Checkpoints, tree_sha256, truncate_jsonl

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


def flipped(directory, part, num_flips, rng):
    """Copies of a folder with one bit flipped, `num_flips` in each file of a part of it: the path and the offset."""
    for path in sorted(path for path in (directory / part).rglob("*") if path.is_file() and path.stat().st_size):
        whole = path.read_bytes()
        for offset in rng.sample(range(len(whole)), min(num_flips, len(whole))):
            copy = directory.with_name("flipped")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(directory, copy)
            damaged = bytearray(whole)
            damaged[offset] ^= 1 << rng.randrange(8)
            place = path.relative_to(directory)
            (copy / place).write_bytes(damaged)
            yield copy, f"{place} at {offset}"


NOISE = {"kernel": np.random.default_rng(0).normal(size=(16, 33)).astype(np.float32), "step": np.int32(0)}


def what_comes_back(num_flips, tmp_path):
    """Of each flip of a bit in the newer of two checkpoints, the step that is restored, all of it being right."""
    made = tmp_path / "made"
    checkpoints = Checkpoints(made, 3)
    trees = {step: {"kernel": jnp.asarray(NOISE["kernel"] * step), "step": jnp.int32(step)} for step in (4, 8)}
    for step, tree in trees.items():
        checkpoints.save(step, tree, {"call": step, "best": 0.125, "finished": False})
    checkpoints.close()
    for copy, place in flipped(made, "8", num_flips, random.Random(0)):
        checkpoints = Checkpoints(copy, 3)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step, tree, note = checkpoints.restore(NOISE)
        checkpoints.close()
        assert note == {"call": step, "best": 0.125, "finished": False}, place
        jax.tree.map(np.testing.assert_array_equal, tree, trees[step])
        skipped = [str(each.message) for each in said if "damaged checkpoint" in str(each.message)]
        assert len(skipped) == (step == 4), place
        assert all(f"{copy / '8'}: " in each and f"{copy / '4'} is used" in each for each in skipped)
        yield step


CANCELLED = "ignore::pytest.PytestUnraisableExceptionWarning"
"""Orbax leaves coroutines behind where a read fails."""


@pytest.fixture
def complaints_end_here():
    """They complain when they are collected, which the next test should not hear."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous, sys.unraisablehook = sys.unraisablehook, lambda _: None
        for _ in range(3):  # the storage's own threads let go a little later
            gc.collect()
            time.sleep(0.05)
        sys.unraisablehook = previous


@pytest.mark.filterwarnings(CANCELLED)
@pytest.mark.usefixtures("complaints_end_here")
def test_a_flipped_bit_is_found_and_the_previous_checkpoint_used(tmp_path):
    assert set(what_comes_back(3, tmp_path)) == {4, 8}  # 8: of what says when it was written


@pytest.mark.slow
@pytest.mark.filterwarnings(CANCELLED)
@pytest.mark.usefixtures("complaints_end_here")
def test_a_flipped_bit_anywhere_is_found(tmp_path):
    assert set(what_comes_back(100, tmp_path)) == {4, 8}


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"call": 8}, "version 1 of the format; this kvlab reads version 2"),
        ({"format": 3, "sha256": "", "note": {"call": 8}}, "version 3 of the format; this kvlab reads version 2"),
    ],
)
def test_another_version_of_the_format_is_named(tmp_path, stated, said):
    saved(tmp_path, [4]).close()
    manager = ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False))
    manager.save(8, args=ocp.args.Composite(tree=ocp.args.StandardSave(TREE), note=ocp.args.JsonSave(stated)))
    manager.close()
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.warns(RuntimeWarning, match=f"{tmp_path / '8'}: is of {said}; {tmp_path / '4'} is used"):
        assert checkpoints.restore(TREE)[0] == 4
    checkpoints.close()


def test_a_tree_that_the_caller_knows_is_of_any_version(tmp_path):
    """Final parameters: their digest stands in the record."""
    manager = ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False))
    manager.save(0, args=ocp.args.Composite(tree=ocp.args.StandardSave(TREE), note=ocp.args.JsonSave({})))
    manager.close()
    checkpoints = Checkpoints(tmp_path, 1)
    assert checkpoints.restore(TREE, tree_sha256(TREE))[0] == 0
    with pytest.raises(CheckpointError, match="its arrays are not those that were saved"):
        checkpoints.restore(TREE, "0" * 64)
    checkpoints.close()


def test_only_damaged_checkpoints_is_a_named_error(tmp_path):
    saved(tmp_path, [4]).close()
    damage(tmp_path / "4")
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"no readable checkpoint; .*4"):
        checkpoints.restore(TREE)
    checkpoints.close()


def test_truncating_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    truncate_jsonl(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    with pytest.raises(CheckpointError, match="2 rows, but the checkpoint was taken after 5"):
        truncate_jsonl(path, 5)


@pytest.mark.parametrize("row", [b'{"step": \xff2}\n', b"\n", b'{"step": 2\n'])
def test_a_damaged_row_is_named(tmp_path, row):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + row + b'{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: row 2 is damaged"):
        truncate_jsonl(path, 3)
    truncate_jsonl(path, 1)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "x.json", {"value": float("nan")})
    assert not (tmp_path / "x.json").exists()
