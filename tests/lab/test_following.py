"""Trackers are told every row once, live, whatever happens in between; what goes wrong with them costs no run."""

import contextlib
import importlib.util
import json
import sqlite3
import struct
import time
from dataclasses import replace

import pytest

from kvlab.compose import compose
from kvlab.config import TRACKERS, Config
from kvlab.evaluation.score import Scorer
from kvlab.interrupt import Interrupted
from kvlab.lab import trackers
from kvlab.lab.execute import execute
from kvlab.lab.following import Follower, followed
from kvlab.lab.results import read_records
from kvlab.lab.runs import Run
from kvlab.lab.track import to_tensorboard
from kvlab.lab.trackers import check_installed, name_of, summary_of, values_of
from kvlab.schema import ConfigError
from tests.lab.small import MEASURED, TUNED, rows, small


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self, watched):
        self.watched, self.rows, self.ends = watched, [], []

    def log(self, values, step_name, step, number):
        self.rows.append((dict(values), step_name, step, number))

    def finish(self, summary, step, *, is_done):
        self.ends.append((dict(summary), step, is_done))


@pytest.fixture
def recorders(monkeypatch):
    """All recorders that were opened in the place of wandb."""
    opened = []

    def opener(watched):
        opened.append(Recorder(watched))
        return opened[-1]

    monkeypatch.setitem(trackers.OPENERS, "wandb", opener)
    return opened


def row(step, rate=0.01, **fields):
    return {"learning_rate": rate, "step": step, "loss": 1 / step, **fields}


def follower_of(config, opener):
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return Follower(config, opener)


def test_who_watches_is_no_part_of_a_run(tmp_path):
    plain, watched = small(tmp_path), small(tmp_path, "track=trackio")
    assert watched.track == "trackio"
    assert (watched.run_id, watched.training_id) == (plain.run_id, plain.training_id)
    assert watched.as_dict() == plain.as_dict()
    assert Config.build(plain.as_dict()).track == "none"
    with pytest.raises(ConfigError, match=r"track = 'visdom': must be one of none, tensorboard, wandb, trackio"):
        compose(["track=visdom"])


