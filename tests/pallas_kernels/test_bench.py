"""The bench on a CPU: that it measures what it says, and times nothing that is wrong."""

import json

import numpy as np
import pytest

from pallas_kernels import bench
from pallas_kernels.kv_write import proof as write_proof
from pallas_kernels.paged_attention import api, proof

LIMITS = {"read_bytes_per_s": 1e9, "product_flops_per_s": 1e9}
TINY = {"num_heads": 4, "num_kv_heads": 2, "dim": 16, "page_size": 16}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench, "LOOP_SECONDS", 0.0)
    monkeypatch.setattr(proof, "CASES", dict(list(proof.CASES.items())[:1]))
    monkeypatch.setattr(write_proof, "CASES", dict(list(write_proof.CASES.items())[:1]))
    monkeypatch.setitem(bench.PROBLEMS, "tiny", bench.PROBLEMS["tiny"][:3])
    monkeypatch.setitem(bench.SWEEPS, "tiny", ((2,), (16, 32)))


def test_the_command_writes_a_table_json_and_a_plot(tmp_path, monkeypatch, capsys):
    paths = tmp_path / "results" / "found.json", tmp_path / "bandwidth.png"
    monkeypatch.setattr("sys.argv", ["bench", "--rounds=1", "--cases=1", f"--json={paths[0]}", f"--plot={paths[1]}"])
    assert bench.main() == 0
    said = capsys.readouterr().out
    assert "every case right" in said
    assert "write 128 tokens, int4 (reference)" in said
    assert "| decode B3 | blocked | " in said
    found = json.loads(paths[0].read_text())
    by_name = {one["name"]: one for one in found["results"][0]["timings"]}
    assert list(by_name) == ["blocked", "reference", *bench.PEERS]
    assert by_name["reference"]["error"] < 1e-2
    assert "cuDNN" in by_name["cuDNN, dense"]["absent"]
    quantised = {one["name"]: one for one in found["results"][1]["timings"]}
    assert quantised["blocked"]["device_us"] > 0
    assert "16 bits" in quantised["torch SDPA, dense"]["absent"] or "torch" in quantised["torch SDPA, dense"]["absent"]
    assert [one["name"] for one in found["wholes"]][:2] == [
        "mixed: a chunk of 8 at 64 + decode B3",
        "write 128 tokens, bfloat16",
    ]
    assert [one["context"] for one in found["bandwidth"]] == [16, 32]
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_nothing_is_timed_where_a_kernel_is_wrong(monkeypatch, capsys):
    monkeypatch.setitem(api.IMPLEMENTATIONS, "blocked", lambda *arrays, **_: (0 * arrays[0], 0 * arrays[0][..., 0]))
    monkeypatch.setattr("sys.argv", ["bench", "--cases=0"])
    assert bench.main() == 1
    said = capsys.readouterr().out
    assert "WRONG lengths 0, 1, page" in said
    assert "decode" not in said


def test_floors_count_live_bytes_once_and_the_products():
    decode = bench.Problem("", (4096,) * 32)
    assert decode.live_bytes == 32 * 4096 * 8 * 2 * 128 * 2
    assert bench.Problem("", (100,), **TINY).live_bytes == 100 * 2 * 2 * 16 * 2
    assert bench.Problem("", (64,), keep=0.5, **TINY).live_bytes == 32 * 2 * 2 * 16 * 2
    seen = sum(position + 1 for position in range(6, 10))
    assert bench.Problem("", (10,), num_queries=4, **TINY).flops == 4 * seen * 4 * 16


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_inputs_list_every_page_once(keep):
    problem = bench.Problem("", (64, 40), keep=keep, **TINY)
    inputs = bench.make_inputs(problem)
    used = np.asarray(inputs.starts) < 2**30
    tables = np.asarray(inputs.tables)
    if keep == 1:
        pages = tables[used].tolist()
        assert len(set(pages)) == len(pages) == 2 * (4 + 3), "no table finds another's pages in the cache"
    else:
        assert inputs.tables.shape[1:] == (2, 2, 2)
    assert 0 not in tables[used]
    assert tables.max() < len(inputs.keys)


def test_verdicts_compare_with_the_goal():
    ran, absent = bench.Timing("a", 10.0, 12.0, 0.9), bench.Timing("b", absent="not here")
    said = lambda **goal: bench.verdict(bench.Result(bench.Problem("p", (1,), **goal), 9.0, [absent, ran]))  # noqa: E731
    assert said(must=0.85).endswith("goal 0.85: met")
    assert said(must=0.95).endswith("missed")
    assert said(must_us=9.0).endswith("10.0 us, goal 9 us: missed")
    assert said() is None
