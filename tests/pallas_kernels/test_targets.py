"""What the compilers said, read and judged. The compilers themselves run in `make kernels-check`."""

import itertools
import json
import math
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from kvlab.hardware import CHIPS
from pallas_kernels import chips, compilers, targets
from pallas_kernels.chips import TARGETS, Shape
from pallas_kernels.formats import FORMATS, Quantised
from pallas_kernels.paged_attention.gpu import refusal as gpu_refusal
from pallas_kernels.paged_attention.gpu_tiles import fit, scratch_for
from pallas_kernels.selection import Asked
from pallas_kernels.targets import Compiled

SHAPE = Shape("paged_attention", "bfloat16", 128)
REMARKS = """ptxas info    : Compiling entry function 'anonymous_mosaic_gpu_kernel' for 'sm_90a'
ptxas         .     80 bytes stack frame, 92 bytes spill stores, 96 bytes spill loads
ptxas info    : Used 255 registers, used 16 barriers, 17 bytes smem
info    : used 255 registers, used 16 barriers, 80 stack, 1025 bytes smem, 1152 bytes cmem[0], 0 bytes lmem
"""


def test_registers_and_spills_are_read_from_the_compilers_remarks():
    assert compilers.resources(REMARKS) == {"registers": 255, "spilled_bytes": 92 + 96}


def test_memory_on_chip_is_read_from_the_kernel():
    """A GPU's scratch once; a TPU's scratch, and its blocks of whole registers twice."""

    def twice(source, target, held, _):
        plgpu.copy_gmem_to_smem(source, held)
        plgpu.copy_smem_to_gmem(held, target)

    on_gpu = plgpu.kernel(
        twice,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch_types=[plgpu.SMEM((64, 64), jnp.float32), plgpu.Barrier()],
        grid=(1,),
        grid_names=("one",),
    )
    on_tpu = pl.pallas_call(
        lambda source, target, held: None,
        out_shape=jax.ShapeDtypeStruct((4, 10, 100), jnp.bfloat16),
        grid=(4,),
        in_specs=[pl.BlockSpec((1, 8, 128), lambda i: (i, 0, 0))],
        out_specs=pl.BlockSpec((1, 10, 100), lambda i: (i, 0, 0)),
        scratch_shapes=[pltpu.VMEM((3, 8, 128), jnp.float32)],
    )
    blocks = 2 * 8 * 128 * 4 + 2 * 16 * 128 * 2
    for run, shape, wanted in ((on_gpu, (64, 64), 64 * 64 * 4), (on_tpu, (4, 8, 128), blocks + 3 * 8 * 128 * 4)):
        jaxpr = jax.make_jaxpr(run)(jnp.zeros(shape)).jaxpr
        assert compilers.on_chip_bytes(jaxpr) == wanted


def test_every_op_format_and_head_dim_is_compiled():
    for backend, plain in (("gpu", {"bfloat16", "float16"}), ("tpu", {"bfloat16", "float32"})):
        found = {(one.op, one.format, one.per, one.head_dim) for one in chips.shapes(backend)}
        scaled = {(format, per) for format in FORMATS for per in ("token", "channel")}
        for op in chips.OPS:
            for format, per in scaled | {(one, "") for one in plain}:
                assert {(op, format, per, dim) for dim in (64, 128, 256)} <= found
        assert {one.head_dim for one in chips.shapes(backend, (64,)) if not one.extra} == {64}


def test_a_worker_that_dies_leaves_an_answer_for_every_shape(monkeypatch):
    """It said one thing, and then the compiler took the process with it."""
    said = f"{targets.MARK}{json.dumps({'shape': asdict(SHAPE), 'seconds': 2.0, 'registers': 9})}\nSegmentation fault\n"
    monkeypatch.setattr(targets, "missing", lambda target: None)
    monkeypatch.setattr(
        targets.subprocess, "run", lambda *_, **__: targets.subprocess.CompletedProcess([], -11, said.encode())
    )
    found = targets.compile_for(TARGETS["H200"])
    assert {one.shape for one in found} == set(chips.shapes("gpu"))
    assert {one.error for one in found} == {"", "Segmentation fault"}
    assert len(targets.failures(found)) == len(found) - 1