@pytest.mark.parametrize("track", TRACKERS)
def test_one_that_is_not_installed_names_its_extra(track, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    extra = "track" if track == "tensorboard" else track
    with pytest.raises(ImportError, match=rf"track={track} needs the extra: pip install 'kvlab\[{extra}\]'"):
        check_installed([compose([]), compose([f"track={track}"])])
    check_installed([compose([])])


def test_one_that_is_not_installed_stops_a_command_before_it_begins(tmp_path, monkeypatch, capsys):
    from kvlab import cli

    monkeypatch.setitem(trackers.MODULES, "wandb", ("no_such_module", "wandb"))
    words = ["kvlab", "run", "-m", "track=wandb", "seed=0,1", f"results_dir={tmp_path / 'results'}"]
    monkeypatch.setattr("sys.argv", words)
    assert cli.main() == 2
    assert capsys.readouterr().err == "kvlab: track=wandb needs the extra: pip install 'kvlab[wandb]'\n"
    assert not (tmp_path / "results").exists()


def test_rows_have_a_prefix_where_there_are_several_trials():
    written = row(4, 0.001, validation=0.5, tokens=64)
    assert values_of(written, tuned=False) == ({"loss": 0.25, "validation": 0.5, "tokens": 64.0}, "step")
    values, step_name = values_of(written, tuned=True)
    assert (list(values), step_name) == (["lr_0.001/loss", "lr_0.001/validation", "lr_0.001/tokens"], "lr_0.001/step")


def test_no_row_is_told_twice_though_it_is_written_twice(tmp_path):
    """The second process begins at a checkpoint, before the last rows that the first has told."""
    config, opened = small(tmp_path, "track=wandb", *TUNED), []

    def opener(watched):
        opened.append(Recorder(watched))
        return opened[-1]

    first = follower_of(config, opener)
    for step in (2, 4, 6):
        first.row(row(step))
    second = follower_of(config, opener)
    for rate, step in ((0.01, 4), (0.01, 6), (0.01, 8), (0.001, 2), (0.01, 8)):
        second.row(row(step, rate))
    told = [(step_name, step, number) for each in opened for _, step_name, step, number in each.rows]
    assert told == [("lr_0.01/step", step, step // 2) for step in (2, 4, 6, 8)] + [("lr_0.001/step", 2, 5)]
    assert [each.watched.is_resumed for each in opened] == [False, True]


def test_what_was_told_is_kept_for_each_tracker(tmp_path):
    config = small(tmp_path, "track=wandb")
    follower_of(config, Recorder).row(row(2))
    other = follower_of(replace(config, track="trackio"), Recorder)
    other.row(row(2))
    assert len(other._tracker.rows) == 1
    (config.run_dir / "tracked-wandb.json").write_text("{half")
    assert not follower_of(config, Recorder)._tracker.watched.is_resumed


def test_a_run_is_told_under_its_own_id_by_dotted_names(tmp_path):
    config = small(tmp_path, "track=wandb", "name=ablation1")
    watched = follower_of(config, Recorder)._tracker.watched
    assert (watched.run_id, watched.name) == (config.run_id, f"mha-{config.run_id}")
    assert (watched.project, watched.folder) == ("ablation1", tmp_path / "ablation1")
    assert watched.config["mixer.A.head_dim"] == 4
    assert watched.config["seed"] == 0


@pytest.mark.parametrize("where", ["open", "log", "finish"])
def test_what_goes_wrong_is_one_line_and_the_last(where, tmp_path, capsys):
    class Failing(Recorder):
        def __init__(self, watched):
            super().__init__(watched)
            self.fail("open")

        def fail(self, now):
            if now == where:
                raise ConnectionError("no\nnetwork")

        def log(self, *words):
            super().log(*words)
            self.fail("log")

        def finish(self, summary, step, *, is_done):
            self.fail("finish")

    follower = follower_of(small(tmp_path, "track=wandb"), Failing)
    for step in (2, 4):
        follower.row(row(step))
    follower.end()
    follower.end()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "mha/mqar/seed0: track=wandb ends here: ConnectionError: no network; the run goes on without it"


def test_nobody_is_told_by_default(tmp_path, recorders):
    with followed(small(tmp_path)) as follower:
        follower.row(row(2))
        follower.catch_up()
    assert not recorders
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_told_as_it_is_written_and_goes_on_where_it_was_cut(tmp_path, recorders, monkeypatch):
    """Cut at step 10, which is written again: the last checkpoint is of step 8."""
    config, seen = small(tmp_path, "track=wandb"), []
    log, written = Recorder.log, config.training_dir / "metrics.jsonl"

    def cutting(self, *words):
        log(self, *words)
        seen.append(written.read_bytes().count(b"\n"))
        if len(seen) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "log", cutting)
    assert execute(config) == "interrupted"
    assert execute(config) == "done"
    told = [(values["loss"], step) for each in recorders for values, _, step, _ in each.rows]
    assert told == [(each["loss"], each["step"]) for each in rows(config)]
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8]  # each row stood in its file when it was told
    record = Run(config).record
    ends = [({}, 10, False), (summary_of(record), 16, True)]
    assert [end for each in recorders for end in each.ends] == ends
    assert summary_of(record)["quality/accuracy"] == record.quality.value


def test_a_run_whose_training_was_there_is_told_all_of_it(trained, recorders, monkeypatch):
    def cut(*_, **__):
        raise Interrupted("a test")

    config = replace(small(trained, *MEASURED), track="wandb")
    monkeypatch.setattr(Scorer, "through_memory", cut)
    assert execute(config) == "interrupted"
    (recorder,) = recorders
    assert [(name, step) for _, name, step, _ in recorder.rows] == [
        (f"lr_{each['learning_rate']:g}/step", each["step"]) for each in rows(config)
    ]
    assert [number for *_, number in recorder.rows] == list(range(1, 17))


def events_of(folder):
    """Every scalar of the event files in a folder: (tag, step, value)."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return [each for each in found if not each[0].startswith("config")]


def test_tensorboard_has_every_row_and_a_copy_replaces_it(tmp_path):
    """Live in two processes' worth of files, then by `kvlab track`: the same scalars, each once."""
    pytest.importorskip("tensorboardX")
    config = small(tmp_path, "track=tensorboard")
    folder = tmp_path / "default" / "tensorboard" / name_of(config.as_dict(), config.run_id)
    first = follower_of(config, trackers.OPENERS["tensorboard"])
    first.row(row(2, tokens=128))
    deadline = time.monotonic() + 20
    while not events_of(folder) and time.monotonic() < deadline:  # it stands there in a second or so
        time.sleep(0.1)
    assert events_of(folder) == [("loss", 2, 0.5), ("tokens", 2, 128.0)]
    first.end()
    for path in config.run_dir.iterdir():
        assert path.name == "tracked-tensorboard.json"
        path.unlink()
    for path in folder.iterdir():
        path.unlink()
    assert execute(config) == "done"
    live = events_of(folder)
    written = rows(config)
    assert [step for tag, step, _ in live if tag == "loss"] == [each["step"] for each in written]
    assert to_tensorboard(tmp_path / "default", tmp_path / "default" / "tensorboard") == [folder]
    assert sorted(events_of(folder)) == sorted(live)
    assert to_tensorboard(tmp_path / "default", tmp_path / "default" / "tensorboard") == [folder]
    assert sorted(events_of(folder)) == sorted(live)
    with Run(config).locked(), pytest.warns(RuntimeWarning, match="left alone, its run is at work there"):
        assert to_tensorboard(tmp_path / "default", tmp_path / "default" / "tensorboard") == []
    assert sorted(events_of(folder)) == sorted(live)


def wandb_records(path):
    """The records of a file that `wandb sync` would send: LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of a record, or its last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def keyed(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.filterwarnings("ignore")
def test_wandb_goes_on_with_the_same_run(trained, monkeypatch):
    """The library itself, offline: cut behind the first rows, then the whole run of a training that is there."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = replace(small(trained, *MEASURED), track="wandb")
    first = follower_of(config, trackers.OPENERS["wandb"])
    for each in rows(config)[:3]:
        first.row(each)
    first.end()
    assert execute(config) == "done"
    files = sorted(trained.glob("default/wandb/offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{config.run_id}.wandb"] * 2
    records, deadline = [], time.monotonic() + 60
    while sum(record.HasField("exit") for record in records) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)  # wandb's own process writes the last block when it likes
        records = [record for path in files for record in wandb_records(path)]
    told = [keyed(record.history.item) for record in records if record.HasField("history")]
    names = [f"lr_{each['learning_rate']:g}" for each in rows(config)]
    assert [each["_step"] for each in told] == list(range(1, 17))
    assert [(each[f"{name}/step"], each[f"{name}/loss"]) for name, each in zip(names, told, strict=True)] == [
        (each["step"], each["loss"]) for each in rows(config)
    ]
    (run, again) = [record.run for record in records if record.HasField("run")]
    assert run.run_id == again.run_id == config.run_id
    assert (run.project, run.display_name) == ("default", config.label)
    assert keyed(run.config.update)["mixer.A.head_dim"] == 4
    summaries = [keyed(record.summary.update) for record in records if record.HasField("summary")]
    found = {name: value for each in summaries for name, value in each.items()}
    assert found.items() >= summary_of(Run(config).record).items()
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1, 0]
    assert len(read_records(trained)) == 1  # nothing of wandb's is taken for a run


@pytest.mark.filterwarnings("ignore")
def test_trackio_goes_on_with_the_same_run(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    config = replace(small(trained, *MEASURED), track="trackio")
    first = follower_of(config, trackers.OPENERS["trackio"])
    for each in rows(config)[:3]:
        first.row(each)
    first.end()
    assert execute(config) == "done"
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "default.db")) as kept:
        told = kept.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in told} == {name_of(config.as_dict(), config.run_id)}
    *written, (_, last, summary) = told
    assert (last, json.loads(summary)) == (16, summary_of(Run(config).record))
    for (_, step, values), each in zip(written, rows(config), strict=True):
        assert (step, json.loads(values)[f"lr_{each['learning_rate']:g}/loss"]) == (each["step"], each["loss"])
