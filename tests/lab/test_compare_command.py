"""Comparisons as they are asked for: runs are named by folder, id or conditions, and answered as tables."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from kvlab import cli
from kvlab.compose import RUN, configs_dir, register
from kvlab.evaluation.score import SliceScore
from kvlab.lab.choose import Runs, conditions, matching, split_conditions
from kvlab.lab.examples import FILE, write_examples
from kvlab.lab.protocol import protocol_rows
from kvlab.lab.results import points, read_records
from kvlab.schema import ConfigError
from tests.lab.test_compare import many, run
from tests.lab.test_results import record, write


@pytest.fixture
def results(tmp_path):
    """Three seeds of a full and of a lossy memory, and a text run, with their files."""
    made = []
    for format in ("model", "int4"):
        for seed in range(3):
            examples = {"16:2": many(seed + 10 * (format == "int4")), "24:3": many(seed + 5)}
            made.append(run("mha", seed, examples, format=format))
    made.append(run("mha", 0, {"text": many(0, num_turns=1)}, metric="bits_per_byte", task="text"))
    for number, each in enumerate(made):
        write_run(tmp_path, replace(each, record=replace(each.record, run_id=f"{'abcdefg'[number]}{number}{number}")))
    return tmp_path


def write_run(folder, run):
    """A run's record with the file of its scores."""
    (folder / "kept").mkdir()
    parts = [
        SliceScore(name=name, **vars(scores.sums()), examples=scores, data_sha256=f"{run.record.seed}{name}")
        for name, scores in run.examples.items()
    ]
    write(folder, replace(run.record, examples=write_examples(folder / "kept", parts)))
    (folder / "kept" / FILE).rename(folder / "made" / run.record.run_id / FILE)
    (folder / "kept").rmdir()


def command(capsys, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["kvlab", *map(str, words)])
    status = cli.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_runs_are_named_by_folder_id_or_conditions(results, capsys, monkeypatch):
    runs = Runs(results)
    assert [each.seed for each in runs.point("format=int4")] == [0, 1, 2]
    assert [each.seed for each in runs.point("memory.format=int4,seed=2,0")] == [0, 2]
    assert [each.run_id for each in runs.point("b11")] == [each.run_id for each in runs.point("b")] == ["b11"]
    assert [each.run_id for each in runs.point(str(results / "made" / "c22"))] == ["c22"]
    elsewhere = Runs(results / "nowhere")
    assert [each.run_id for each in elsewhere.point(str(results / "made" / "d33"))] == ["d33"]
    assert len(elsewhere.records) == 7  # its neighbours may be its ceilings
    for words, said in (
        ("task=mqar", "must be one point with its seeds; these runs differ in memory.format=int4, model"),
        ("z", "no run of .* is so"),
        ("formt=int4", "no field of these runs; did you mean memory.format"),
        ("=4", "must be field=value"),
        ("format=int8", "no run of"),
    ):
        with pytest.raises(ConfigError, match=said):
            runs.point(words)


def choices_of(group):
    """What each choice of a group puts into the memory, by Hydra."""
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        register()
        memories = {name: hydra_compose("config", [f"{group}={name}"]).memory for name in RUN.options(group)}
        return {name: OmegaConf.to_container(memory)[group] for name, memory in memories.items()}


@pytest.mark.parametrize("group", ["compression", "selection", "format"])
def test_every_choice_of_a_group_finds_its_runs_and_no_others(group, tmp_path):
    """As the files of configs/ have it; a run from before there was a choice holds and reads everything."""
    choices = choices_of(group)
    made = [
        replace(record(memory={"budget": 64, group: choice}), run_id=f"{name}.") for name, choice in choices.items()
    ]
    (full,) = (name for name, choice in choices.items() if choice in (None, "model"))
    made.append(replace(record(seed=1, memory={"page_size": 16}), run_id="older."))
    runs = Runs(write(tmp_path, *made))
    for name in choices:
        for words in (f"{group}={name}", f"memory.{group}={name}"):
            expected = [name, *(["older"] if name == full else [])]
            assert sorted(each.run_id for each in runs.named(words)) == sorted(f"{each}." for each in expected), words
    assert len(matching(runs.records, conditions([f"{group}={','.join(choices)}"], runs.records))) == len(made)
    assert not runs.named(f"{group}=other")


