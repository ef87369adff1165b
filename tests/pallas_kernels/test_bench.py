"""The bench on a CPU: that it measures what it says, and gives no figure to what is wrong."""

import importlib
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import clock, measure, peers, piece, verify
from pallas_kernels.bench.goals import Goals, Result, Timing, verdicts
from pallas_kernels.bench.inputs import bucket_of, make_inputs
from pallas_kernels.bench.others import Mixed, Write
from pallas_kernels.bench.paged import Problem, planned
from pallas_kernels.bench.problems import EXPECTED_S, HEADLINE, PROBLEMS, SWEEPS, TINY
from pallas_kernels.bench.recurrences import DeltaScan, DeltaStep, Step
from pallas_kernels.formats import kivi
from pallas_kernels.paged_attention import Lists, api
from pallas_kernels.selection import Asked

LIMITS = {"read_bytes_per_s": 1e9, "copy_bytes_per_s": 1e9, "product_flops_per_s": 1e12}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(clock, "LOOP_SECONDS", 0.0)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_what_is_checked_on_a_chip_reaches_its_kernels(platform):
    """Every case, of formats by token and channel as well: none is left to XLA unnoticed."""
    seen = set()
    for op, name, case in verify.cases(platform, 40):
        refusal = importlib.import_module(f"pallas_kernels.{op}.{platform}").refusal
        format, per, dtype = case.get("format"), case.get("per", "token"), case.get("dtype")
        is_latent = case.get("is_latent", False)
        schemes = kivi(*case["schemes"]) if case.get("schemes") else None
        format = schemes[0].format if schemes else format
        group = case.get("group", 1)
        asked = Asked(format or dtype, case["page_size"], case["dims"], group, per, dtype, is_latent, schemes)
        assert refusal(asked) is None, (op, name, refusal(asked))
        seen.add((op, format, "kivi" if schemes else per if format else ""))
    formats = {(None, "")} | {(name, per) for name in ("int8", "fp8", "int4") for per in ("token", "channel")}
    assert seen >= {(op, *format_and_per) for op in ("paged_attention", "kv_write") for format_and_per in formats}
    assert ("paged_attention", "int4", "kivi") in seen


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
    floors = {problem.name: problem.floor_us(limits) for problem in PROBLEMS["full"]}
    expected = {
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
        "gated delta rule, 16384 tokens, H32": 16384 * 32 * (2 * 256 + 2) * 2 / 4.3e6,
        "gated delta rule, decode step B64, H32": 2 * 64 * 32 * 128 * 128 * 4 / 4.3e6,
    }
    for name, floor in expected.items():
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
    assert tables.max() < inputs.pages.num_pages


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
    *(problem for problem in PROBLEMS["tiny"] if not isinstance(problem, Problem | Write | Mixed)),
]


@pytest.mark.parametrize("problem", TINY_PROBLEMS, ids=lambda problem: type(problem).__name__)
def test_what_is_read_is_no_constant_of_the_program(problem, monkeypatch):
    """Which a compiler would copy, and compute with before the clock runs."""
    monkeypatch.setattr(peers, "PEERS", {})
    for name, make in problem.works().items():
        work = make()
        for traced in (
            jax.make_jaxpr(work.turn)(jnp.int32(0), work.state, work.arrays),
            jax.make_jaxpr(work.answer)(work.arrays),
        ):
            constants = [constant.size for constant in traced.consts if hasattr(constant, "size")]
            assert max(constants, default=0) <= 64, (name, constants)


def test_the_problem_of_the_delta_rule_is_that_rule():
    """Token by token in float64, from an empty state, of the arrays that the problem makes."""
    problem = DeltaScan("", 2, 3, 5, 4, 70)
    beta, values, queries, keys, log_decay = (np.float64(array) for array in problem.arrays())
    state, wanted = np.zeros((2, 3, 4, 5)), []
    for t in range(70):
        state = np.exp(log_decay[:, t, :, :, None]) * state
        read = np.einsum("bhn,bhnp->bhp", keys[:, t], state)
        state += np.einsum("bh,bhn,bhp->bhnp", beta[:, t], keys[:, t], values[:, t] - read)
        wanted.append(np.einsum("bhn,bhnp->bhp", queries[:, t], state))
    np.testing.assert_allclose(problem.wanted(), np.stack(wanted, 1), atol=1e-5)


