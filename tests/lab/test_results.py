"""Points, intervals and the frontier, on records made by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kvlab.compose import compose
from kvlab.config import completed
from kvlab.evaluation.measure import MemoryReport, SpeedReport
from kvlab.lab.record import Done, Provenance, Quality, TrainingReport, as_json, read_record
from kvlab.lab.results import interval_half_width, load, non_dominated, points, read_records


def record(variant="mha", seed=0, value=0.9, size=1000, task="mqar", metric="accuracy", **config):
    row = {"layer": 0, "state": "kv", "logical_bytes": size, "allocated_bytes": 2 * size, "pool_bytes": 3 * size}
    return Done(
        run_id=f"{variant}{seed}{task}",
        experiment="made",
        seed=seed,
        wall_s=1.0,
        config={"mixer": {"name": variant}, "task": {"type": task}, "seed": seed, "results_dir": "r", **config},
        num_params=7,
        quality=Quality(
            metric=metric,
            higher_is_better=metric == "accuracy",
            value=value,
            parallel_value=value,
            validation=value,
            slices={"all": value},
        ),
        memory=MemoryReport(size, 2 * size, 1, 9, None, 3 * size, 64, 2, (row,), ()),
        speed=SpeedReport(1.0 + seed, 10.0),
        training=TrainingReport(
            learning_rate=0.01, trials=[], num_steps=4, num_tokens=8, params_sha256="p", data_sha256=None
        ),
        provenance=Provenance(
            git_commit="c",
            git_dirty=False,
            versions={"jax": "x"},
            device={"kind": "cpu", "count": 1},
            xla_flags="",
            implementations={"ssd": "reference"},
        ),
    )


def write(folder, *records):
    for made in records:
        directory = folder / "made" / made.run_id
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(json.dumps(made.config | {"experiment": "made"}))
        (directory / "record.json").write_text(json.dumps(as_json(made)))
        (directory / "metrics.jsonl").write_text('{"learning_rate": 0.01, "step": 4, "loss": 2.0}\n')
    return folder


def test_seeds_are_one_point_with_an_interval():
    (point,) = points([record(seed=seed, value=value) for seed, value in enumerate((0.8, 0.9, 1.0))])
    assert (point.num_seeds, point.value) == (3, pytest.approx(0.9))
    assert point.high - point.value == pytest.approx(4.302653 * 0.1 / np.sqrt(3))  # Student t, 2 degrees, 97.5%
    assert point.bytes_per_sequence["logical_bytes"] == 500
    known = {name: value for name, value in point.speeds.items() if value is not None}
    assert known == {"train_step_ms": 2.0, "decode_tokens_per_s": 10.0}, "older records know no spread"


def test_one_seed_has_no_interval():
    assert interval_half_width([0.5]) == 0


def test_other_settings_are_other_points_with_telling_names():
    found = points([record(memory={"page_size": page}) for page in (4, 16)])
    assert sorted(point.name for point in found) == ["mha page_size=16", "mha page_size=4"]


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ([{"memory": {"name": name}} for name in ("paged", "dense")], ["mha memory=dense", "mha memory=paged"]),
        (
            [{"optimizer": {"rate": 1}, "tune": {"rate": rate}, "model": {"dim": 8 * rate}} for rate in (1, 2)],
            ["mha dim=16 tune.rate=2", "mha dim=8 tune.rate=1"],
        ),
    ],
)
def test_a_name_keeps_its_section_where_its_last_word_is_ambiguous(sections, names):
    assert sorted(point.name for point in points([record(**section) for section in sections])) == names


def test_bytes_of_seeds_that_differ_are_their_mean():
    """Compilers of two machines want other temporaries: no seed is the one whose bytes stand for all."""
    made = [record(seed=seed) for seed in (0, 1)]
    made[1] = replace(made[1], memory=replace(made[1].memory, temp_bytes=made[0].memory.temp_bytes + 8))
    (point,) = points(made)
    of_batch = made[0].memory.temp_bytes + 4
    assert point.bytes_per_sequence["temp_bytes"] == of_batch / made[0].memory.batch_size
    assert point.bytes_per_sequence["allocated_bytes"] == made[0].memory.allocated_bytes / made[0].memory.batch_size


def held(compression=None, budget=None, **memory):
    return {"memory": {"format": "model", "compression": compression, "budget": budget, **memory}}


QUEST = {"type": "quest", "fraction": 0.25, "pages": None}
SNAPKV, H2O = {"type": "snapkv", "recent": 32, "window": 32, "sinks": 4}, {"type": "h2o", "recent": 8, "sinks": 4}


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        (
            [held(), held(SNAPKV, 0.25), held(SNAPKV, 0.5), held(H2O, 0.25)],
            ["mha", "mha h2o 0.25", "mha snapkv 0.25", "mha snapkv 0.5"],
        ),
        (
            [held(), held(format="int8"), held(H2O, 96), held(H2O, 96, format="int8")],
            ["mha", "mha h2o 96", "mha h2o 96 int8", "mha int8"],
        ),
        (
            [held(H2O, 64), held(SNAPKV, 64), held({**SNAPKV, "window": 16}, 64)],
            ["mha h2o 64", "mha snapkv 64 window=16", "mha snapkv 64 window=32"],
        ),
        ([held(H2O, 64), held(H2O, 96)], ["mha h2o 64", "mha h2o 96"]),
        (
            [held(), held(selection=QUEST), held(selection={**QUEST, "pages": 8}), held(selection={"type": "random"})],
            ["mha", "mha quest pages=8", "mha quest pages=None", "mha random"],
        ),
        (
            [held(selection=None), held(H2O, 64, selection=None), held(H2O, 64, selection=QUEST)],
            ["mha", "mha h2o 64", "mha h2o 64 quest"],
        ),
    ],
)
def test_a_method_is_named_with_its_budget_and_its_fields_where_they_vary(sections, names):
    assert sorted(point.name for point in points([record(**section) for section in sections])) == names


@pytest.mark.parametrize("task", ["mqar", "needle", "text", "passkey"])
def test_a_run_from_before_a_field_was_added_is_of_the_same_point(task, tmp_path):
    """Its record is read with the field's default, and so is a run that was cut."""
    new = compose([f"task={task}", "mixer=hybrid"]).as_dict()
    younger = {"num_turns", "query_aware", "num_scored", "scored_in_chunks", "second_form", "max_bigram_count"}
    old = {
        **new,
        "memory": {"name": "paged", "page_size": 16, "chunk_len": 16},
        "task": {name: value for name, value in new["task"].items() if name not in younger},
        "mixer": {name: value for name, value in new["mixer"].items() if name != "knob"},  # no part of an identity
    }
    made = [
        replace(record(task=task, seed=seed), config=each | {"seed": seed}, run_id=f"run{seed}")
        for seed, each in enumerate((old, new))
    ]
    assert len(points(made)) == 2
    records = read_records(write(tmp_path, *made))
    (point,) = points(records)
    assert (point.num_seeds, point.name) == (2, "hybrid")
    (tmp_path / "made" / "run0" / "record.json").unlink()
    (cut,) = (each for each in read_records(tmp_path) if each.status == "cut")
    assert cut.config["memory"] == point.config["memory"]


