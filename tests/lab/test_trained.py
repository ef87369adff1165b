"""Train once, evaluate many: which runs share parameters, who trains, who waits, and what a failure means for the
others."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.cli import main
from kvlab.compose import compose
from kvlab.files import locked
from kvlab.interrupt import Interrupted, StopRequest
from kvlab.lab import execute as executing
from kvlab.lab import trials
from kvlab.lab.execute import execute, load_params
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.results import read_metrics, read_records
from kvlab.lab.runs import Run
from kvlab.lab.trained import Training, TrainingStatus, save_params, training_directory
from kvlab.training.checkpoint import CheckpointError, tree_sha256
from tests.lab.small import FIRST_RECIPE, MEASURED, TUNED, command, rows, small


@pytest.fixture
def trainings(monkeypatch):
    """The labels of the trials that were trained in this process."""
    labels, right = [], trials.train

    def counted(*arguments, **options):
        labels.append(options["label"])
        return right(*arguments, **options)

    monkeypatch.setattr(trials, "train", counted)
    return labels


def test_runs_that_differ_in_evaluation_only_train_once(results, tmp_path, trainings):
    others = [*TUNED, "memory=dense", "task.num_test=5", "measure.context_len=30"]
    first, second = small(results, *MEASURED), small(results, *others)
    assert [execute(config) for config in (first, second)] == ["skipped", "done"]
    assert not trainings
    records = [Run(config).record for config in (first, second)]
    assert records[0].training == records[1].training
    assert records[1].training.trained_by == first.run_id
    assert len(list(results.rglob("params"))) == 1  # one copy on disk
    assert not list(results.rglob("trials"))
    assert tree_sha256(load_params(second)[1]) == records[1].training.params_sha256
    assert [read_metrics(record) for record in read_records(results)] == [rows(first)] * 2

    alone = small(tmp_path / "alone", *others)
    assert execute(alone) == "done"
    assert len(trainings) == 2  # trials of the same training
    record = Run(alone).record
    assert record.quality == records[1].quality
    assert record.training.params_sha256 == records[1].training.params_sha256
    taken = records[1].provenance.implementations
    assert record.provenance.implementations == taken, "what an earlier run compiled does not hide what ran"


@pytest.mark.parametrize(
    "overrides",
    [
        ["memory=dense"],
        ["memory.page_size=8"],
        ["measure.context_len=40"],
        ["measure.decode_steps=2"],
        ["task.num_test=5"],
    ],
)
def test_what_only_evaluates_is_another_run_of_the_same_training(tmp_path, overrides):
    base, other = small(tmp_path), small(tmp_path, *overrides)
    assert other.training_id == base.training_id
    assert other.run_id != base.run_id


@pytest.mark.parametrize(
    "overrides",
    [["seed=1"], ["optimizer.eps=1e-7"], ["task.num_validation=5"], ["train.eval_every=16"], ["mixer=mqa"],
     ["model.mlp_dim=8"], ["tune.learning_rate=[0.1]"], ["measure.batch_size=2"]],
)  # fmt: skip
def test_what_training_depends_on_is_another_training(tmp_path, overrides):
    assert small(tmp_path, *overrides).training_id != small(tmp_path).training_id


def test_the_identity_of_a_run_is_what_it_was():
    """The hashes of runs that lie in folders since version 0.1.0."""
    assert compose(FIRST_RECIPE).run_id == "539e25bf8c"
    assert compose([*FIRST_RECIPE, "memory=dense", "mixer=mamba2"]).run_id == "a2df1ee423"


def test_a_failed_training_is_recorded_in_each_run_and_tried_once_a_command(tmp_path, monkeypatch, trainings):
    configs = [small(tmp_path), small(tmp_path, "memory=dense")]
    counted = trials.train

    def broken(*arguments, **options):
        counted(*arguments, **options)
        raise RuntimeError("the loss is wrong")

    monkeypatch.setattr(trials, "train", broken)
    for number in (1, 2):  # the command, and the same command again
        assert [execute(config) for config in configs] == ["failed", "failed"]
        assert len(trainings) == number
        first, second = (Run(config).record for config in configs)
        assert first.reason == "RuntimeError: the loss is wrong"
        assert second.reason.startswith("RuntimeError: the loss is wrong (in the shared training ")
        assert first.training.attempt == second.training.attempt == number
    monkeypatch.setattr(trials, "train", counted)
    assert [execute(config) for config in configs] == ["done", "done"]


def test_an_interrupted_retry_still_knows_which_failure_it_tries_again(tmp_path, monkeypatch):
    config, tried = small(tmp_path), []

    def broken(*_, **__):
        tried.append(1)
        raise RuntimeError("the loss is wrong")

    def interrupted(*_, **__):
        raise Interrupted("the test")

    monkeypatch.setattr(trials, "train", broken)
    assert execute(config) == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(executing, "obtain", interrupted)  # before it reaches its training
        assert [execute(config), execute(config)] == ["interrupted"] * 2
    assert execute(config) == "failed"
    assert len(tried) == Run(config).record.training.attempt == 2


def _truncate(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def _replace(folder):
    like = Laboratory.of(small(folder.parents[3])).model.params
    save_params(folder, jax.tree.map(lambda leaf: leaf + 1, like))


def _state_badly(folder):
    folder.with_name("trained.json").write_text('{"report": ')


@pytest.mark.filterwarnings("ignore:damaged checkpoint:RuntimeWarning")
@pytest.mark.parametrize("damage", [_truncate, _replace, _state_badly])
def test_damaged_parameters_are_trained_again(results, trainings, damage):
    config, other = small(results, *MEASURED), small(results, *TUNED, "memory=dense")
    damage(config.training_dir / "params")
    with pytest.raises(CheckpointError):
        load_params(config)
    with pytest.warns(RuntimeWarning, match="trained again"):
        assert execute(other) == "done"
    assert len(trainings) == 2  # both trials
    assert Run(other).record.training.params_sha256 == Run(config).record.training.params_sha256


def test_parameters_are_those_that_were_trained(finished, monkeypatch, capsys):
    digest = Training(finished).done.report.params_sha256
    assert tree_sha256(load_params(finished)[1]) == digest
    like = Laboratory.of(finished).model.params
    first, *others = jax.tree.leaves(like)
    flipped = np.asarray(first).copy()
    flipped.view(np.uint8).flat[0] ^= 1  # one bit of all of them
    changed = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(flipped), *others])
    save_params(finished.training_dir / "params", changed)
    with pytest.raises(CheckpointError, match="not the parameters that were trained"):
        load_params(finished)
    monkeypatch.setattr(sys, "argv", ["kvlab", "generate", str(finished.run_dir), "--prompt", "1"])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kvlab: {finished.training_dir / 'params'}: not the parameters that were trained: ")


def test_a_flipped_bit_of_a_statement_is_found(finished):
    """Where the parameters are, and what validation they had."""
    for folder, read in (
        (finished.training_dir, lambda: Training(finished).done),
        (finished.run_dir, lambda: training_directory(finished.run_dir)),
    ):
        path = folder / "trained.json"
        whole, right = path.read_bytes(), read()
        for place in random.Random(0).sample(range(8 * len(whole)), 300):
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            path.write_bytes(damaged)
            with contextlib.suppress(CheckpointError):
                assert read() == right, place
        path.write_bytes(whole)


def test_a_training_is_no_run(finished, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kvlab", "generate", str(finished.training_dir), "--prompt", "1"])
    assert main() == 2
    assert "this is a training; give a run's folder" in capsys.readouterr().err


def test_damaged_statements_are_named(finished):
    training = Training(finished)
    for text in ('{"status": "fai', "[1]", '{"attempt": "no number"}'):
        (training.directory / "status.json").write_text(text)
        with pytest.warns(RuntimeWarning, match=r"status\.json is damaged: .*; taken as new"):
            assert training.status == TrainingStatus("new", 0, "")
    (training.directory / "trained.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"trained\.json is damaged: report: Field required"):
        load_params(finished)
    (finished.run_dir / "trained.json").write_text("")
    with pytest.raises(CheckpointError, match=r"trained\.json is damaged"):
        training_directory(finished.run_dir)
    with pytest.warns(RuntimeWarning, match="its metrics are left out"):
        assert read_metrics(read_records(finished.run_dir)[0]) == []


def test_a_waiting_run_says_for_whom_and_can_be_stopped(tmp_path):
    training, said, checks = Training(small(tmp_path)), [], []

    class Stop(StopRequest):
        def check(self):
            checks.append(1)
            if len(checks) == 3:
                raise Interrupted("the test")

    with locked(training.directory / "lock"), pytest.raises(Interrupted), training.locked(Stop(), said.append):
        raise AssertionError
    assert said == [str(os.getpid())]
    with training.locked(StopRequest(), said.append):
        assert len(said) == 1


def test_a_folder_moved_as_a_whole_and_one_from_before_are_read(results, tmp_path):
    config = small(results, *MEASURED)
    digest = Run(config).record.training.params_sha256
    results.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / config.experiment / config.run_id
    assert tree_sha256(load_params(config, moved)[1]) == digest
    (moved / "trained.json").unlink()  # as runs were: parameters and metrics in the run's own folder
    trained = tmp_path / "moved" / config.experiment / "trained" / config.training_id
    for name in ("params", "metrics.jsonl"):
        shutil.move(trained / name, moved / name)
    assert tree_sha256(load_params(config, moved)[1]) == digest
    assert len(read_metrics(read_records(tmp_path / "moved")[0])) == 16
    like = Laboratory.of(config).model.params
    save_params(moved / "params", jax.tree.map(lambda leaf: leaf + 1, like))
    with pytest.raises(CheckpointError, match="not the parameters that were trained"):
        load_params(config, moved)
    shutil.rmtree(moved / "params")
    with pytest.raises(FileNotFoundError, match="there are no final parameters"):
        load_params(config, moved)


def _until(condition, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_waiting_process_takes_over_from_one_that_is_killed(tmp_path):
    """The first trains and is killed; the second waited for it, resumes from its checkpoint, and ends as an undisturbed
    run."""
    steps = ["train.num_steps=2000", "train.eval_every=500", "train.checkpoint_every=20"]
    calm, first = small(tmp_path / "calm", *steps), small(tmp_path / "storm", *steps)
    second = small(tmp_path / "storm", *steps, "memory=dense")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    trainer = subprocess.Popen(
        command(tmp_path / "storm", *steps), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = first.training_dir / "metrics.jsonl"
    _until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 30, trainer)
    trainer.send_signal(signal.SIGSTOP)  # it holds the training and gets no further
    other = subprocess.Popen(command(tmp_path / "storm", *steps, "memory=dense"), **quiet)
    status = second.run_dir / "status.json"
    _until(lambda: status.exists() and json.loads(status.read_text())["status"] == "waiting", other)
    trainer.kill()
    trainer.wait()
    _, errors = other.communicate(timeout=300)
    assert other.returncode == 0, errors
    assert f"waits for process {trainer.pid}" in errors
    assert "resumed at step" in errors
    again = subprocess.run(command(tmp_path / "storm", *steps), check=True, capture_output=True, text=True)
    assert "resumed" not in again.stderr
    assert execute(calm) == "done"
    records = [Run(config).record for config in (calm, first, second)]
    assert {record.training.params_sha256 for record in records} == {records[0].training.params_sha256}
    assert records[1].training.trained_by == second.run_id
    assert records[1].quality == records[0].quality
    assert rows(first) == rows(calm)