def test_one_token_of_the_delta_rule_is_that_rule():
    problem = DeltaStep("", 2, 3, 5, 4)
    state, values, beta, queries, keys, log_decay = (np.float64(array) for array in problem.arrays())
    state = np.exp(log_decay)[..., None] * state
    state += np.einsum("bh,bhn,bhp->bhnp", beta, keys, values - np.einsum("bhn,bhnp->bhp", keys, state))
    np.testing.assert_allclose(problem.wanted(), np.einsum("bhn,bhnp->bhp", queries, state), atol=1e-5)


WRITE, STEPS = Write("", 32, 2, 16, 16), (Step("", 1, 2, 4, 8), DeltaStep("", 1, 2, 4, 8))


@pytest.mark.parametrize("problem", [WRITE, *STEPS], ids=lambda problem: problem.ops[0])
def test_work_depends_on_the_turn_before(problem):
    """Two turns leave another state than one, as they write elsewhere, or carry a recurrence on."""
    (make,) = problem.works().values()
    work = make()
    first = work.turn(jnp.int32(0), work.state, work.arrays)
    second = work.turn(jnp.int32(1), first, work.arrays)
    assert any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


def test_verdicts_compare_with_the_goal():
    def said(goals, *timings, others=()):
        ran = Timing("ours", 10.0, 12.0, 0.9)
        timings = [Timing("first", absent="not here"), ran, *timings]
        mine = Result(Problem("p", (1,), goals=goals), timings, floor_us=9.0)
        return list(verdicts([*others, mine]))

    assert said(Goals((0.85,))) == ["p (ours): 0.90 of the floor, goal 0.85: met"]
    assert said(Goals((0.95,)))[0].endswith("missed")
    assert said(Goals((0.85, 0.95)))[0].endswith("goal 0.85, stretch 0.95: met")
    assert said(Goals((0.85, 0.9)))[0].endswith("goal 0.85, stretch 0.90: stretch met")
    assert said(Goals((0.95,), spared_us=1.0)) == ["p (ours): 1.00 of the floor and 1 us, goal 0.95: met"]
    within = "p (ours): 10.0 us, within the 11 us that are not held against it: met"
    assert said(Goals((0.95,), spared_us=11.0)) == [within], "no share of a time below zero"
    assert said(Goals(most_us=(9.0, 8.0)))[0].endswith("10.0 us, goal 9 us, stretch 8 us: missed")
    assert said(Goals(most_us=(12.0, 10.0)))[0].endswith("stretch met")
    peer = Goals(faster_than=(("peer", (1.5,)),))
    assert said(peer, Timing("peer", 16.0)) == ["p (ours): 1.60x peer, goal 1.50x: met"]
    assert said(peer, Timing("peer", 14.0))[0].endswith("1.40x peer, goal 1.50x: missed")
    assert said(peer, Timing("peer", absent="no torch"))[0].endswith("goal 1.50x: not compared, no torch")
    itself = Goals(faster_than=(("ours", (3.0,)),))
    assert said(itself)[0].endswith("goal 3.00x: not compared, it is that itself")
    other = Result(Problem("other", (1,)), [Timing("ours", 20.0)])
    parts = Goals(over=((("other", "other"), (4.0,)),))
    assert said(parts, others=(other,)) == ["p (ours): 4.00x other + other, goal 4.00x: met"]
    assert said(parts) == []
    assert said(Goals()) == []
    unknown = Result(Problem("p", (1,), goals=Goals((0.5,))), [Timing("ours", 20.0, doubt="1 case wrong")])
    assert list(verdicts([unknown])) == [
        "p (ours): goal 0.50 of the floor: not compared, the ceilings are not known; does not count: 1 case wrong"
    ]
    failed = Result(Problem("p", (1,), goals=Goals((0.5,))), failed="out of memory")
    assert list(verdicts([failed])) == ["p: nothing ran: out of memory"]


