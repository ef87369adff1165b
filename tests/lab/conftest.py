"""One trained run for all tests that only need it done: each has a copy, or reads the original."""

import fcntl
import os
import shutil

import pytest

from kvlab.lab.execute import execute
from kvlab.lab.runs import Run
from tests.lab.small import MEASURED, small


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory):
    """A folder of results in which the run `MEASURED` is done. Whichever worker comes first makes it, and the others
    wait. Nobody writes to it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers
    folder, made = root / "finished_runs", root / "finished_runs.made"
    with (root / "finished_runs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that died over it
            config = small(folder, *MEASURED)
            assert Run(config).state == "new"
            assert execute(config) == "done", Run(config).record
            made.touch()
    return folder


@pytest.fixture
def results(finished_runs, tmp_path):
    """A copy of `finished_runs`, to write to."""
    return shutil.copytree(finished_runs, tmp_path / "results")


@pytest.fixture
def trained(results):
    """The same without its run: trained, and not yet evaluated."""
    shutil.rmtree(small(results, *MEASURED).run_dir)
    return results
