"""A run of the bench: nothing that a piece does loses what the others found, and the file tells all of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench import environment, plan
from pallas_kernels.bench.problems import PROBLEMS, SWEEPS
from pallas_kernels.bench.record import latest, read
from pallas_kernels.bench.results import gather

PIECES = Path(__file__).with_name("pieces.py")
CASES = [
    ("paged_attention", "first"),
    ("paged_attention", "second"),
    ("kv_write", "first"),
    ("flash_attention", "first"),
    ("kv_write", "generated 0"),
]
A_FEW = ("decode B3", "decode B3, int8", "write 128 tokens, bfloat16", "a chunk of 8 at 64")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the bench on a chip that is not there: pieces answer at once, but for what is planted."""
    monkeypatch.setattr(plan, "cases", lambda platform, num_generated: [(op, name, {}) for op, name in CASES])
    monkeypatch.setitem(PROBLEMS, "tiny", tuple(problem for problem in PROBLEMS["tiny"] if problem.name in A_FEW))
    monkeypatch.setitem(SWEEPS, "tiny", ((2,), (16,)))
    planted = tmp_path / "planted.json"
    monkeypatch.setattr(
        plan,
        "command",
        lambda kind, name, options: (sys.executable, "-S", str(PIECES), "bench", str(planted), kind, name),
    )

    def run(*options, **plants):
        planted.write_text(json.dumps(plants))
        return bench.main([
            "--size=tiny", f"--json={tmp_path / 'found.jsonl'}", f"--cache={tmp_path}", "--workers=2", *options
        ])  # fmt: skip

    run.path = tmp_path / "found.jsonl"
    return run


def test_everything_runs_in_the_order_of_its_worth(run, capsys):
    assert run() == 0
    lines = read(run.path)
    assert [line["kind"] for line in lines] == [
        "header", "probe", *["case"] * 4, "ceilings", *["problem"] * 4, *["beside"] * 2, "sweep", "case", "summary"
    ]  # fmt: skip
    assert lines[7]["name"] == "decode B3"
    assert {line["outcome"] for line in lines[1:-1]} == {"done"}
    header = lines[0]
    assert (header["device"], header["size"], header["versions"]) == ("a chip", "tiny", {"jax": "0"})
    assert lines[-1]["right"]["paged_attention by mosaic_gpu"] == 2
    said = capsys.readouterr().out
    assert "| decode B3 | mosaic_gpu | 10.0 | 12.0 | " in said
    assert "decode B3, int8 (mosaic_gpu): 1.00x decode B3, goal 1.50x: missed" in said


def test_what_is_wrong_hangs_or_aborts_stops_nothing_else(run, capsys, monkeypatch):
    monkeypatch.setattr(plan, "CASE_S", 3.0)
    status = run(**{
        "case paged_attention: second": {"op": "paged_attention", "by": ["mosaic_gpu"], "wrong": "differs by 1"},
        "case kv_write: first": "hang",
        "case flash_attention: first": "abort",
        "problem decode B3": ["jax paged_attention", "abort"],
        "problem decode B3, int8": ["mosaic_gpu", "abort"],
        "beside decode B3, int8": ["jax paged_attention", "fail"],
    })  # fmt: skip
    assert status == 1
    lines = read(run.path)
    counts = latest(lines)
    assert counts["case", "kv_write: first"]["outcome"] == "timeout"
    assert counts["case", "flash_attention: first"]["reason"] == "status 134 (SIGABRT)"
    assert counts["case", "kv_write: generated 0"]["outcome"] == "done"
    headline = [line for line in lines if line["name"] == "decode B3" and line["kind"] == "problem"]
    assert [line["outcome"] for line in headline] == ["failed", "done"], "once more without the peer"
    ours, peer = headline[1]["answer"]["timings"]
    assert ours["device_us"] == 10.0
    assert peer["absent"] == "ended its process: status 134 (SIGABRT)"
    summary = lines[-1]
    wrong = " ".join(summary["wrong"])
    for failure in (
        "paged_attention by mosaic_gpu, second: differs by 1",
        "kv_write, first: killed after 3 s",
        "flash_attention, first: status 134 (SIGABRT)",
        "decode B3, int8: mosaic_gpu ended its process: status 134 (SIGABRT)",
    ):
        assert failure in wrong
    assert "jax paged_attention" not in wrong, "a peer's end is its own"
    verdict = next(text for text in summary["verdicts"] if text.startswith("decode B3 (mosaic_gpu): 0."))
    assert verdict.endswith("does not count: 1 case of paged_attention by mosaic_gpu wrong")
    said = capsys.readouterr().out
    assert "WRONG paged_attention by mosaic_gpu, second: differs by 1" in said
    assert "| write 128 tokens, bfloat16 | mosaic_gpu | 10.0 | " in said
    assert "1.0e-03; 1 case of kv_write wrong |" in said
    with pytest.raises(SystemExit):
        run()
    assert "exists already; resume it, or name a new file" in capsys.readouterr().err


