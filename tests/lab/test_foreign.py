"""Folders of results that are damaged, or made by somebody who means harm: rows and sentences, never a traceback."""

import contextlib
import copy
import io
import json
import os
import random
import time
import warnings
from dataclasses import replace

import pytest

from kvlab.compose import compose
from kvlab.lab.foreign import plain, printable, read_yaml
from kvlab.lab.report import write_report
from kvlab.lab.results import load, read_metrics, read_records
from kvlab.lab.runs import Run
from kvlab.lab.source import load_source
from kvlab.lab.tables import print_records
from kvlab.schema import ConfigError
from tests.lab.small import small
from tests.lab.test_results import record, write

WRONG = [
    None, 0, -1, 1.5, 10**400, "", "x", "\x1b[31m../..", [], [1, "x", None], {}, {"x": 1}, True, 1e308, "a$" * 50_000,
    float("nan"), [[[]]], "/etc/passwd", "$\\frac", "[bold]",
]  # fmt: skip
REMOVED = object()


def leaves(node, path=()):
    """Where there is something in plain data: the whole, every section and every value."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        yield from leaves(value, (*path, name))


def changed(data, path, value):
    if not path:
        return None if value is REMOVED else value
    data = copy.deepcopy(data)
    node = data
    for name in path[:-1]:
        node = node[name]
    if value is REMOVED:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return data


@pytest.fixture
def results(tmp_path):
    """Two finished runs, the seeds of one point, with whole configurations."""
    base = compose([]).as_dict()
    made = [record(value=0.5 + seed / 10, seed=seed) for seed in (0, 1)]
    made = [replace(each, config={**base, "seed": each.seed}, run_id=f"run{each.seed}") for each in made]
    return write(tmp_path / "results", *made)


def shown(folder):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_records(read_records(folder))
    assert "\x1b" not in printed.getvalue()
    return printed.getvalue()


def reported(folder):
    write_report(folder, folder / "out")


def tracked(folder):
    from kvlab.lab.track import to_tensorboard

    to_tensorboard(folder, folder / "board")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("readers", "num_cases"),
    [
        ((shown, load), 60),
        ((tracked, reported), 8),
        pytest.param((shown, load, tracked, reported), 1000, marks=[pytest.mark.slow, pytest.mark.timeout(1500)]),
    ],
    ids=["tables", "files", "all"],
)
def test_one_odd_record_stops_nobody(results, readers, num_cases):
    """Every value of a record or of its config.yaml x null, numbers, text, lists and mappings: a row or a reason."""
    if tracked in readers:
        pytest.importorskip("tensorboardX")
    path = results / "made" / "run0" / "record.json"
    whole = json.loads(path.read_text())
    cases = [(place, wrong) for place in leaves(whole) for wrong in (*WRONG, REMOVED)]
    for place, wrong in random.Random(num_cases).sample(cases, num_cases):
        path.write_text(json.dumps(changed(whole, place, wrong)))
        if place[:1] == ("config",) and len(place) > 1:
            path.with_name("config.yaml").write_text(json.dumps(changed(whole["config"], place[1:], wrong)))
        for read in readers:
            began = time.process_time()
            read(results)
            assert time.process_time() - began < 20, (read.__name__, place)
        assert {row.run_id for row in read_records(results)} >= {"run1"}


DAMAGE = {
    "empty": b"",
    "cut": b'{"schema": 1, "sta',
    "binary": bytes(range(256)),
    "no reason": b'{"status": "failed", "run_id": "x"}',
    "a list": b"[1]",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_a_row_that_says_so_and_can_be_run_again(results, damage, tmp_path):
    path = results / "made" / "run0" / "record.json"
    path.write_bytes(damage)
    row, other = read_records(results)
    assert (row.run_id, row.status, other.status) == ("run0", "failed", "done")
    assert row.reason.startswith("record.json is damaged: ")
    assert "record.json is damaged" in shown(results)
    config = small(tmp_path)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "record.json").write_bytes(damage)
    assert Run(config).state == "failed"


def test_a_record_of_another_version_says_so(results):
    path = results / "made" / "run0" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    assert read_records(results)[0].reason == (
        "record.json is damaged: schema: 2 is of another kvlab, this one reads 1"
    )


@pytest.mark.parametrize("config", [b"a: [", b"\xff\xfe", b"x: &a [1]\ny: *b", b"null", b"mixer: 3"])
def test_a_done_run_whose_config_is_damaged_does_not_vanish(results, config):
    (results / "made" / "run0" / "config.yaml").write_bytes(config)
    assert [row.status for row in read_records(results)] == ["done", "done"]


def test_generating_from_a_run_whose_config_is_damaged_is_a_sentence(results):
    folder = results / "made" / "run0"
    for content, said in ((b"a: [", "is damaged: no YAML"), (b"\xff", "is damaged: "), (b"3", "must be a mapping")):
        (folder / "config.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            load_source(folder)


def test_a_reason_of_a_megabyte_fills_no_screen(results):
    path = results / "made" / "run0" / "record.json"
    data = json.loads(path.read_text())
    known = {name: data[name] for name in ("run_id", "experiment", "config", "seed")}
    path.write_text(json.dumps({**known, "status": "failed", "reason": "x" * 1_000_000}))
    assert shown(results).replace("\n", "").count("x") < 1600


def test_a_begun_run_whose_config_is_damaged_is_a_row(results):
    folder = results / "made" / "run0"
    (folder / "record.json").unlink()
    (folder / "status.json").write_text("{}")
    (folder / "config.yaml").write_bytes(b"a: [")
    assert read_records(results)[0].reason.startswith("config.yaml is damaged: no YAML")
    shown(results)


def test_aliases_are_counted_as_often_as_they_stand(tmp_path):
    """A billion times one word is a sentence after a moment, not a full memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="more than 200,000 values"):
        read_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [float("inf")]}, ".a: must be finite"),
        ({"a": {"b": 2**63}}, ".a.b: must be an integer of 64 bits"),
        ({1: 2}, "it: has the key 1, which is no text"),
        ({"a": b"x"}, ".a: bytes is no plain value"),
    ],
)
def test_what_is_no_plain_data_is_named(value, said):
    with pytest.raises(ValueError, match=said):
        plain(value)


