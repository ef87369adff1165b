"""The inverse question against brute force, interpolation against its closed form, and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from kvlab import cli
from kvlab.lab.best import answer, as_data, as_text, curves, interpolate
from kvlab.lab.report import frontier_frame
from kvlab.lab.results import points
from kvlab.schema import ConfigError
from tests.lab.test_results import record, write


def swept(*values, variant="swa", seed=0, metric="accuracy", **config):
    """A curve over windows: the i-th point holds 1000 * 2**i bytes a sequence (allocated; half of that logical)."""
    made = []
    for index, value in enumerate(values):
        each = record(variant, seed, value, 1000 * 2**index, metric=metric, **config)
        mixer = {"name": variant, "W": {"type": "attention", "window": 8 * 2**index}}
        made.append(replace(each, config=each.config | {"mixer": mixer}, run_id=f"{variant}{index}{seed}"))
    return made


def test_interpolation_is_linear_in_log_bytes_between_neighbours_and_ends_with_them():
    curve = points(swept(0.2, 0.5, 0.6))
    sizes = [point.bytes_per_sequence["allocated_bytes"] for point in curve]
    assert sizes == [1000, 2000, 4000]
    for num_bytes in (1000, 1250, 1999, 2000, 2500, 4000):
        expected = np.interp(math.log(num_bytes), np.log(sizes), [0.2, 0.5, 0.6])
        assert interpolate(curve, num_bytes).value == pytest.approx(expected)
    assert interpolate(curve, math.sqrt(1000 * 2000)).value == pytest.approx(0.35)
    assert interpolate(curve[::-1], 2500).below.value == 0.5
    assert interpolate(curve, 1000 / 2, "logical_bytes").value == pytest.approx(0.2)
    for beyond in (999, 4001):
        assert interpolate(curve, beyond) is None
    assert interpolate(curve[:1], 1000).value == 0.2
    assert interpolate(curve[:1], 1001) is None


def test_an_interval_is_interpolated_with_its_mean():
    seeds = [made for seed, shift in enumerate((0.0, 0.02)) for made in swept(0.2 + shift, 0.5, seed=seed)]
    curve = points(seeds)
    read = interpolate(curve, math.sqrt(1000 * 2000))
    assert read.interval == pytest.approx([(bound + 0.5) / 2 for bound in curve[0].interval])


def test_what_is_no_curve_is_not_interpolated():
    with pytest.raises(ValueError, match="several variants"):
        interpolate(points([*swept(0.1, 0.2), *swept(0.3, variant="mamba2")]), 1500)
    twice = points([*swept(0.1, 0.2), *swept(0.3, 0.4, optimizer={"rate": 1})])
    with pytest.raises(ValueError, match="two points hold the same"):
        interpolate(twice, 1500)
    assert sorted(len(curve) for curve in curves(twice)) == [2, 2]


def test_a_curve_is_of_one_method():
    made = [*swept(0.1, 0.2), *swept(0.3, memory={"format": "int8"}), *swept(0.3, memory={"format": "int4"})]
    made += swept(0.5, memory={"format": "int8", "page_size": 8})
    budgets = [swept(0.4, memory={"compression": {"type": "snapkv", "budget": b}}) for b in (0.25, "64KiB")]
    windows = [swept(0.4, compression={"type": "streaming", "slots": b, "protect": True}) for b in (32, 64)]
    found = curves(points([*made, *(each for side in (*budgets, *windows) for each in side)]))
    assert sorted(len(curve) for curve in found) == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1), ("bits_per_byte", -1)])
def test_the_answer_is_brute_forces(metric, sign):
    rng = np.random.default_rng(0)
    for _ in range(40):
        made = [
            record(f"v{i}", value=float(rng.integers(1, 9)) / 10, size=int(rng.integers(1, 9)), metric=metric)
            for i in range(int(rng.integers(1, 8)))
        ]
        found = points(made)
        budget, floor = float(rng.integers(0, 10)), float(rng.integers(0, 10)) / 10
        said = answer(found, budget=budget, floor=floor)
        pairs = [(point.bytes_per_sequence["allocated_bytes"], sign * point.value) for point in found]

        def told(point):
            return point and (point.bytes_per_sequence["allocated_bytes"], sign * point.value)

        fits, above = [p for p in pairs if p[0] <= budget], [p for p in pairs if p[0] > budget]
        reach, miss = [p for p in pairs if p[1] >= sign * floor], [p for p in pairs if p[1] < sign * floor]
        assert told(said.best) == (min(fits, key=lambda p: (-p[1], p[0])) if fits else None)
        assert told(said.above) == (min(above, key=lambda p: (p[0], -p[1])) if above else None)
        assert told(said.least) == (min(reach, key=lambda p: (p[0], -p[1])) if reach else None)
        assert told(said.nearest) == (min(miss, key=lambda p: (-p[1], p[0])) if miss else None)
        assert said.is_found == bool(fits and reach)


def test_the_answer_in_words():
    found = points([*swept(0.2, 0.5, 0.96), *swept(0.24, 0.5, 0.96, seed=1)])
    text = as_text(answer(found, budget=3000, floor=0.95))
    assert text.splitlines() == [
        "best within 2.9 KiB: swa window=16: accuracy 0.5000 (95% [0.5000, 0.5000] over 2 seeds), 2.0 KiB a sequence "
        "(allocated)",
        "nearest above: swa window=32: accuracy 0.9600 (95% [0.9600, 0.9600] over 2 seeds), 3.9 KiB a sequence "
        "(allocated)",
        "interpolated at 2.9 KiB: swa window=16 to swa window=32: accuracy 0.7691 (95% [0.7691, 0.7691])",
        "least bytes that reach accuracy 0.95: swa window=32: accuracy 0.9600 (95% [0.9600, 0.9600] over 2 seeds), "
        "3.9 KiB a sequence (allocated)",
        "nearest that does not: swa window=16: accuracy 0.5000 (95% [0.5000, 0.5000] over 2 seeds), 2.0 KiB a sequence "
        "(allocated)",
    ]
    text = as_text(answer(found, budget=500, floor=0.99))
    assert "nothing fits within 500 B: of 3 points the smallest is the nearest above" in text
    assert "nothing reaches accuracy 0.99: of 3 points the best is the nearest" in text


def test_one_seed_has_no_interval_anywhere():
    """Not at a point, not between two of which one has several seeds, not in data."""
    for seeds in ([0], [0, 1]):
        found = points([*swept(0.2, 0.5), *swept(0.25, seed=1)] if seeds[1:] else swept(0.2, 0.5))
        said = answer(found, budget=1500, floor=0.9)
        (between,) = said.between
        assert between.interval is None
        (line,) = (line for line in as_text(said).splitlines() if line.startswith("interpolated"))
        assert line.endswith("(no interval)")
        assert (as_data(said)["interpolated"][0]["low"], as_data(said)["nearest"]["high"]) == (None, None)
        frame = frontier_frame(found)
        assert frame.low.isna().tolist() == [len(seeds) == 1, True]
    assert "of 1 point the best is the nearest" in as_text(answer(found[:1], floor=0.9))


@pytest.mark.parametrize(
    ("word", "axis"),
    [("held", "allocated"), ("allocated", "allocated"), ("live", "logical"), ("logical_bytes", "logical")],
)
def test_an_axis_has_a_short_word(word, axis):
    said = answer(points([record()]), axis=word, budget=1e6)
    assert said.axis == f"{axis}_bytes"
    assert as_text(said).splitlines()[0].endswith(f"a sequence ({axis})")


def test_points_that_cannot_be_ranked_are_refused_by_name():
    base = record()
    longer = replace(base, memory=replace(base.memory, context_len=128))
    wider = replace(base, memory=replace(base.memory, batch_size=4))
    harder = replace(base, config=base.config | {"task": {"type": "mqar", "query_aware": True}})
    for other, said in (
        (record(task="text"), "task = 'mqar, text': must be one"),
        (replace(longer, config=base.config | {"x": 1}), "measure.context_len = '64, 128'"),
        (replace(wider, config=base.config | {"x": 1}), "measure.batch_size = '2, 4'"),
        (harder, "task.query_aware = 'None, True'"),
    ):
        with pytest.raises(ConfigError, match=said):
            answer(points([base, other]), budget=1000)
    with pytest.raises(ConfigError, match="budget = None: must be given"):
        answer(points([base]))
    with pytest.raises(ConfigError, match="axis = 'bytes'"):
        answer(points([base]), axis="bytes", budget=1)
    with pytest.raises(ConfigError, match=r"axis = 'raed': did you mean read.* legal: allocated, .*, held, .* live, "):
        answer(points([base]), axis="raed", budget=1)
    with pytest.raises(ConfigError, match="axis = 'read_bytes_per_token': no finished run"):
        answer(points([base]), axis="read", budget=1)


def test_the_command(tmp_path, capsys, monkeypatch):
    made = [*swept(0.2, 0.5, 0.96), record("mha", 0, 2.0, task="text", metric="bits_per_byte")]
    write(tmp_path, *made)

    def command(*words):
        monkeypatch.setattr("sys.argv", ["kvlab", "best", *map(str, words)])
        status = cli.main()
        captured = capsys.readouterr()
        return status, captured.out or captured.err

    status, out = command("budget=3KiB", "task=mqar", tmp_path)
    assert status == 0
    assert out.startswith("best within 3.0 KiB: swa window=16: accuracy 0.5000 (1 seed, no interval), 2.0 KiB")
    status, out = command("budget=3KiB", "floor=0.9", "task=mqar", "axis=logical_bytes", tmp_path, "--json")
    found = json.loads(out)
    assert (status, found["best"]["name"], found["least"]["run_ids"]) == (0, "swa window=32", ["swa20"])
    assert found["best"]["logical_bytes"] == 2000
    status, out = command("budget=100B", "task=mqar", tmp_path)
    assert (status, out.count("nothing fits within 100 B")) == (1, 1)
    for words, said in (
        (["budget=3KiB", tmp_path], "task = 'mqar, text': must be one"),
        (["budget=3", "task=mqar", tmp_path], "budget = '3': must be bytes a sequence"),
        (["budget=3 bytes", "task=mqar", tmp_path], "budget = '3 bytes': must be slots"),
        (["floor=nan", "task=mqar", tmp_path], "floor = 'nan': must be a finite number"),
        (["task=mqar", tmp_path], "budget = None: must be given"),
        (["budget=1B", "task=needle", tmp_path], "no finished run is so"),
        (["budget=1B", "tsk=needle", tmp_path], "no field of these runs"),
        (["budget=1B", tmp_path, tmp_path], "must be one folder"),
        (["budget=1B", tmp_path / "no"], "no such folder of results"),
    ):
        status, out = command(*words)
        assert status == 2
        assert said in out
        assert out.count("\n") == 1