def test_resuming_runs_what_is_missing_only(run, monkeypatch, capsys):
    monkeypatch.setattr(plan, "CASE_S", 1.0)
    assert (
        run(**{"case kv_write: first": "hang", "ceilings": "fail", "problem decode B3": ["mosaic_gpu", "abort"]}) == 1
    )
    assert "goal 0.85 of the floor: not compared, the ceilings are not known" in capsys.readouterr().out
    number = len(read(run.path))
    with run.path.open("a") as file:
        file.write('{"kind": "case", "na')
    assert run("--resume") == 1, "what failed by itself is told again"
    added = read(run.path)[number:]
    assert [(line["kind"], line["name"]) for line in added] == [
        ("resumed", ""), ("probe", ""), ("case", "kv_write: first"), ("summary", "")
    ]  # fmt: skip
    assert "| write 128 tokens, bfloat16 | mosaic_gpu | 10.0 | " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--resume", probe={"device": "H200", "platform": "gpu", "versions": {"jax": "0"}})
    assert "device = 'H200': " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--resume", "--rounds=3")
    assert "rounds = 3: " in capsys.readouterr().err


def test_the_budget_ends_the_run(run, monkeypatch, capsys):
    """A hang of everything: what runs is cut, what was not run is written down."""
    monkeypatch.setattr(bench, "LEAST_BUDGET_S", 1.0)
    monkeypatch.setattr(bench, "RESERVE_S", 0.5)
    plants = {f"case {op}: {name}": "hang" for op, name in CASES}
    status = run("--budget=8", **plants, **{f"problem {name}": ["mosaic_gpu", "hang"] for name in A_FEW})
    assert status in (0, 1)
    lines = read(run.path)
    assert lines[-1]["kind"] == "summary"
    outcomes = {(line["kind"], line["name"]): line["outcome"] for line in lines[1:-1]}
    assert "cut" in outcomes.values()
    assert "skipped" in outcomes.values()
    assert len(outcomes) == 14
    assert all(line.get("reason") for line in lines[1:-1] if line["outcome"] != "done")
    assert "problem a chunk of 8 at 64" in lines[-1]["missing"]["skipped"]
    said = capsys.readouterr().out
    assert "| decode B3 | jax paged_attention | - | - | - | - | - | not reached: killed after " in said
    assert "| a chunk of 8 at 64 | nobody | - | - | - | - | - | skipped: 0.0 s were left" in said


def test_where_the_probe_fails_nothing_else_is_run(run, capsys):
    assert run(probe="fail") == 1
    lines = read(run.path)
    assert [line["kind"] for line in lines] == ["header", "probe", "summary"]
    assert lines[1]["stderr"].endswith("the reason\n")
    assert lines[-1]["wrong"] == ["probe: status 3"]
    assert "the reason" in capsys.readouterr().out
    run.path.unlink()
    assert run() == 0
    assert run("--resume", probe="abort") == 1, "that it went well before is no excuse"


def test_an_interrupted_run_tells_what_it_knows(run, monkeypatch, capsys):
    real = plan.stages

    def stages(*given):
        first, *rest = real(*given)
        yield first
        os.kill(os.getpid(), signal.SIGTERM)
        yield from rest

    monkeypatch.setattr(plan, "stages", stages)
    assert run() == 130
    assert [line["kind"] for line in read(run.path)] == ["header", "probe", *["case"] * 4, "summary"]
    assert "interrupted by SIGTERM; go on with --resume" in capsys.readouterr().out


def test_an_op_whose_kernel_no_case_ran_is_wrong(run):
    by_xla = {"op": "kv_write", "by": ["reference"], "wrong": ""}
    assert run(**{"case kv_write: first": by_xla, "case kv_write: generated 0": by_xla}) == 1
    assert gather(read(run.path)).wrong == ["kv_write: no case ran by mosaic_gpu"]