def test_spills_and_errors_fail_on_every_chip():
    assert not targets.failures([Compiled("H200", SHAPE, registers=200, spilled_bytes=0)])
    assert "no such instruction" in targets.failures([Compiled("B200", SHAPE, error="no such instruction")])[0]
    assert "spills 8 bytes" in targets.failures([Compiled("H100", SHAPE, registers=255, spilled_bytes=8)])[0]


def test_a_missing_compiler_is_the_answer(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    assert all("libtpu is not installed" in one.error for one in targets.compile_for(TARGETS["7x"]))


def test_the_floor_is_the_live_bytes_over_the_bandwidth():
    """KERNELS' shape: 32 x 4,096 tokens of 8 heads, keys and values of 128 x 2 bytes."""
    assert SHAPE.page_bytes == 536_870_912
    assert Compiled("H200", SHAPE).floor_us == pytest.approx(111.8, abs=0.1)
    assert Shape("paged_attention", "int8", 128, "token").page_bytes == 32 * 4096 * 8 * (2 * 128 + 2 * 4)
    assert Shape("paged_attention", "int4", 128, "channel").page_bytes == 32 * 4096 * 8 * 128
    assert Shape("kv_write", "bfloat16", 128).page_bytes == 32 * 256 * 8 * 2 * (2 * 128 * 2)


def test_bandwidths_are_those_that_kvlab_plans_with():
    """Kernels know nothing of kvlab, so the figures stand twice."""
    for name, target in TARGETS.items():
        if chip := CHIPS.get({"7x": "tpu7x"}.get(name, name.lower())):
            assert target.bandwidth == chip.bandwidth_gb_s * 1e9


def test_the_table_is_written_between_its_marks_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compiled -->\nold\n<!-- end -->\nafter\n")
    targets.write_table(page, [Compiled("H200", SHAPE, 1.0, 194, 0, 196608, estimate_us=7.0)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| paged_attention | H200 | bfloat16 | 128 | - | 1.0 s | 194 | 0 B | 192 KiB | 7 us | 112 us |" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        targets.write_table(page, [])


KEPT = [(format, per) for format in FORMATS for per in ("token", "channel")] + [("bfloat16", "token")]


@pytest.mark.parametrize(("format", "per"), KEPT)
@pytest.mark.parametrize("with_page_mass", [False, True])
def test_shared_memory_is_counted_as_mosaic_does(format, per, with_page_mass):
    """Each ref in whole KiB, 2 KiB for sums over a warpgroup, 8 bytes a barrier, of which a group has 32 at most: 227 KiB hold whatever `refusal` lets pass."""
    of_type = jnp.dtype(FORMATS.get(format, "bfloat16"))
    sizes = range(32, 257, 32)
    pages = jnp.zeros((1, 1, 1, 2), of_type)
    asked_pages = Quantised(pages, None, per) if format in FORMATS else pages
    num_held = 0
    for dim, value_dim, page_size, num_consumers in itertools.product(sizes, sizes, (8, 32, 64), (1, 2)):
        if gpu_refusal(Asked(format, page_size, (dim, value_dim), 1, per)) or (
            num_consumers == 2 and format in FORMATS
        ):
            continue
        block_pages = 64 // page_size
        tiles = fit(dim, value_dim, format, per, num_consumers, page_size, with_page_mass=with_page_mass)
        if not tiles.num_stages:
            assert num_consumers == 2, "refusal lets pass what is not held"  # of a chunk's two warpgroups one attends
            continue
        dtype = jnp.dtype(jnp.bfloat16)
        scratch = scratch_for(
            tiles, dim, value_dim, asked_pages, dtype, block_pages, num_consumers, with_page_mass, "hopper"
        )
        refs = [one for one in scratch.values() if hasattr(one, "dtype")]
        num_bytes = sum(-(-math.prod(one.shape) * jnp.dtype(one.dtype).itemsize // 1024) * 1024 for one in refs)
        assert num_bytes == tiles.num_bytes, (dim, value_dim, page_size, num_consumers)
        barriers = [one for one in scratch.values() if not hasattr(one, "dtype")]
        assert num_bytes + 2048 + 8 * sum(int(np.prod(one.num_barriers)) for one in barriers) <= 227 * 1024
        assert all(np.prod(one.num_barriers) <= 32 for one in barriers)
        num_held += 1
    assert num_held >= 64