@pytest.mark.parametrize(
    ("metric", "value", "lost"), [("accuracy", 0.5, 0.25), ("bits_per_byte", 1.0, 0.25), ("bits_per_byte", 0.5, -0.25)]
)
def test_lost_is_by_how_much_a_memory_is_worse(metric, value, lost, tmp_path):
    """Where lower is better, too; older records said so with the wrong sign, which is not read."""
    full = value + lost if metric == "accuracy" else value - lost
    made = record(value=value, metric=metric)
    made = replace(made, quality=replace(made.quality, parallel_value=full, verified_by="rounded to int8"))
    assert made.quality.lost == lost
    write(tmp_path, made)
    path = tmp_path / "made" / "mha0mqar" / "record.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"quality": data["quality"] | {"lost": -lost}}))
    (again,) = points(read_records(tmp_path))
    assert again.fidelity["lost"] == lost
    assert load(tmp_path)["quality.lost"].tolist() == [lost]


def test_what_was_asked_for_parts_no_points():
    asked = [{"asked": "64KiB", "knob": "memory.budget", "solved": 96}, {"asked": "65KiB", "solved": 96}]
    (point,) = points([record(seed=seed, **held(H2O, 96), equal_budget=said) for seed, said in enumerate(asked)])
    assert point.num_seeds == 2


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1), ("bits_per_byte", -1)])
def test_non_dominated_against_brute_force(metric, sign):
    rng = np.random.default_rng(0)
    made = [
        record(f"v{i}", value=float(rng.integers(0, 6)), size=int(rng.integers(1, 8)) * 2, metric=metric)
        for i in range(30)
    ]
    found = points(made)

    def beaten(point):
        a = (point.bytes_per_sequence["allocated_bytes"], -sign * point.value)
        others = [(p.bytes_per_sequence["allocated_bytes"], -sign * p.value) for p in found]
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in others)

    expected = {(p.bytes_per_sequence["allocated_bytes"], p.value) for p in found if not beaten(p)}
    line = non_dominated(found)
    assert {(p.bytes_per_sequence["allocated_bytes"], p.value) for p in line} == expected


