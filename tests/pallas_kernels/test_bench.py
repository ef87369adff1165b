"""The bench on a CPU: that it measures what it says, and times nothing that is wrong."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench import clock, measure, peers
from pallas_kernels.bench.goals import Goals, Result, Timing, verdicts
from pallas_kernels.bench.others import Step, Write
from pallas_kernels.bench.paged import Problem, make_inputs
from pallas_kernels.bench.problems import PROBLEMS, SWEEPS, TINY
from pallas_kernels.kv_write import proof as write_proof
from pallas_kernels.paged_attention import api, proof

LIMITS = {"read_bytes_per_s": 1e9, "copy_bytes_per_s": 1e9, "product_flops_per_s": 1e12}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(clock, "LOOP_SECONDS", 0.0)
    monkeypatch.setattr(proof, "CASES", dict(list(proof.CASES.items())[:1]))
    monkeypatch.setattr(write_proof, "CASES", dict(list(write_proof.CASES.items())[:1]))
    monkeypatch.setitem(SWEEPS, "tiny", ((2,), (16, 32)))


A_FEW = ("decode B3", "decode B3, int8", "write 128 tokens, int4", "SSM decode step B2")


@pytest.mark.parametrize("is_all", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["a few", "all"])
def test_the_command_writes_a_table_json_and_a_plot(tmp_path, monkeypatch, capsys, is_all):
    problems = tuple(one for one in PROBLEMS["tiny"] if is_all or one.name in A_FEW)
    monkeypatch.setitem(PROBLEMS, "tiny", problems)
    paths = tmp_path / "results" / "found.json", tmp_path / "bandwidth.png"
    monkeypatch.setattr("sys.argv", ["bench", "--rounds=1", "--cases=1", f"--json={paths[0]}", f"--plot={paths[1]}"])
    assert bench.main() == 0
    said = capsys.readouterr().out
    assert "every case right" in said
    assert "| write 128 tokens, int4 | reference | " in said
    assert "| decode B3 | blocked | " in said
    found = json.loads(paths[0].read_text())
    assert [one["problem"]["name"] for one in found["results"]] == [one.name for one in problems]
    timings = {one["problem"]["name"]: {t["name"]: t for t in one["timings"]} for one in found["results"]}
    for name, of_problem in timings.items():
        first = next(iter(of_problem.values()))
        assert first["device_us"] > 0, name
        assert all(one["error"] < 1e-2 for one in of_problem.values() if one["device_us"]), name
    assert list(timings["decode B3"]) == ["blocked", "reference", *peers.PEERS]
    assert "cuDNN" in timings["decode B3"]["cuDNN, dense"]["absent"]
    assert "16 bits" in timings["decode B3, int8"]["cuDNN, dense"]["absent"]
    if is_all:
        assert timings["flash forward"]["flash_attention, reference"]["device_us"] > 0
    assert [one["context"] for one in found["bandwidth"]] == [16, 32]
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_nothing_is_timed_where_a_kernel_is_wrong(monkeypatch, capsys):
    monkeypatch.setitem(api.IMPLEMENTATIONS, "blocked", lambda *arrays, **_: (0 * arrays[0], 0 * arrays[0][..., 0]))
    monkeypatch.setattr("sys.argv", ["bench", "--cases=0"])
    assert bench.main() == 1
    said = capsys.readouterr().out
    assert "WRONG lengths 0, 1, page" in said
    assert "decode" not in said


@pytest.mark.parametrize(
    ("option", "message"),
    [("--rounds=0", "rounds = 0: must be at least 1"), ("--only=no such", "only = 'no such': must be part of decode")],
)
def test_wrong_options_name_the_limit(monkeypatch, capsys, option, message):
    monkeypatch.setattr("sys.argv", ["bench", option])
    with pytest.raises(SystemExit):
        bench.main()
    assert message in capsys.readouterr().err


def test_floors_count_live_bytes_once_and_the_products():
    decode = Problem("", (4096,) * 32)
    assert decode.live_bytes == 32 * 4096 * 8 * 2 * 128 * 2
    assert Problem("", (100,), **TINY).live_bytes == 100 * 2 * 2 * 16 * 2
    assert Problem("", (64,), keep=0.5, **TINY).live_bytes == 32 * 2 * 2 * 16 * 2
    assert Problem("", (64,), format="int4", **TINY).live_bytes == 64 * 2 * (2 * 8 + 2 * 4)
    seen = sum(position + 1 for position in range(6, 10))
    assert Problem("", (10,), num_queries=4, **TINY).flops == 4 * seen * 4 * 16


def test_floors_are_those_of_the_goals():
    """At 4.3 TB/s and 790 TFLOP/s, in microseconds."""
    limits = {"read_bytes_per_s": 4.3e12, "copy_bytes_per_s": 4.3e12, "product_flops_per_s": 790e12}
    floors = {one.name: one.floor_us(limits) for one in PROBLEMS["full"]}
    published = {
        "decode B32 S4096": 125,
        "decode B1 S1024, 4 KV heads": 0.5,
        "decode B32 S4096, int8": 62 * (1 + 4 / 128),  # whose scales the goals leave out
        "decode B32 S4096, int4": 32 * (1 + 8 / 128),
        "decode B32 S32K, 1/8 of the pages by head": 125,
        "MLA decode B64 S8192, 16 heads": 140,
        "flash forward 4 x 48 x 8192, causal": 4180,
        "write 8192 tokens, bfloat16": 15.6,
        "SSD forward of 16384 tokens, H128": 16384 * 8e-3,
        "SSM decode step B64, H128": 125,
    }
    for name, floor in published.items():
        assert abs(floors[name] / floor - 1) < 0.04, (name, floors[name], floor)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_inputs_list_every_page_once(keep):
    problem = Problem("", (64, 40), keep=keep, **TINY)
    inputs = make_inputs(problem)
    used = np.asarray(inputs.starts) < 2**30
    tables = np.asarray(inputs.tables)
    if keep == 1:
        pages = tables[used].tolist()
        assert len(set(pages)) == len(pages) == 2 * (4 + 3), "no table finds another's pages in the cache"
    else:
        assert inputs.tables.shape[1:] == (2, 2, 2)
    assert 0 not in tables[used]
    assert tables.max() < len(inputs.keys)


def test_a_clock_counts_calls_of_a_program_of_many(monkeypatch):
    """Each call needs what the one before left: what is timed is not done once for all of them."""
    calls = []
    work = clock.Work(lambda number, state: state + number, jnp.int32(0), lambda: None)
    stopwatch = clock.Clock(work)
    monkeypatch.setattr(stopwatch, "count", 5)
    before = int(stopwatch.state)
    stopwatch.sample()
    calls.append(int(stopwatch.state) - before)
    assert calls == [1 + sum(range(5))]


@pytest.mark.parametrize("problem", [Write("", 32, 2, 16, 16), Step("", 1, 2, 4, 8)])
def test_work_depends_on_the_call_before(problem):
    """Two calls leave another state than one, as they write elsewhere, or carry a recurrence on."""
    work = problem.works()[problem.oracle]()
    first, second = work.turn(jnp.int32(0), work.state), work.turn(jnp.int32(1), work.state)
    chained = work.turn(jnp.int32(1), first)
    assert any(bool((a != b).any()) for a, b in zip(first, chained, strict=True))
    assert first[0].shape == second[0].shape == work.state[0].shape


def test_verdicts_compare_with_the_goal():
    def said(goals, *timings, others=()):
        ran = Timing("ours", 10.0, 12.0, 0.9)
        mine = Result(Problem("p", (1,), goals=goals), 9.0, [Timing("first", absent="not here"), ran, *timings])
        return list(verdicts([*others, mine]))

    assert said(Goals(0.85)) == ["p (ours): 0.90 of the floor, goal 0.85: met"]
    assert said(Goals(0.95))[0].endswith("missed")
    assert said(Goals(0.85, 0.9))[0].endswith("goal 0.85, stretch 0.90: stretch met")
    assert said(Goals(0.95, spared_us=1.0)) == ["p (ours): 1.00 of the floor and 1 us, goal 0.95: met"]
    assert said(Goals(most_us=9.0))[0].endswith("10.0 us, goal 9 us: missed")
    peer = Goals(faster_than=(("peer", 1.5),))
    assert said(peer, Timing("peer", 16.0)) == ["p (ours): 1.60x peer, goal 1.50x: met"]
    assert said(peer, Timing("peer", 14.0))[0].endswith("1.40x peer, goal 1.50x: missed")
    assert said(peer, Timing("peer", absent="no torch"))[0].endswith("goal 1.50x: not compared, no torch")
    other = Result(Problem("other", (1,)), 1.0, [Timing("ours", 20.0)])
    parts = Goals(over=(("other", "other"), 4.0))
    assert said(parts, others=(other,)) == ["p (ours): 4.00x other + other, goal 4.00x: met"]
    assert said(parts) == []
    assert said(Goals()) == []
    assert list(verdicts([Result(Problem("p", (1,), goals=Goals(0.5)), 1.0)])) == ["p: nothing ran"]


def test_what_refuses_or_fails_is_a_line_of_the_table(monkeypatch):
    def broken(problem, inputs):
        raise RuntimeError("no such chip")

    monkeypatch.setattr(peers, "PEERS", {"peer": broken})
    result = measure.measure(Problem("p", (16,), **TINY), LIMITS, 1)
    assert [one.name for one in result.timings] == ["blocked", "reference", "peer"]
    assert result.timings[-1].absent == "RuntimeError: no such chip"
