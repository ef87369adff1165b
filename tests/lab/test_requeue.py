"""Jobs that a scheduler warns or preempts save, are queued again and come to what they would have come to."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvlab.lab.execute import execute
from kvlab.lab.record import Done
from kvlab.lab.runs import Run
from tests.lab import slurm
from tests.lab.small import SMALL, rows, small

LONG = ["train.num_steps=6000", "train.checkpoint_every=6000", "train.eval_every=6000"]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The parameters and rows of an uninterrupted run of each seed, by its id."""
    found = {}
    for seed in (0, 1):
        config = small(tmp_path_factory.mktemp("calm"), *LONG, f"seed={seed}")
        assert execute(config) == "done"
        found[seed] = config.run_id, Run(config).record.training.params_sha256, rows(config)
    return found


def sweep(folder, *words, **environment):
    """A sweep in a process of its own, the lines of which go to a file."""
    arguments = [*SMALL, *LONG, *words, f"results_dir={folder / 'results'}"]
    command = [sys.executable, "-m", "kvlab", "run", "-m", *arguments]
    with (folder / "said").open("w") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **environment})


def wait_for(found, seconds=120):
    """What a function gives, once it is something."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return value


def begun(config, num_rows=5):
    """The process that trains a run, once it has written some rows; None before."""
    path = config.training_dir / "metrics.jsonl"
    if not path.exists() or path.read_bytes().count(b"\n") < num_rows:
        return None
    return json.loads((config.training_dir / "status.json").read_text())["pid"]


def check(config, expected):
    """A run is done, the same and as if nothing had happened."""
    run_id, digest, all_rows = expected
    record = Run(config).record
    assert isinstance(record, Done), record
    assert (record.run_id, record.training.params_sha256) == (run_id, digest)
    assert rows(config) == all_rows


@pytest.mark.parametrize("timeout_min", [600, 5])
def test_a_warned_job_is_queued_again_and_goes_on(timeout_min, tmp_path, calm):
    """submitit's own executor: with 600 minutes it calls the warning a preemption, with 5 the end of the time."""
    config = small(tmp_path / "results", *LONG)
    process = sweep(tmp_path, "launcher=submitit_local", f"hydra.launcher.timeout_min={timeout_min}", "seed=0,1")
    pid = wait_for(lambda: begun(config))
    os.kill(pid, signal.SIGUSR2)
    wait_for(lambda: json.loads((config.training_dir / "status.json").read_text())["pid"] != pid)
    saved = [int(path.name) for path in (config.training_dir / "trials" / "0").iterdir() if path.name.isdigit()]
    assert 0 < max(saved) < 6000
    assert process.wait(200) == 0, (tmp_path / "said").read_text()
    check(config, calm[0])
    check(small(tmp_path / "results", *LONG, "seed=1"), calm[1])  # the other job was left alone
    out, err = (
        "".join(path.read_text() for path in (tmp_path / "results" / ".submitit").rglob(f"*_log.{kind}"))
        for kind in ("out", "err")
    )
    assert out.count("Requeued job") == 1
    assert f"this job is {'preempted' if timeout_min == 600 else 'timed-out'}" in out
    assert err.count("resumed at step") == 1


def test_slurm_requeues_what_it_warns_and_what_it_preempts(tmp_path, calm):
    """Two jobs of an array: one is warned by SIGUSR2, one is preempted by SIGTERM and killed. Neither stops the other,
    and the sweep ends well."""
    variables = slurm.install(tmp_path / "slurm")
    warned, preempted = (small(tmp_path / "results", *LONG, f"seed={seed}") for seed in (0, 1))
    process = sweep(tmp_path, "launcher=slurm", "seed=0,1", **variables)
    os.kill(wait_for(lambda: begun(warned)), signal.SIGUSR2)
    pid = wait_for(lambda: begun(preempted))
    slurm.preempt(tmp_path / "slurm", "7_1", grace_s=2)
    wait_for(lambda: json.loads((preempted.training_dir / "status.json").read_text())["pid"] != pid)
    assert process.wait(300) == 0, (tmp_path / "said").read_text()
    check(warned, calm[0])
    check(preempted, calm[1])
    logs = {path.name: path.read_text() for path in (tmp_path / "results" / ".submitit").rglob("*_log.*")}
    resumed = [text.split("resumed at step ")[1:] for name, text in sorted(logs.items()) if name.endswith(".err")]
    assert [len(each) for each in resumed] == [1, 1], logs
    assert all(0 < int(each[0].split()[0]) < 6000 for each in resumed)