def test_load_puts_what_varies_first(tmp_path):
    frame = load(write(tmp_path, record(seed=0), record(seed=1), record("mqa", seed=0)))
    assert list(frame.columns[:3]) == ["mixer.name", "seed", "run_id"]
    assert len(frame) == 3
    assert frame["memory.allocated_bytes"].tolist() == [2000] * 3


def test_a_cut_run_is_a_row(tmp_path):
    write(tmp_path, record())
    (tmp_path / "made" / "cut").mkdir()
    (tmp_path / "made" / "cut" / "config.yaml").write_text(json.dumps(record().config | {"experiment": "made"}))
    assert sorted(made.status for made in read_records(tmp_path)) == ["cut", "done"]
    assert set(load(tmp_path)["status"]) == {"cut", "done"}


def test_a_damaged_record_is_a_failed_row_and_foreign_configs_are_not_runs(tmp_path):
    write(tmp_path, record())
    (tmp_path / "made" / "mha0mqar" / "record.json").write_text('{"schema": 1, "sta')
    (tmp_path / "config.yaml").write_text("defaults: [mixer]\n")
    (tmp_path / "made" / "config.yaml").write_text("")
    (row,) = read_records(tmp_path)
    assert row.status == "failed"
    assert row.reason.startswith("record.json is damaged")


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_tensorboard_gets_every_row(tmp_path):
    pytest.importorskip("tensorboardX")
    from kvlab.lab.track import to_tensorboard

    (folder,) = to_tensorboard(write(tmp_path / "results", record()), tmp_path / "board")
    (events,) = folder.iterdir()
    content = events.read_bytes()
    for tag in (b"loss", b"quality/accuracy", b"per_sequence/allocated_bytes"):
        assert tag in content


def test_a_record_comes_back_as_it_was(tmp_path):
    made = record(**held(SNAPKV, 0.5, residual=8))
    folder = tmp_path / "made" / "mha0mqar"
    made = replace(made, config=completed(made.config), directory=str(folder))
    write(tmp_path, made)
    assert read_record(folder / "record.json") == made


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": "well"}, "record: Input tag 'well'"),
        ({"num_params": "many"}, "done.num_params: Input should be a valid integer"),
        ({"quality": {"metric": "accuracy"}}, "done.quality.higher_is_better: Field required"),
    ],
)
def test_a_wrong_record_names_its_field(tmp_path, change, reason):
    write(tmp_path, record())
    path = tmp_path / "made" / "mha0mqar" / "record.json"
    path.write_text(json.dumps(as_json(record()) | change))
    (row,) = read_records(tmp_path)
    assert row.status == "failed"
    assert row.reason.startswith(f"record.json is damaged: {reason}")
