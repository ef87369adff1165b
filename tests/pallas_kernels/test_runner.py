"""The runner of pieces: whatever a piece does, and whenever the run ends, what was known is in the file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pallas_kernels.bench.record import Record, finite, latest, read
from pallas_kernels.bench.runner import Piece, Runner, ask, digest

PIECES = Path(__file__).with_name("pieces.py")
ROOT = PIECES.parents[2]
IDENTITY = {"device": "none", "code": "1"}


def piece(name, what="", *arguments, limit_s=60.0, least_s=0.5):
    command = (sys.executable, "-S", str(PIECES), what or name, *map(str, arguments))
    return Piece("planted", name, command, limit_s, least_s)


def run(path, *pieces, workers=1, share=1.0, **options):
    with Runner(path, IDENTITY, **options) as runner:
        return runner.run(pieces, workers=workers, share=share)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def soon(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_hang_an_abort_and_a_failure_end_only_themselves(tmp_path):
    names = ("answer", "hang", "abort", "fail", "silent", "torn", "leave_a_child")
    pieces = [piece(name, limit_s=3.0 if name == "hang" else 60.0) for name in names]
    lines = run(tmp_path / "r.jsonl", *pieces, piece("last", "answer", 43), workers=3)
    found = {line["name"]: line for line in lines}
    assert [line["name"] for line in lines] == [*names, "last"]
    assert found["answer"]["outcome"] == "done"
    assert found["answer"]["answer"] == {"value": 42}
    assert found["last"]["answer"] == {"value": 43}
    assert found["hang"]["outcome"] == "timeout"
    assert found["hang"]["answer"]["step"] == 2, "what was printed last is kept"
    soon(lambda: not any(map(is_alive, found["hang"]["answer"]["pids"])))  # it is killed with its children
    assert found["abort"]["reason"] == "status 134 (SIGABRT)"
    assert found["abort"]["answer"] == {"step": 1}
    assert "Fatal Python error: Aborted" in found["abort"]["stderr"]
    assert found["fail"]["reason"] == "status 3"
    assert found["fail"]["stderr"].endswith("the reason\n")
    assert len(found["fail"]["stderr"]) == 2000
    assert found["silent"]["outcome"] == "failed"
    assert found["torn"]["answer"] == {"step": 1}
    soon(lambda: not is_alive(found["leave_a_child"]["answer"]["pids"][0]))
    kept = latest(read(tmp_path / "r.jsonl"))
    assert [kept["planted", name] for name in found] == list(found.values())


def test_the_budget_ends_what_runs_and_skips_the_rest(tmp_path):
    began = time.monotonic()
    pieces = piece("long", least_s=50.0), piece("hang"), piece("answer")
    lines = run(tmp_path / "r.jsonl", *pieces, budget_s=8.0, share=0.5)
    assert time.monotonic() - began < 8.0
    assert [line["outcome"] for line in lines] == ["skipped", "cut", "skipped"]
    assert "it needs 50" in lines[0]["reason"]
    assert lines[1]["answer"]["step"] == 2


def test_resuming_runs_what_was_not_settled(tmp_path):
    path, counter = tmp_path / "r.jsonl", tmp_path / "counter"
    ran, cut = piece("ran", "count", counter), piece("cut", "hang")
    first = run(path, ran, piece("broken", "fail"), piece("slow", "hang", limit_s=0.7))
    first += run(path, cut, piece("late", "answer"), resume=True, budget_s=2.0)
    assert [line["outcome"] for line in first] == ["done", "failed", "timeout", "cut", "skipped"]
    again = [ran, piece("broken", "answer"), piece("slow", "answer"), piece("cut", "answer"), piece("late", "answer")]
    told = []
    second = run(path, *again, piece("new", "answer"), resume=True, tell=told.append)
    assert [line["outcome"] for line in second] == ["done", "failed", "done", "done", "done", "done"]
    assert second[:2] == first[:2], "what is settled is told from the file"
    assert told == second
    assert counter.read_text() == "."
    assert [line["kind"] for line in read(path)].count("planted") == 5 + 4


def test_a_record_of_something_else_is_not_resumed(tmp_path):
    path = tmp_path / "r.jsonl"
    run(path, piece("answer"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        Runner(path, IDENTITY)
    with pytest.raises(ValueError, match=r"device = 'H200': .*cannot be resumed, as it was begun with 'none'"):
        Runner(path, IDENTITY | {"device": "H200"}, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("tail", [b'{"kind": "planted", "na', b'{"kind": "planted", "name": "b", "outcome": "done"}'])
def test_a_torn_last_line_is_mended(tmp_path, tail):
    path = tmp_path / "r.jsonl"
    run(path, piece("answer"))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    is_torn = not tail.endswith(b"}")
    assert len(read(path)) == 3 - is_torn
    run(path, piece("more", "answer"), resume=True)
    names = [line["name"] for line in read(path)]
    assert names == ["", "answer", *["b"] * (not is_torn), "", "more"]
    path.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(ValueError, match="line 1 is no JSON object"):
        read(path)
    path.write_bytes(whole.splitlines(keepends=True)[1])
    with pytest.raises(ValueError, match="must be a header"):
        read(path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_leaves_a_file_and_no_process(tmp_path, number):
    path = tmp_path / "r.jsonl"
    command = [sys.executable, str(PIECES), "run", str(path), "answer", "hang", "answer"]
    runner = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    children = f"/proc/{runner.pid}/task/{runner.pid}/children"
    of = lambda path: [int(number) for number in Path(path).read_text().split()]  # noqa: E731

    def descendants():
        guards = of(children)
        pieces = [child for guard in guards for child in of(f"/proc/{guard}/task/{guard}/children")]
        return guards + pieces + [child for piece in pieces for child in of(f"/proc/{piece}/task/{piece}/children")]

    soon(lambda: path.exists() and path.read_bytes().count(b"\n") == 2 and len(descendants()) == 3)
    living = descendants()
    runner.send_signal(number)
    said = runner.communicate(timeout=20)[1].decode()
    soon(lambda: not any(map(is_alive, living)))
    lines = read(path)
    assert [line.get("outcome") for line in lines[:2]] == [None, "done"]
    if number == signal.SIGKILL:
        assert len(lines) == 2
    else:
        assert f"interrupted by {number.name}" in said
        assert [line["outcome"] for line in lines[2:]] == ["interrupted"]
    with Runner(path, {"device": "none"}, resume=True) as resumed:
        again = resumed.run([piece("0", "fail"), piece("1", "answer"), piece("2", "answer")])
    assert [line["outcome"] for line in again] == ["done"] * 3


def test_signals_are_given_back_and_ignored_ones_stay_so(tmp_path):
    of = lambda: [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)]  # noqa: E731
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = of()
    with Runner(tmp_path / "r.jsonl", IDENTITY):
        assert of()[0] == signal.SIG_IGN
        assert of()[1] != before[1]
    assert of() == before
    signal.signal(signal.SIGHUP, former)


def test_what_knows_less_does_not_count():
    line = {"kind": "a", "name": "b"}
    done, timeout = line | {"outcome": "done", "answer": 1}, line | {"outcome": "timeout", "answer": 2}
    skipped, other = line | {"outcome": "skipped"}, line | {"outcome": "timeout"}
    count = lambda *lines: latest(lines)["a", "b"]  # noqa: E731
    assert count(timeout, done) == done
    assert count(timeout, skipped) == timeout
    assert count(done, skipped) == done
    assert count(other, skipped) == skipped
    assert count(skipped, other) == other
    assert count(timeout, other) == timeout, "what was answered before it ended is not lost"


def test_a_record_has_no_nan(tmp_path):
    record = Record(tmp_path / "r.jsonl", {"x": float("inf")})
    record.keep({"kind": "a", "name": "b", "answer": {"errors": [1.0, float("nan")]}})
    record.close()
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[1])["answer"] == {"errors": [1.0, None]}
    assert read(tmp_path / "r.jsonl")[0]["x"] is None
    assert finite((1, {"a": -float("inf")})) == [1, {"a": None}]


def test_a_piece_can_be_asked_before_there_is_a_record():
    assert ask(piece("answer"))["answer"] == {"value": 42}
    assert ask(piece("hang", limit_s=0.5))["outcome"] == "timeout"


def test_the_digest_is_of_the_code(tmp_path):
    (tmp_path / "a.py").write_text("1")
    before = digest(tmp_path)
    (tmp_path / "notes.txt").write_text("2")
    assert digest(tmp_path) == before
    (tmp_path / "a.py").write_text("2")
    assert digest(tmp_path) != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers = 0: must be at least 1"),
        ({"share": 0.0}, r"share = 0.0: must be in \(0, 1\]"),
        ({"budget_s": 0.0}, "budget_s = 0.0: must be positive"),
    ],
)
def test_wrong_options_name_the_limit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "r.jsonl", piece("answer"), **options)
    with pytest.raises(ValueError, match=r"limit_s = 0\.0: must be positive"):
        piece("answer", limit_s=0.0)
    with pytest.raises(ValueError, match="two of them have one kind and name"):
        run(tmp_path / "s.jsonl", piece("answer"), piece("answer"))
