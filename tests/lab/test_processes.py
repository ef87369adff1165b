"""Commands that run at once, as processes of their own: all of them succeed, and what they leave is whole."""

import csv
import io
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from kvlab.files import locked
from kvlab.lab import launch
from kvlab.lab.report import write_report
from kvlab.lab.results import read_records
from kvlab.lab.runs import Run
from tests.lab.small import command, small


def at_once(commands):
    """Runs commands together; returns what each said on standard error. All must end with status 0."""
    started = [
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for words in commands
    ]
    said = [process.communicate(timeout=550)[1] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), said
    return said


def test_six_reports_at_once_leave_the_files_of_one(results, tmp_path):
    alone = {path.name: path.read_bytes() for path in write_report(results, tmp_path / "alone")}
    output = tmp_path / "together"
    at_once([[sys.executable, "-m", "kvlab", "report", str(results), "--output", str(output)]] * 6)
    found = {path.name: path.read_bytes() for path in output.iterdir()}
    assert found == alone, "the same bytes, and nothing beside them"
    assert found["report.html"].rstrip().endswith(b"</html>")
    assert found["frontier.pdf"].rstrip().endswith(b"%%EOF")
    Image.open(io.BytesIO(found["frontier.png"])).load()
    (row,) = csv.DictReader(io.StringIO(found["frontier.csv"].decode()))
    assert float(row["value"]) == read_records(results)[0].quality.value


def test_four_equal_sweeps_at_once_do_each_run_once(tmp_path):
    words = [*command(tmp_path, "mixer=mha,mqa"), "-m"]
    said = at_once([words] * 4)
    records = read_records(tmp_path)
    assert [record.status for record in records] == ["done"] * 2
    assert sum(line.count("] done, in ") for line in said) == 2, "each run is one process' work"
    assert len(list(tmp_path.rglob("params"))) == 2
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp" or path.name.startswith(".stop")]
    assert all(Run(small(tmp_path, f"mixer={name}")).record in records for name in ("mha", "mqa"))


@pytest.mark.parametrize("left", ["done", "cut"])
def test_a_sweep_waits_for_a_run_that_another_works_on_and_goes_on_with_what_that_leaves(
    left, tmp_path, monkeypatch, capsys
):
    config, executed, is_held = small(tmp_path), [], threading.Event()
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").touch()

    def works():
        with locked(config.run_dir / "lock"):
            is_held.set()
            time.sleep(0.3)
            monkeypatch.setattr(Run, "state", left)

    def goes_on(config):
        executed.append(config)
        monkeypatch.setattr(Run, "state", "done")
        return "done"

    monkeypatch.setattr(launch, "POLL_S", 0.01)
    monkeypatch.setattr(launch, "through_hydra", lambda words: None)
    monkeypatch.setattr(launch, "execute_one", goes_on)
    thread = threading.Thread(target=works)
    thread.start()
    is_held.wait()
    assert launch.run_sweep([config], []) == ["done"]
    thread.join()
    assert executed == ([] if left == "done" else [config])
    assert "is another process' work" in capsys.readouterr().err