def test_a_file_is_reported_later(run, tmp_path, capsys):
    assert run(**{"problem a chunk of 8 at 64": "fail"}) == 1
    with_problem = capsys.readouterr().out
    plot = tmp_path / "bandwidth.png"
    assert bench.main(["report", str(run.path), f"--plot={plot}"]) == 1
    said = capsys.readouterr().out
    for line in with_problem.splitlines():
        if line.startswith(("| decode", "| write", "decode B3", "WRONG")):
            assert line in said
    assert "device: a chip" in said
    assert "WRONG problem a chunk of 8 at 64: status 3" in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        bench.main(["report", str(tmp_path / "none.jsonl")])


def test_a_problem_that_is_no_more_is_still_told(run, monkeypatch, capsys):
    assert run() == 0
    monkeypatch.setitem(PROBLEMS, "tiny", ())
    assert bench.main(["report", str(run.path)]) == 0
    assert "| decode B3 | mosaic_gpu | 10.0 | 12.0 | - | - | 1.00 | 1.0e-03 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds=0"], "rounds = 0: must be at least 1"),
        (["--budget=5"], "budget = 5.0: must be at least 30"),
        (["--budget=nan"], "budget = nan: must be at least 30"),
        (["--resume"], "resume: needs the file to go on with, as --json"),
        (["--size=tiny", "--only=no such"], "only = 'no such': must be part of one of: decode B3; decode B3, int8; "),
        (["--leave-out", *plan.SHARES], "leave-out: must leave a stage to be run"),
        (["--only=MLA", "--plot=a.png"], "plot = a.png: is drawn of the sweep, which only = 'MLA' leaves out"),
    ],
)
def test_wrong_options_name_the_limit(capsys, options, message):
    with pytest.raises(SystemExit):
        bench.main(options)
    assert message in capsys.readouterr().err


def test_pieces_share_a_cache_and_the_device(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    assert environment.default_cache() == tmp_path / "jax", "jax's own, where one is named"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = environment.default_cache()
    assert folder == tmp_path / "pallas_kernels" / "compiled"
    found = environment.child_env(folder)
    assert found["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert found["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert environment.default_cache().is_dir()


def test_of_the_stages_that_are_not_left_out_the_last_may_use_up_the_budget():
    options = bench.make_parser().parse_args(["--size=tiny", "--cases=0", "--leave-out", "named cases", "headline"])
    found = {stage.name: stage.share for stage in plan.stages(options, "cpu")}
    assert found == {"ceilings": 0.36, "problems": 0.84, "other peers, sweep": 1.0}


PLANNING = """
from pallas_kernels.bench import __main__ as bench, plan
from jax._src import xla_bridge
options = bench.make_parser().parse_args(["--size=full"])
print(sum(len(one.pieces) for one in plan.stages(options, "gpu")))
assert not xla_bridge.backends_are_initialized()
"""


def test_the_runner_touches_no_device():
    """What it held, no piece could use; and what hangs there would take all along."""
    done = subprocess.run(
        [sys.executable, "-c", PLANNING], capture_output=True, text=True, check=False, cwd=PIECES.parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


@pytest.mark.slow
def test_the_command_runs_for_real(tmp_path, monkeypatch, capsys):
    real = plan.cases
    few = lambda *given: [case for case in real(*given) if case[1] in ("one-hot attention", "int8 by token")]  # noqa: E731
    monkeypatch.setattr(plan, "cases", few)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    path = tmp_path / "found.jsonl"
    options = ["--rounds=1", "--cases=0", f"--json={path}", f"--cache={tmp_path / 'cache'}", "--only=decode B3"]
    assert bench.main(options) == 0
    found = gather(read(path))
    assert found.right["paged_attention", "blocked"] >= 1
    assert found.header["device"] == "cpu"
    headline, int8 = found.results
    assert [timing.name for timing in headline.timings][:2] == ["blocked", "reference"]
    assert all(timing.fraction > 0 and timing.error < 1e-2 for timing in headline.timings if timing.device_us)
    assert int8.best.name == "blocked"
    assert any((tmp_path / "cache").iterdir()), "compiled programs are kept"
    said = capsys.readouterr().out
    assert "cuDNN" in said
    assert "decode B3, int8 (blocked): " in said
