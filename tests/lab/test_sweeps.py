"""A sweep goes on: one run that cannot be recorded, one worker that dies or one rate that diverges stops no other."""

import json

import pytest

from kvlab.files import locked
from kvlab.interrupt import StopRequest
from kvlab.lab import launch, plan, trials
from kvlab.lab.execute import execute
from kvlab.lab.launch import execute_one, run_sweep
from kvlab.lab.runs import Run
from kvlab.lab.trained import Trained, Training
from kvlab.training.checkpoint import CheckpointError
from kvlab.training.trial import NotFinite
from tests.lab.small import MEASURED, TUNED, rows, small


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_run_that_cannot_be_recorded_is_said_and_not_left_running(tmp_path, monkeypatch, capsys):
    config = small(tmp_path)
    config.run_dir.mkdir(parents=True)
    Run(config).say("running")
    monkeypatch.setattr(launch, "execute", full)
    monkeypatch.setattr(Run, "say", full)
    assert execute_one(config) == "failed"
    assert "failed: OSError: [Errno 28] No space left on device; there is no room" in capsys.readouterr().err
    assert not (config.run_dir / "status.json").exists()


def test_a_full_disk_is_the_reason_of_a_run(finished, monkeypatch, capsys):
    from kvlab.lab import runs

    def full_for_records(path, value):
        full()

    monkeypatch.setattr(runs, "write_json", full_for_records)
    assert execute_one(finished) == "failed"
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: 9 bytes")])
def test_memory_may_end_while_its_end_is_explained(tmp_path, monkeypatch, error):
    def exhausted(config):
        raise MemoryError

    monkeypatch.setattr(plan, "explain_out_of_memory", exhausted)
    reason = plan.explain_failure(small(tmp_path), error)
    said = f"RuntimeError: {error}" if str(error) else "MemoryError"
    assert reason == f"out of memory: the largest part could not be found (MemoryError) ({said})"


def test_a_reason_is_not_a_megabyte(tmp_path):
    reason = plan.explain_failure(small(tmp_path), RuntimeError("x" * 1_000_000))
    assert len(reason) < 2000
    assert reason.endswith("... (all of it: traceback.txt)")


def test_a_launcher_that_gives_up_leaves_nothing_untried(tmp_path, monkeypatch, capsys):
    """One run is done, one was cut by the death of its worker, two were never begun."""
    configs, tried = [small(tmp_path, f"seed={seed}") for seed in range(4)], []

    def gives_up(arguments):
        for config in configs[:2]:
            config.run_dir.mkdir(parents=True)
            (config.run_dir / "config.yaml").write_text("")
        done.add(configs[0].run_dir)
        raise RuntimeError("a worker died\nand so on")

    done = set()
    monkeypatch.setattr(Run, "state", property(lambda run: "done" if run.directory in done else state(run)))
    state = lambda run: "cut" if (run.directory / "config.yaml").exists() else "new"  # noqa: E731

    def executed(config, beside=(), trains=True):
        tried.append(config.seed)
        if config.seed == 2:
            raise OSError(28, "No space left on device")
        done.add(config.run_dir)
        return "done"

    monkeypatch.setattr(launch, "through_hydra", gives_up)
    monkeypatch.setattr(launch, "execute", executed)
    assert run_sweep(configs, []) == ["done", "done", "failed", "done"]
    assert tried == [2, 3, 1]
    said = capsys.readouterr().err
    assert "the launcher gave up: RuntimeError: a worker died and so on; 3 runs that it left: here" in said
    assert not list(tmp_path.glob(".stop*"))


def test_a_launcher_of_a_cluster_that_gives_up_is_not_taken_over(tmp_path, monkeypatch, capsys):
    def gives_up(arguments):
        raise RuntimeError('Could not detect "srun"')

    monkeypatch.setattr(launch, "through_hydra", gives_up)
    configs = [small(tmp_path, f"seed={seed}") for seed in range(2)]
    assert run_sweep(configs, ["launcher=slurm"]) == ["failed", "failed"]
    assert 'gave up: RuntimeError: Could not detect "srun"; the same command' in capsys.readouterr().err


def test_what_is_done_is_done_whoever_looks_at_it(results):
    """A lock that another sweep holds for a moment makes no run unfinished; a finished folder need not be writable."""
    config = small(results, *MEASURED)
    with locked(config.run_dir / "lock"):
        assert launch._status(Run(config), StopRequest()) == "done"
        assert execute(config) == "skipped"


def test_a_rate_that_diverges_is_noted_and_the_others_are_tried(tmp_path, monkeypatch):
    config, right = small(tmp_path, *TUNED), trials.train

    def diverging(*arguments, **options):
        if options["learning_rate"] == 0.01:
            raise NotFinite("step 3: loss is not finite")
        return right(*arguments, **options)

    monkeypatch.setattr(trials, "train", diverging)
    options = {"num_trials": 2}
    training = Training(config)
    training.directory.mkdir(parents=True)
    training.trial(0)[1].touch()  # as a trial that diverges in its first call leaves it
    with pytest.warns(RuntimeWarning, match=r"learning rate 0\.01 diverged: step 3"):
        assert execute(config) == "done", options
    record = Run(config).record
    assert record.training.learning_rate == 0.001
    assert [trial["learning_rate"] for trial in record.training.trials] == [0.001]
    assert record.training.diverged == {"0.01": "step 3: loss is not finite"}
    assert len(rows(config)) == 8


def test_rows_that_were_removed_while_they_were_written_are_missed(finished):
    training = Training(finished)
    done = training.done
    like = {"kernel": 1.0}
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: was removed while the training wrote it"):
        training.finish(Trained(done.report, 0.5, 1.0), like, 1, 1)
    assert json.loads((training.directory / "status.json").read_text())["status"] == "done"
