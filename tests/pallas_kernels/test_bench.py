"""The bench on a CPU: that it measures what it says, times nothing that is wrong, and loses nothing."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench import clock, measure, peers, verify
from pallas_kernels.bench.goals import Goals, Result, Timing, verdicts
from pallas_kernels.bench.others import Mixed, Step, Write
from pallas_kernels.bench.paged import Problem, bucket_of, make_inputs
from pallas_kernels.bench.problems import PROBLEMS, SWEEPS, TINY
from pallas_kernels.kv_write import proof as write_proof
from pallas_kernels.paged_attention import api, proof
from pallas_kernels.selection import Asked

LIMITS = {"read_bytes_per_s": 1e9, "copy_bytes_per_s": 1e9, "product_flops_per_s": 1e12}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(clock, "LOOP_SECONDS", 0.0)
    monkeypatch.setattr(proof, "CASES", dict(list(proof.CASES.items())[:1]))
    monkeypatch.setattr(write_proof, "CASES", dict(list(write_proof.CASES.items())[:1]))
    monkeypatch.setattr(verify, "FORMATS", ("int8",))
    monkeypatch.setitem(SWEEPS, "tiny", ((2,), (16,)))


A_FEW = ("decode B3", "decode B3, int8", "write 128 tokens, int4", "SSM decode step B2")


@pytest.mark.parametrize("is_all", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["a few", "all"])
def test_the_command_writes_a_table_json_and_a_plot(tmp_path, monkeypatch, capsys, is_all, short):
    problems = tuple(one for one in PROBLEMS["tiny"] if is_all or one.name in A_FEW)
    monkeypatch.setitem(PROBLEMS, "tiny", problems)
    paths = tmp_path / "results" / "found.json", tmp_path / "bandwidth.png"
    monkeypatch.setattr("sys.argv", ["bench", "--rounds=1", "--cases=1", f"--json={paths[0]}", f"--plot={paths[1]}"])
    assert bench.main() == 0
    said = capsys.readouterr().out
    assert "every case right: 2 of kv_write by reference, 4 of paged_attention by blocked" in said
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
    assert any(one.startswith("decode B3, int8 (blocked): ") for one in found["verdicts"])
    assert [one["context"] for one in found["bandwidth"]] == [16]
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_nothing_is_timed_where_a_kernel_is_wrong(monkeypatch, capsys, short):
    monkeypatch.setitem(api.IMPLEMENTATIONS, "blocked", lambda *arrays, **_: (0 * arrays[0], 0 * arrays[0][..., 0]))
    monkeypatch.setattr("sys.argv", ["bench", "--cases=0"])
    assert bench.main() == 1
    said = capsys.readouterr().out
    assert "WRONG paged_attention, lengths 0, 1, page" in said
    assert "decode" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds=0"], "rounds = 0: must be at least 1"),
        (["--only=no such"], "only = 'no such': must be part of one of: decode B3; decode B3, int8; "),
        (["--only=MLA", "--plot=a.png"], "plot = a.png: is drawn of the sweep, which only = 'MLA' leaves out"),
    ],
)
def test_wrong_options_name_the_limit(monkeypatch, capsys, options, message):
    monkeypatch.setattr("sys.argv", ["bench", *options])
    with pytest.raises(SystemExit):
        bench.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_what_is_checked_on_a_chip_reaches_its_kernels(platform):
    """Every case, of formats by token and channel as well: none is left to XLA unnoticed."""
    seen = set()
    for op, name, case in verify.cases(platform, 40):
        refusal = importlib.import_module(f"pallas_kernels.{op}.{platform}").refusal
        format, per, dtype = case.get("format"), case.get("per", "token"), case.get("dtype")
        asked = Asked(format or dtype, case["page_size"], case["dims"], case.get("group", 1), per, dtype)
        assert refusal(asked) is None, (op, name, refusal(asked))
        seen.add((op, format, per if format else ""))
    formats = {(None, "")} | {(one, per) for one in ("int8", "fp8", "int4") for per in ("token", "channel")}
    assert seen >= {(op, *one) for op in ("paged_attention", "kv_write") for one in formats}


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


def test_a_clock_times_a_program_of_many_turns():
    """Each of which needs what the one before left: what is timed is not done once for all of them."""
    stopwatch = clock.Clock(
        clock.Work(lambda number, state, step: state + number * step, jnp.int32(0), jnp.int32(1), id)
    )
    assert stopwatch.num_turns > 8, "a microsecond's work is asked for many times"
    before, turns = int(stopwatch.state), stopwatch.num_turns
    stopwatch.sample()
    assert int(stopwatch.state) - before == 1 + turns * (turns - 1) // 2


TINY_PROBLEMS = [
    Problem("p", (32, 20), **TINY),
    Problem("q", (32,), **TINY, num_queries=32),
    Write("w", 32, 2, 16, 16, "int8"),
    Mixed("m", Problem("p", (32,), **TINY, num_queries=4), Problem("p", (32, 20), **TINY)),
    *(one for one in PROBLEMS["tiny"] if not isinstance(one, Problem | Write | Mixed)),
]


@pytest.mark.parametrize("problem", TINY_PROBLEMS, ids=lambda one: type(one).__name__)
def test_what_is_read_is_no_constant_of_the_program(problem, monkeypatch):
    """Which a compiler would copy, and compute with before the clock runs."""
    monkeypatch.setattr(peers, "PEERS", {})
    for name, make in problem.works().items():
        work = make()
        for traced in (
            jax.make_jaxpr(work.turn)(jnp.int32(0), work.state, work.arrays),
            jax.make_jaxpr(work.answer)(work.arrays),
        ):
            constants = [one.size for one in traced.consts if hasattr(one, "size")]
            assert max(constants, default=0) <= 64, (name, constants)


@pytest.mark.parametrize("problem", [Write("", 32, 2, 16, 16), Step("", 1, 2, 4, 8)], ids=["write", "step"])
def test_work_depends_on_the_turn_before(problem):
    """Two turns leave another state than one, as they write elsewhere, or carry a recurrence on."""
    (make,) = problem.works().values()
    work = make()
    first = work.turn(jnp.int32(0), work.state, work.arrays)
    second = work.turn(jnp.int32(1), first, work.arrays)
    assert any(bool((a != b).any()) for a, b in zip(first, second, strict=True))


def test_verdicts_compare_with_the_goal():
    def said(goals, *timings, others=()):
        ran = Timing("ours", 10.0, 12.0, 0.9)
        mine = Result(Problem("p", (1,), goals=goals), 9.0, [Timing("first", absent="not here"), ran, *timings])
        return list(verdicts([*others, mine]))

    assert said(Goals((0.85,))) == ["p (ours): 0.90 of the floor, goal 0.85: met"]
    assert said(Goals((0.95,)))[0].endswith("missed")
    assert said(Goals((0.85, 0.95)))[0].endswith("goal 0.85, stretch 0.95: met")
    assert said(Goals((0.85, 0.9)))[0].endswith("goal 0.85, stretch 0.90: stretch met")
    assert said(Goals((0.95,), spared_us=1.0)) == ["p (ours): 1.00 of the floor and 1 us, goal 0.95: met"]
    assert said(Goals(most_us=(9.0, 8.0)))[0].endswith("10.0 us, goal 9 us, stretch 8 us: missed")
    assert said(Goals(most_us=(12.0, 10.0)))[0].endswith("stretch met")
    peer = Goals(faster_than=(("peer", (1.5,)),))
    assert said(peer, Timing("peer", 16.0)) == ["p (ours): 1.60x peer, goal 1.50x: met"]
    assert said(peer, Timing("peer", 14.0))[0].endswith("1.40x peer, goal 1.50x: missed")
    assert said(peer, Timing("peer", absent="no torch"))[0].endswith("goal 1.50x: not compared, no torch")
    itself = Goals(faster_than=(("ours", (3.0,)),))
    assert said(itself)[0].endswith("goal 3.00x: not compared, it is that itself")
    other = Result(Problem("other", (1,)), 1.0, [Timing("ours", 20.0)])
    parts = Goals(over=((("other", "other"), (4.0,)),))
    assert said(parts, others=(other,)) == ["p (ours): 4.00x other + other, goal 4.00x: met"]
    assert said(parts) == []
    assert said(Goals()) == []
    failed = Result(Problem("p", (1,), goals=Goals((0.5,))), 1.0, failed="out of memory")
    assert list(verdicts([failed])) == ["p: nothing ran: out of memory"]


SMALL = Problem("p", (16,), **TINY)


def test_what_refuses_or_fails_is_a_line_of_the_table(monkeypatch, short):
    def broken(problem, inputs):
        raise RuntimeError("no such chip")

    monkeypatch.setattr(peers, "PEERS", {"peer": broken})
    result = measure.measure(SMALL, LIMITS, 1)
    assert [one.name for one in result.timings] == ["blocked", "reference", "peer"]
    assert result.timings[-1].absent == "RuntimeError: no such chip"
    assert result.best.name == "blocked"


def test_a_clock_that_fails_in_a_round_is_dropped(monkeypatch, short):
    monkeypatch.setattr(peers, "PEERS", {})
    real = clock.Clock.sample

    def sample(self):
        if len(self.wall_us) == 1:
            raise RuntimeError("out of memory")
        real(self)

    monkeypatch.setattr(clock.Clock, "sample", sample)
    result = measure.measure(SMALL, LIMITS, 2)
    assert [(one.device_us, one.absent) for one in result.timings] == [(None, "RuntimeError: out of memory")] * 2


def test_a_problem_without_a_reference_is_one_line_and_the_rest_is_kept(tmp_path, monkeypatch, capsys, short):
    class Broken(Problem):
        def wanted(self):
            raise MemoryError("out of memory")

    monkeypatch.setattr(peers, "PEERS", {})
    monkeypatch.setitem(PROBLEMS, "tiny", (Broken("broken", (16,), **TINY), SMALL))
    monkeypatch.setattr(
        "sys.argv", ["bench", "--rounds=1", "--cases=0", f"--json={tmp_path / 'found.json'}", "--only="]
    )
    assert bench.main() == 0
    assert "| broken | nobody | - | - | - | - | - | MemoryError: out of memory |" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [one["failed"] for one in found] == ["MemoryError: out of memory", ""]
    assert found[1]["timings"][0]["device_us"] > 0


def test_a_wrong_answer_is_no_figure_and_the_status_says_so(monkeypatch, capsys, short):
    real = api.IMPLEMENTATIONS["reference"]
    wrong = lambda *arrays, **how: tuple(1.1 * one for one in real(*arrays, **how))  # noqa: E731
    monkeypatch.setitem(api.IMPLEMENTATIONS, "reference", wrong)
    monkeypatch.setattr(peers, "PEERS", {})
    monkeypatch.setitem(PROBLEMS, "tiny", (SMALL,))
    monkeypatch.setattr("sys.argv", ["bench", "--rounds=1", "--cases=0"])
    assert bench.main() == 1
    assert "WRONG p: reference WRONG: differs by 1.0e-01" in capsys.readouterr().out


def test_tile_sizes_are_searched_for_what_is_looked_up():
    """A bucket of its own for every problem, but for those that the ops themselves look up together."""
    buckets = {}
    for problem in (one for one in PROBLEMS["tiny"] if isinstance(one, Problem)):
        inputs = make_inputs(problem)
        op = "paged_attention" if problem.num_queries == 1 else "paged_prefill"
        assert bucket_of(problem, inputs) == api.bucket_of(op, *inputs[:3], inputs.tables[0])
        buckets[problem.name] = bucket_of(problem, inputs)
    assert "by lists of heads" in buckets["decode B2, 1/2 of the pages by head"]
    assert len(set(buckets.values())) == len(buckets)