def test_what_steers_a_terminal_is_written_out():
    assert printable("a\x1b[2J\x9bm\u202eb\n\tc") == "a\\x1b[2J\\x9bm\\u202eb\n\tc"


def test_a_bad_byte_in_the_metrics_costs_its_row_alone(results):
    path = results / "made" / "run0" / "metrics.jsonl"
    row = path.read_bytes()
    path.write_bytes(row + b"\xff" + row + row + b'{"learning_rate": "x", "step": 1, "loss": 2}\n' + b'{"lea')
    with pytest.warns(RuntimeWarning, match="2 damaged rows, left out"):
        assert len(read_metrics(read_records(results)[0])) == 2


def test_a_pipe_in_the_place_of_a_record_does_not_hang(results):
    path = results / "made" / "run0" / "record.json"
    path.unlink()
    os.mkfifo(path)
    assert read_records(results)[0].reason.endswith("is no regular file")


@pytest.mark.ci
def test_a_report_writes_through_no_link(results, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (results / "out").mkdir()
    for name in ("report.html", "frontier.png", "frontier.pdf", "frontier.csv"):
        (results / "out" / name).symlink_to(outside)
    reported(results)
    assert outside.read_text() == "mine"
    assert not any(path.is_symlink() for path in (results / "out").iterdir())


def test_tensorboard_files_stay_in_their_folder(results, tmp_path):
    pytest.importorskip("tensorboardX")
    path = results / "made" / "run0" / "record.json"
    data = json.loads(path.read_text())
    data["run_id"], data["config"]["mixer"]["name"] = "../../x", str(tmp_path / "outside")
    path.write_text(json.dumps(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracked(results)
    assert not (tmp_path / "outside").exists()
    folders = [path for path in (results / "board").iterdir() if path.is_dir()]
    assert len(folders) == 2
    linked = folders[0]
    for file in linked.iterdir():
        file.unlink()
    linked.rmdir()
    (tmp_path / "elsewhere").mkdir()
    linked.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        tracked(results)
    assert not list((tmp_path / "elsewhere").iterdir())