SMALL = Problem("p", (16,), **TINY)


def test_what_refuses_or_fails_is_a_line_of_the_table(monkeypatch, short):
    def broken(problem, inputs):
        raise RuntimeError("no such chip")

    monkeypatch.setattr(peers, "PEERS", {"peer": broken})
    result = measure.measure(SMALL, 1)
    assert [timing.name for timing in result.timings] == ["blocked", "reference", "peer"]
    assert result.timings[-1].absent == "RuntimeError: no such chip"
    assert result.best.name == "blocked"
    assert [timing.has_failed for timing in result.timings] == [False, False, True]


def test_a_clock_that_fails_in_a_round_is_dropped(monkeypatch, short):
    monkeypatch.setattr(peers, "PEERS", {})
    real = clock.Clock.sample

    def sample(self):
        if len(self.wall_us) == 1:
            raise RuntimeError("out of memory")
        real(self)

    monkeypatch.setattr(clock.Clock, "sample", sample)
    result = measure.measure(SMALL, 2)
    assert [(timing.device_us, timing.absent) for timing in result.timings] == [
        (None, "RuntimeError: out of memory")
    ] * 2


def test_a_problem_without_a_reference_says_why(short):
    class Broken(Problem):
        def wanted(self):
            raise MemoryError("out of memory")

    result = measure.measure(Broken("broken", (16,), **TINY), 1)
    assert (result.failed, result.timings) == ("MemoryError: out of memory", [])


def test_a_wrong_answer_is_no_figure(monkeypatch, short):
    real = api.IMPLEMENTATIONS["reference"]
    wrong = lambda *arrays, **how: tuple(1.1 * array for array in real(*arrays, **how))  # noqa: E731
    monkeypatch.setitem(api.IMPLEMENTATIONS, "reference", wrong)
    monkeypatch.setattr(peers, "PEERS", {})
    first, second = measure.measure(SMALL, 1).timings
    assert first.device_us > 0
    assert (second.is_wrong, second.device_us, second.absent) == (True, None, "WRONG: differs by 1.0e-01")


def test_what_is_known_is_told_before_every_step(monkeypatch, short):
    """So that a process that ends says at whom, and what it had measured. Those at whom it ended are left out the next
    time."""
    monkeypatch.setattr(peers, "PEERS", {})
    told = []
    tell = lambda result: told.append((result.doing, [timing.device_us is not None for timing in result.timings]))  # noqa: E731
    result = measure.measure(SMALL, 2, tell=tell)
    none, first, both = [False, False], [True, False], [True, True]
    assert told == [("", []), ("blocked", none), ("reference", none), ("blocked", none), ("reference", first),
                    ("blocked", both), ("reference", both)]  # fmt: skip
    assert result.doing == ""
    left = measure.measure(SMALL, 1, without={"blocked": "ended its process"})
    assert [(timing.absent, timing.has_failed) for timing in left.timings] == [("ended its process", True), ("", False)]
    assert left.best.name == "reference"
    chosen = measure.measure(SMALL, 1, chosen=lambda names: names[1:])
    assert [timing.name for timing in chosen.timings] == ["reference"]


def test_a_floor_waits_for_the_ceilings():
    result = Result(SMALL, [Timing("ours", 4.0)])
    result.judge({})
    assert result.floor_us is None
    result.judge(LIMITS)
    assert result.timings[0].fraction == result.floor_us / 4.0 == SMALL.live_bytes / 1e9 * 1e6 / 4.0


def test_a_case_says_by_whom_it_was_answered(monkeypatch):
    op, name, _ = verify.cases("cpu", 0)[0]
    first, last = verify.check(op, name, 0)
    assert (first["by"], last) == ([], {"op": op, "by": ["blocked"], "wrong": ""})
    real = api.IMPLEMENTATIONS["blocked"]
    wrong = lambda *arrays, **how: tuple(array if array is None else 1.1 * array for array in real(*arrays, **how))  # noqa: E731
    monkeypatch.setitem(api.IMPLEMENTATIONS, "blocked", wrong)
    *_, last = verify.check(op, name, 0)
    assert last["by"] == ["blocked"]
    assert last["wrong"].startswith("AssertionError")
    with pytest.raises(ValueError, match="case = kv_write: no such: is none of the"):
        next(verify.check("kv_write", "no such", 0))


