"""What the compilers said, read and judged. The compilers themselves run in `make kernels-check`."""

import json
from dataclasses import asdict

import pytest

from kvlab.hardware import CHIPS
from pallas_kernels import targets
from pallas_kernels.targets import TARGETS, Compiled, Shape

SHAPE = Shape("paged_attention", "bfloat16", 128, 1)
REMARKS = """ptxas info    : Compiling entry function 'anonymous_mosaic_gpu_kernel' for 'sm_90a'
ptxas         .     80 bytes stack frame, 92 bytes spill stores, 96 bytes spill loads
ptxas info    : Used 255 registers, used 16 barriers, 17 bytes smem
info    : used 255 registers, used 16 barriers, 80 stack, 1025 bytes smem, 1152 bytes cmem[0], 0 bytes lmem
"""


def test_registers_and_spills_are_read_from_the_compilers_remarks():
    found = targets._resources(REMARKS, SHAPE)
    assert (found["registers"], found["spilled_bytes"]) == (255, 92 + 96)
    assert found["on_chip_bytes"] <= 227 * 1024


def test_a_worker_that_dies_leaves_an_answer_for_every_shape(monkeypatch):
    """It said one thing, and then the compiler took the process with it."""
    said = f"{targets.MARK}{json.dumps({'shape': asdict(SHAPE), 'seconds': 2.0, 'registers': 9})}\nSegmentation fault\n"
    monkeypatch.setattr(targets, "missing", lambda target: None)
    monkeypatch.setattr(
        targets.subprocess, "run", lambda *_, **__: targets.subprocess.CompletedProcess([], -11, said.encode())
    )
    found = targets.compile_for(TARGETS["H200"])
    assert {one.shape for one in found} == set(targets.shapes("gpu"))
    assert {one.error for one in found} == {"", "Segmentation fault"}
    assert len(targets.failures(found)) == len(found) - 1


def test_spills_fail_and_what_a_chip_is_not_made_for_does_not():
    fine = Compiled("H200", SHAPE, registers=200, spilled_bytes=0)
    assert not targets.failures([fine, Compiled("B200", SHAPE, error="no such instruction")])
    assert "spills 8 bytes" in targets.failures([Compiled("H100", SHAPE, registers=255, spilled_bytes=8)])[0]


def test_a_missing_compiler_is_the_answer(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    assert all("libtpu is not installed" in one.error for one in targets.compile_for(TARGETS["7x"]))


def test_the_floor_is_the_live_bytes_over_the_bandwidth():
    """KERNELS' shape: 32 x 4,096 tokens of 8 heads, keys and values of 128 x 2 bytes."""
    assert SHAPE.page_bytes == 536_870_912
    assert Compiled("H200", SHAPE).floor_us == pytest.approx(111.8, abs=0.1)


def test_bandwidths_are_those_that_kvlab_plans_with():
    """Kernels know nothing of kvlab, so the figures stand twice."""
    for name, target in TARGETS.items():
        if chip := CHIPS.get({"7x": "tpu7x"}.get(name, name.lower())):
            assert target.bandwidth == chip.bandwidth_gb_s * 1e9


def test_the_table_is_written_between_its_marks_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compiled -->\nold\n<!-- end -->\nafter\n")
    targets.write_table(page, [Compiled("H200", SHAPE, 1.0, 194, 0, 196608)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| paged_attention | H200 | bfloat16 | 128 | 1 | sequence | 1.0 s | 194 | 0 B | 192 KiB | 112 us |" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        targets.write_table(page, [])
