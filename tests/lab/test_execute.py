"""Whole runs: records, skipping, retrying, resuming bit for bit, stopping on request, refusing a second process."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

import kvlab
from kvlab.compose import compose
from kvlab.evaluation.score import Scorer
from kvlab.interrupt import StopRequest
from kvlab.lab import execute as executing
from kvlab.lab.compare import Scored
from kvlab.lab.execute import execute, load_params
from kvlab.lab.record import Done
from kvlab.lab.runs import Run, RunLocked
from kvlab.training.checkpoint import tree_sha256
from tests.lab.small import MEASURED, SMALL, TUNED, command, rows, small

FIELDS = {"schema", "run_id", "experiment", "status", "config", "seed", "num_params", "quality", "memory", "speed",
          "provenance", "wall_s"}  # fmt: skip


def test_a_run_leaves_a_complete_record(results):
    config = small(results, *MEASURED)
    record = Run(config).record
    assert isinstance(record, Done)
    assert set(json.loads((config.run_dir / "record.json").read_text())) >= FIELDS
    assert set(record.quality.slices) == {"16:2", "24:3"}
    assert record.quality.value == pytest.approx(record.quality.parallel_value, abs=0.1)
    memory, history = record.memory, 2 * 16 * 4
    # 4 sequences, 40 tokens, keys and values, 4 heads of 4, float32
    assert memory.logical_bytes == 4 * (40 * 2 * 4 * 4 * 4 + history)
    assert (memory.context_len, memory.batch_size) == (40, 4)
    assert record.speed.train_step_ms > 0
    assert record.speed.decode_tokens_per_s > 0
    assert record.provenance.implementations == {
        "flash_attention": "reference",
        "kv_write": "reference",
        "paged_attention": "blocked",
    }
    assert record.provenance.passed_over == {}
    assert record.training.implementations == {"flash_attention": "reference"}
    assert (record.training.training_id, record.training.trained_by) == (config.training_id, config.run_id)
    assert [trial["learning_rate"] for trial in record.training.trials] == [0.01, 0.001]
    best = max(record.training.trials, key=lambda trial: trial["validation"])
    assert record.training.learning_rate == best["learning_rate"]
    assert len(rows(config)) == 16  # two trials of eight calls
    assert tree_sha256(load_params(config)[1]) == record.training.params_sha256
    assert execute(config) == "skipped"
    frame = kvlab.load(results)
    assert len(frame) == 1
    assert frame["memory.logical_bytes"][0] == memory.logical_bytes


def test_the_dense_baseline_and_text_run_too(tmp_path):
    corpus = tmp_path / "book.txt"
    corpus.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 200)
    text = ["task=text", f"task.path={corpus}", "task.seq_len=24", "task.decode_len=5", "memory=dense"]
    keep = [override for override in SMALL if not override.startswith(("task.vocab", "task.train", "task.test"))]
    config = compose([*keep, f"results_dir={tmp_path}", *text, "model.num_layers=1", "model.dtype=bfloat16"])
    assert execute(config) == "done"
    record = Run(config).record
    assert record.quality.metric == "bits_per_byte"
    assert 2 < record.quality.value < 9
    assert record.training.data_sha256


def test_a_tuned_run_cut_in_its_second_trial_resumes(finished_runs, tmp_path, monkeypatch):
    """The first trial's rows and the second's survive; the result is that of an undisturbed run."""
    from kvlab.interrupt import Interrupted
    from kvlab.training.loop import TrainStep

    calm, cut = small(finished_runs, *MEASURED), small(tmp_path, *MEASURED)
    right, calls = TrainStep.__call__, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 8 + 5:  # the second trial has passed a checkpoint and written rows after it
            raise Interrupted("the test")
        return right(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    assert execute(cut) == "interrupted"
    monkeypatch.undo()
    assert execute(cut) == "done"
    assert rows(cut) == rows(calm)
    assert Run(cut).record.training.params_sha256 == Run(calm).record.training.params_sha256


@pytest.mark.parametrize("removed", ["trials", "metrics.jsonl"])
def test_what_somebody_removed_of_a_cut_training_is_made_again(finished_runs, tmp_path, monkeypatch, removed):
    """No row is lost, none doubled; where rows are gone the first command says so, and the next begins anew."""
    from kvlab.interrupt import Interrupted
    from kvlab.training.loop import TrainStep

    calm, cut = small(finished_runs, *MEASURED), small(tmp_path, *MEASURED)
    right, calls = TrainStep.__call__, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 8 + 5:
            raise Interrupted("the test")
        return right(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    assert execute(cut) == "interrupted"
    monkeypatch.undo()
    path = cut.training_dir / removed
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
        assert execute(cut) == "failed"
        assert "metrics.jsonl: 0 rows, but the checkpoint was taken after 8" in Run(cut).record.reason
    assert execute(cut) == "done"
    assert rows(cut) == rows(calm)


def test_a_failed_run_is_a_row_with_a_reason_and_is_retried(trained, monkeypatch):
    config = small(trained, *TUNED)

    def broken(*_, **__):
        raise RuntimeError("the memory is wrong")

    monkeypatch.setattr(executing, "measure_memory", broken)
    assert execute(config) == "failed"
    record = Run(config).record
    assert (record.status, record.reason) == ("failed", "RuntimeError: the memory is wrong")
    assert kvlab.load(trained)["reason"][0] == "RuntimeError: the memory is wrong"
    monkeypatch.undo()
    assert execute(config) == "done"


def test_disagreement_between_memory_and_parallel_form_fails_the_run(trained, monkeypatch):
    from kvlab.evaluation.score import Scorer

    right = Scorer.parallel

    def wrong(self, params, split, **options):
        from dataclasses import replace

        return tuple(
            replace(score, correct=score.correct + score.weight) for score in right(self, params, split, **options)
        )

    monkeypatch.setattr(Scorer, "parallel", wrong)
    config = small(trained, *TUNED)
    assert execute(config) == "failed"
    assert "they must agree within" in Run(config).record.reason


def test_a_nan_is_a_failure_with_step_and_leaf(tmp_path):
    config = small(tmp_path, "optimizer.learning_rate=10", "optimizer.clip_norm=null", "optimizer.eps=1e-30",
                   "optimizer.warmup_fraction=0", "model.dtype=bfloat16", "train.num_steps=400",
                   "optimizer.weight_decay=10", "train.eval_every=400", "train.checkpoint_every=400")  # fmt: skip
    assert execute(config) == "failed"
    reason = Run(config).record.reason
    assert reason.startswith("NotFinite: step ")
    assert "is not finite" in reason


def test_out_of_memory_names_the_culprit(trained, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(executing, "measure_memory", full)
    config = small(trained, *TUNED)
    assert execute(config) == "failed"
    reason = Run(config).record.reason
    assert reason.startswith("out of memory: the largest part is ")
    assert "would save about" in reason


def test_a_second_process_is_refused(trained):
    config = small(trained, *TUNED)
    config.run_dir.mkdir(parents=True)
    with (config.run_dir / "lock").open("a+") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunLocked, match="another process \\(pid 4711\\)"):
            execute(config)
    assert execute(config) == "done"


LONG = ["train.num_steps=96", "train.eval_every=16", "train.checkpoint_every=8"]


def _killed_and_resumed(tmp_path, num_kills, seed):
    """Kills the same command at random moments, then lets it finish; returns records of it and of an undisturbed
    run."""
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    began = time.monotonic()
    subprocess.run(command(calm, *LONG), check=True, capture_output=True)
    whole = time.monotonic() - began
    moments = random.Random(seed)
    kills = 0
    for _ in range(num_kills):
        process = subprocess.Popen(command(stormy, *LONG), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.3, 0.95) * whole)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(stormy, *LONG), check=True, capture_output=True)
    shared = small(stormy, *LONG, "memory=dense")  # another run of the training that was killed
    assert execute(shared) == "done"
    assert Run(shared).record.training == Run(small(stormy, *LONG)).record.training
    configs = [small(folder, *LONG) for folder in (calm, stormy)]
    return kills, [Run(config).record for config in configs], [rows(config) for config in configs]


@pytest.mark.parametrize("num_kills", [1, 5])
def test_kill_9_and_resume_is_bit_for_bit(tmp_path, num_kills):
    kills, (calm, stormy), (calm_rows, stormy_rows) = _killed_and_resumed(tmp_path, num_kills, seed=num_kills)
    assert kills >= 1
    assert stormy.training.params_sha256 == calm.training.params_sha256
    assert stormy.quality.value == calm.quality.value
    assert stormy_rows == calm_rows  # no row lost, none doubled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_polite_stop_saves_and_resumes(tmp_path, number):
    config = small(tmp_path, "train.num_steps=20000", "train.checkpoint_every=20000", "train.eval_every=20000")
    arguments = ["train.num_steps=20000", "train.checkpoint_every=20000", "train.eval_every=20000"]
    process = subprocess.Popen(command(tmp_path, *arguments), stderr=subprocess.PIPE, text=True)
    metrics = config.training_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while (not metrics.exists() or len(metrics.read_text().splitlines()) < 5) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert Run(config).state == "cut"
    status = json.loads((config.run_dir / "status.json").read_text())
    assert status["status"] == "interrupted"
    assert status["reason"] == f"stopped by {signal.Signals(number).name}; the same command resumes"
    saved = [int(path.name) for path in (config.training_dir / "trials" / "0").iterdir() if path.name.isdigit()]
    assert max(saved) == rows(config)[-1]["step"]


def test_a_stop_while_a_run_is_evaluated_leaves_before_the_next_batch(trained, monkeypatch):
    config, asked, through_memory = small(trained, *MEASURED), [], Scorer.through_memory

    def asking(self, *given, **named):
        asked.append("a test")
        return through_memory(self, *given, **named)

    monkeypatch.setattr(Scorer, "through_memory", asking)
    monkeypatch.setattr(Scorer, "_score_batch", lambda *given: pytest.fail("a batch was scored"))
    monkeypatch.setattr(StopRequest, "reason", property(lambda self: asked[0] if asked else None))
    assert execute(config) == "interrupted"
    assert Run(config).state == "cut"


def test_a_read_only_folder_is_an_error_not_a_loss(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        execute(small(tmp_path / "results"))


def test_a_record_of_a_run_knows_where_its_scores_by_example_are(finished_runs):
    """As one that is read from a folder of results does: the table behind a sweep has flips."""
    config = small(finished_runs, *MEASURED)
    record = Run(config).record
    assert record.directory == str(config.run_dir)
    assert Scored.of(record).examples