def run_piece(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["piece", *arguments, "--rounds=1"])
    assert piece.main() == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_pieces_print_what_they_know(monkeypatch, capsys, short):
    monkeypatch.setitem(SWEEPS, "tiny", ((2,), (16,)))
    assert run_piece(monkeypatch, capsys, "probe")[-1]["device"] == jax.devices()[0].device_kind
    assert [len(answer) for answer in run_piece(monkeypatch, capsys, "ceilings")] == [1, 2, 3]
    named = f"paged_attention: {verify.cases('cpu', 0)[0][1]}"
    assert run_piece(monkeypatch, capsys, "case", named)[-1]["by"] == ["blocked"]
    (timing,) = run_piece(monkeypatch, capsys, "sweep", "B2 S16")[-1]["timings"]
    assert (timing["name"], timing["error"]) == ("blocked", None)
    found = run_piece(monkeypatch, capsys, "problem", HEADLINE["tiny"], "--without", "blocked", "why")[-1]
    assert found["problem"]["lengths"] == [40, 64, 9]
    assert [timing["name"] for timing in found["timings"]] == ["blocked", "reference", *list(peers.PEERS)[:-1]]
    assert found["timings"][0]["absent"] == "why"
    assert found["timings"][1]["device_us"] > 0


def test_a_problem_is_timed_beside_the_peers_of_its_goals_first(monkeypatch, capsys):
    """And beside every other one later, without anybody twice; the headline's with all that are not slow."""
    asked = {}

    def measured(problem, rounds, chosen, **_):
        asked[problem.name] = chosen(["ours", "other", *peers.PEERS])
        return Result(problem)

    monkeypatch.setattr(piece, "measure", measured)
    for problem in (PROBLEMS["tiny"][0], replace(SMALL, goals=Goals(faster_than=(("cuDNN, dense", (1.0,)),)))):
        monkeypatch.setitem(PROBLEMS, "tiny", (problem,))
        found = []
        for kind in ("problem", "beside", "slow"):
            run_piece(monkeypatch, capsys, kind, problem.name)
            found.append(asked[problem.name])
        assert found[0] == ["ours", *(["cuDNN, dense"] if problem.name == "p" else ["other", *list(peers.PEERS)[:-1]])]
        assert found[1][0] == found[2][0] == "ours"
        assert sorted(found[0][1:] + found[1][1:] + found[2][1:]) == sorted(["other", *peers.PEERS])
        assert tuple(found[2][1:]) == peers.SLOW


def test_every_full_problem_has_a_place_in_the_order():
    assert set(EXPECTED_S) == {problem.name for problem in PROBLEMS["full"]}
    assert next(iter(EXPECTED_S)) == HEADLINE["full"]
    assert HEADLINE["tiny"] in {problem.name for problem in PROBLEMS["tiny"]}


def test_tile_sizes_are_searched_for_what_is_looked_up():
    """A bucket of its own for every problem, but for those that the ops themselves look up together."""
    buckets = {}
    for problem in (candidate for candidate in PROBLEMS["tiny"] if isinstance(candidate, Problem)):
        inputs = make_inputs(problem)
        lists = Lists(inputs.tables[0], inputs.starts[0])
        assert bucket_of(inputs) == api.bucket_of(inputs.queries, inputs.pages, lists)
        buckets[problem.name] = bucket_of(inputs)
    assert "by lists of heads" in buckets["decode B2, 1/2 of the pages by head"]
    assert len(set(buckets.values())) == len(buckets)


def test_layers_that_share_plans_answer_as_calls_without():
    problem = PROBLEMS["tiny"][0]
    work = planned(problem, make_inputs(problem), "blocked")
    np.testing.assert_array_equal(jax.jit(work.answer)(work.arrays), problem.wanted())
    assert work.num_calls == 2, "a layer for each table"