def test_a_choice_is_a_condition_of_every_command(tmp_path, capsys, monkeypatch):
    h2o, snapkv = {"type": "h2o", "recent": 8}, {"type": "snapkv", "recent": 32, "window": 32}
    for name, section in (("full", None), ("h2o", h2o), ("snapkv", snapkv)):
        scored = run("mha", 0, {"x": many(1)})
        budget = None if section is None else 0.5
        config = scored.record.config | {"memory": {"format": "model", "compression": section, "budget": budget}}
        write_run(tmp_path, replace(scored, record=replace(scored.record, run_id=name, config=config)))
    words = ["compression=h2o", "--results", tmp_path]
    status, out, _ = command(capsys, monkeypatch, "compare", "compression=none", *words)
    assert (status, "mha h2o 0.5 less mha, mqar" in out) == (0, True)
    status, out, _ = command(capsys, monkeypatch, "best", "budget=1MiB", "compression=snapkv", tmp_path, "--json")
    assert (status, json.loads(out)["best"]["run_ids"]) == (0, ["snapkv"])
    status, _, err = command(capsys, monkeypatch, "compare", "task=mqar", *words)
    assert status == 2
    assert err.endswith("these runs differ in memory.budget=0.5, None; memory.compression=None, h2o, snapkv\n")


def test_conditions_are_split_at_commas():
    assert split_conditions("a=1,b=x, y,c=") == [("a", ("1",)), ("b", ("x", "y")), ("c", ("",))]


def test_the_command_prints_every_form(results, capsys, monkeypatch):
    words = ["compare", "format=model,task=mqar", "format=int4", "--results", results]
    status, out, _ = command(capsys, monkeypatch, *words, "--json")
    assert status == 0
    (found,) = json.loads(out)
    assert found["names"] == ["mha", "mha int4"]
    assert (found["seeds"], found["task"], len(found["cells"])) == ([0, 1, 2], "mqar", 9)
    mean = found["cells"][0]
    status, out, _ = command(capsys, monkeypatch, *words)
    assert "mha int4 less mha, mqar, accuracy (higher is better), seeds 0, 1, 2" in out
    shown = f"[{mean['low']:+.4f}, {mean['high']:+.4f}]"
    assert shown in out
    _, out, _ = command(capsys, monkeypatch, *words, "--markdown")
    head, rule, first = out.splitlines()[2:5]
    assert head.startswith("| slice | turn | A | B | B less A | 95% |")
    assert rule.count("---") == head.count("|") - 1
    assert shown in first
    _, out, _ = command(capsys, monkeypatch, *words, "--latex")
    assert r"\begin{tabular}{l" in out
    assert r"95\%" in out
    assert out.count(r"\\") == 10


def test_the_command_answers_in_one_line(results, capsys, monkeypatch):
    for words, said in (
        (["a00"], "give at least two runs"),
        (["a00", "g66"], "task.type = 'mqar and text': must be the same in both"),
        (["a00", "e44"], "seed = '0 and 1': must be the same in both"),
        (["a00", "y"], "no run of"),
    ):
        status, out, err = command(capsys, monkeypatch, "compare", *words, "--results", results)
        assert (status, out) == (2, "")
        assert said in err
        assert err.count("\n") == 1
    (results / "made" / "d33" / FILE).unlink()
    status, _, err = command(capsys, monkeypatch, "compare", "a00", "d33", "--results", results)
    assert status == 2
    assert "examples of run d33" in err
    assert "cannot be read" in err


def test_tables_have_ceiling_turns_and_flips(results):
    records = read_records(results)
    found = points(records)
    rows = {(point.task, point.name): row for point, row in zip(found, protocol_rows(found, records), strict=True)}
    lossy, full = rows["mqar", "mha int4"], rows["mqar", "mha"]
    by_format = [[r for r in records if r.config["memory"]["format"] == f and r.quality.metric == "accuracy"]
                 for f in ("model", "int4")]  # fmt: skip
    assert lossy["ceiling"] == pytest.approx(np.mean([r.quality.value for r in by_format[0]]))
    assert full["ceiling"] == lossy["ceiling"]
    assert lossy["tells"] is False  # a ceiling of 0.6
    turn = np.mean([values[1] for r in by_format[1] for values in r.quality.turns.values()])
    assert lossy["turn 2"] == pytest.approx(turn)
    lost = sum(
        int((many(seed).right & ~many(seed + 10).right).sum()) for seed in range(3)
    )  # the second slice is the same in both
    assert (lossy["right to wrong"], lossy["labels"]) == (lost, 6 * len(many(0).right))
    assert full["right to wrong"] is None
    (text,) = [row for point, row in zip(found, protocol_rows(found, records), strict=True) if point.task == "text"]
    assert text["turn 2"] is None
    (results / "made" / "d33" / FILE).write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="examples of run d33 .*is damaged.*; its flips are left out"):
        rows = protocol_rows(found, records)
    assert {row["right to wrong"] for row in rows} == {None}
