"""Runs that tests share: each is made once for all workers, and a test reads it or has a copy."""

import fcntl
import os
import shutil

import pytest

from kvlab.lab.execute import execute
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.provenance import provenance
from kvlab.lab.record import TrainingReport
from kvlab.lab.runs import Run
from kvlab.lab.trained import Trained, Training, point_to
from kvlab.training.checkpoint import tree_sha256
from tests.lab.small import MEASURED, small


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A function (name, make) that returns a folder which `make(folder)` has filled. Whichever worker comes first calls
    it, and the others wait. Nobody else writes there."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers

    def folder_of(name, make):
        folder, made = root / name, root / f"{name}.made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that died over it
                make(folder)
                made.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def finished_runs(made_once):
    """A folder of results in which the run `MEASURED` is done."""

    def make(folder):
        config = small(folder, *MEASURED)
        assert Run(config).state == "new"
        assert execute(config) == "done", Run(config).record

    return made_once("finished_runs", make)


@pytest.fixture
def results(finished_runs, tmp_path):
    """A copy of `finished_runs`, to write to."""
    return shutil.copytree(finished_runs, tmp_path / "results")


@pytest.fixture
def trained(results):
    """The same without its run: trained, and not yet evaluated."""
    shutil.rmtree(small(results, *MEASURED).run_dir)
    return results


@pytest.fixture
def finished(made_once, tmp_path):
    """A run whose training is finished with the parameters it began with: nothing was trained, which takes seconds."""

    def make(folder):
        config = small(folder)
        training, params = Training(config), Laboratory.of(config).model.params
        training.directory.mkdir(parents=True)
        report = TrainingReport(
            learning_rate=0.01,
            trials=[],
            num_steps=0,
            num_tokens=0,
            params_sha256=tree_sha256(params),
            data_sha256=None,
        )
        training.begin(0)
        training.finish(Trained(report, 0.5, 1.0), params, 1, 0)
        run = Run(config)
        run.directory.mkdir(parents=True)
        run.begin(provenance(config))
        point_to(training, run.directory)

    return small(shutil.copytree(made_once("untrained_runs", make), tmp_path / "results"))
