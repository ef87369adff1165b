"""What the compilers said, read and judged. The compilers themselves run in `make kernels-check`."""

import contextlib
import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from kvlab.hardware import CHIPS
from pallas_kernels import compilers, lowering, ops, targets
from pallas_kernels.chips import TARGETS, Shape
from pallas_kernels.formats import FORMATS, Scheme, kivi, quantised
from pallas_kernels.lowering import Lowered
from pallas_kernels.ops import OPS
from pallas_kernels.paged_attention import proof
from pallas_kernels.paged_attention.gpu import refusal as gpu_refusal
from pallas_kernels.paged_attention.gpu_tiles import fit, scratch_for
from pallas_kernels.pages import Pages
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
        found = {
            (shape.op, shape.format, shape.per, shape.head_dim, shape.num_queries) for shape in ops.shapes(backend)
        }
        for op, tokens in (("paged_attention", 1), ("paged_attention", 256), ("kv_write", 256)):
            served = [format for format in FORMATS if format != "int2" or (op, backend) == ("paged_attention", "gpu")]
            scaled = {(format, per) for format in served for per in ("token", "channel")}
            for format, per in scaled | {(format, "") for format in plain}:
                assert {(op, format, per, dim, tokens) for dim in (64, 128, 256)} <= found
        for tokens in (1, 256):
            assert ("paged_attention", "int4", "kivi", 256, tokens) in found
        assert {shape.head_dim for shape in ops.shapes(backend, (64,)) if not shape.extra} == {64}


def test_a_worker_that_dies_leaves_an_answer_for_every_shape(monkeypatch):
    """It said one thing, and then the compiler took the process with it."""
    line = {"target": "H200", "shape": asdict(SHAPE), "seconds": 2.0, "registers": 9}
    said = f"{targets.MARK}{json.dumps(line)}\nSegmentation fault\n"
    monkeypatch.setattr(targets, "missing", lambda target: None)
    monkeypatch.setattr(
        targets.subprocess, "run", lambda *_, **__: targets.subprocess.CompletedProcess([], -11, said.encode())
    )
    found = targets.compile_for(TARGETS["H200"])
    assert {outcome.shape for outcome in found} == set(ops.shapes("gpu"))
    assert {outcome.error for outcome in found} == {"", "Segmentation fault"}
    assert len(targets.failures(found)) == len(found) - 1


def test_spills_and_errors_fail_on_every_chip():
    assert not targets.failures([Compiled("H200", SHAPE, registers=200, spilled_bytes=0)])
    assert "no such instruction" in targets.failures([Compiled("B200", SHAPE, error="no such instruction")])[0]
    assert "spills 8 bytes" in targets.failures([Compiled("H100", SHAPE, registers=255, spilled_bytes=8)])[0]
    wide = Shape("paged_attention", "int2", 256, "kivi")
    assert not targets.failures([Compiled("H100", wide, registers=168, spilled_bytes=480)]), "where none is left"
    assert targets.failures([Compiled("H100", wide, registers=168, spilled_bytes=488)])
    assert targets.failures([Compiled("H100", Shape("paged_attention", "int4", 128, "kivi"), spilled_bytes=8)])


def test_a_program_of_one_architecture_is_compiled_once(tmp_path):
    """H200 takes H100's machine code; B200, another program and whoever keeps nothing do not. Errors are not kept."""
    compiled = []

    def compile_it():
        compiled.append(1)
        return {"registers": 100 + len(compiled), "spilled_bytes": 0}

    known = targets.Known(tmp_path)
    assert known(TARGETS["H100"], "a program", compile_it) == {"registers": 101, "spilled_bytes": 0}
    assert targets.Known(tmp_path)(TARGETS["H200"], "a program", compile_it)["registers"] == 101
    assert known(TARGETS["B200"], "a program", compile_it)["registers"] == 102
    assert known(TARGETS["H200"], "another", compile_it)["registers"] == 103
    assert [known(TARGETS["v5e"], "a program", compile_it)["registers"] for _ in range(2)] == [104, 105]
    assert targets.Known(None)(TARGETS["H200"], "a program", compile_it)["registers"] == 106

    def fail():
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError):
        known(TARGETS["H100"], "a third", fail)
    assert known(TARGETS["H200"], "a third", compile_it)["registers"] == 107


def test_a_missing_compiler_is_the_answer(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    assert all("libtpu is not installed" in outcome.error for outcome in targets.compile_for(TARGETS["7x"]))


def test_the_floor_is_the_live_bytes_over_the_bandwidth():
    """KERNELS' shape: 32 x 4,096 tokens of 8 heads, keys and values of 128 x 2 bytes."""
    attention, write = OPS["paged_attention"], OPS["kv_write"]
    assert attention.floor_bytes(SHAPE) == 536_870_912
    assert Compiled("H200", SHAPE).floor_us == pytest.approx(111.8, abs=0.1)
    assert attention.floor_bytes(Shape("", "int8", 128, "token")) == 32 * 4096 * 8 * (2 * 128 + 2 * 4)
    assert attention.floor_bytes(Shape("", "int4", 128, "channel")) == 32 * 4096 * 8 * 128
    assert write.floor_bytes(Shape("", "bfloat16", 128, num_queries=256)) == 32 * 256 * 8 * 2 * (2 * 128 * 2)


def test_bandwidths_are_those_that_kvlab_plans_with():
    """Kernels know nothing of kvlab, so the figures stand twice."""
    for name, target in TARGETS.items():
        if chip := CHIPS.get({"7x": "tpu7x"}.get(name, name.lower())):
            assert target.bandwidth == chip.bandwidth_gb_s * 1e9


def test_a_worker_that_dies_leaves_an_answer_for_every_case(monkeypatch):
    """The op and the name of a case say which one it was."""
    cases = lowering.cases(TARGETS["B200"], 2)
    first = asdict(Lowered("B200", cases[0].op, cases[0].name, 1.0))
    said = f"{targets.MARK}{json.dumps(first)}\nSegmentation fault\n"
    monkeypatch.setattr(targets, "missing", lambda target: None)
    monkeypatch.setattr(
        targets.subprocess, "run", lambda *_, **__: targets.subprocess.CompletedProcess([], -11, said.encode())
    )
    found = targets.lower_for(TARGETS["B200"], 2, is_compiled=False)
    assert [(outcome.op, outcome.name) for outcome in found] == [(case.op, case.name) for case in cases]
    assert not found[0].error
    assert targets.failures([], found)[0] == f"{cases[1].op}, {cases[1].name} for B200: Segmentation fault"
    assert len(targets.failures([], found)) == len(cases) - 1


@pytest.mark.parametrize(("name", "platform"), [("H200", "cuda"), ("7x", "tpu")])
def test_a_case_that_does_not_lower_for_a_chip_is_named(monkeypatch, name, platform):
    """A kernel of an operation that no chip has; the reference in its place lowers for each."""
    planted = jax.extend.core.Primitive("round_to_odd")
    planted.def_abstract_eval(lambda x: x)
    monkeypatch.setattr(compilers, "sharding_of", lambda target: SingleDeviceSharding(jax.devices()[0]))
    monkeypatch.setattr(compilers, "context_of", lambda target: contextlib.nullcontext())
    monkeypatch.setattr(compilers, "platforms_of", lambda target: {"lowering_platforms": (platform,)})
    target = TARGETS[name]
    cases = lowering.cases(target, 0)
    write, attend = (next(case for case in cases if case.op == op) for op in ("kv_write", "paged_attention"))
    kernels = {
        "paged_attention": proof.by_api(implementation="reference"),
        "kv_write": lambda pages, *rest: jax.tree.map(planted.bind, pages),
    }
    found = list(lowering.lower(target, [attend, write], is_compiled=False, kernels=kernels))
    assert not found[0].error
    (said,) = targets.failures([], found)
    assert said.startswith(f"kv_write, {write.name} for {name}: ")
    assert "round_to_odd" in said
    assert platform in said


def test_a_case_that_does_not_lower_fails_the_command(monkeypatch, capsys, tmp_path):
    """And stands in the JSON; the table has the shapes."""
    monkeypatch.setattr(targets, "compile_for", lambda target, *_: [Compiled(target.name, SHAPE, 1.0, 194, 0, 196608)])
    monkeypatch.setattr(
        targets, "lower_for", lambda target, *_, is_compiled: [Lowered(target.name, "kv_write", "one", error="no")]
    )
    command = [
        "targets",
        "--cases",
        "0",
        "--json",
        str(tmp_path / "all.json"),
        "--table",
        str(tmp_path / "all.md"),
        "--",
    ]
    monkeypatch.setattr(targets.sys, "argv", [*command, "H100", "H200"])
    assert targets.main() == 1
    said = capsys.readouterr()
    assert said.err == "failed: kv_write, one for H200: no\n"
    assert "H200: 0 of 1 cases compiled" in said.out
    kept = json.loads((tmp_path / "all.json").read_text())
    assert (len(kept["compiled"]), [case["error"] for case in kept["cases"]]) == (2, ["no"])
    table = (tmp_path / "all.md").read_text()
    assert "| paged_attention | H200 | bfloat16 | 128 | - | 1.0 s | 194 | 0 B | 192 KiB | - | 112 us |" in table


def test_cases_are_lowered_for_one_target_of_each_kind():
    assert [target.name for target in targets.generations([TARGETS[name] for name in TARGETS])] == [
        "H200",
        "B200",
        "7x",
    ]
    assert [target.name for target in targets.generations([TARGETS["v5e"], TARGETS["H100"]])] == ["v5e", "H100"]


def test_the_rows_on_the_page_are_those_of_the_results():
    """The page shows a few rows of what `--table` wrote."""
    root = Path(__file__).parents[2]
    section = (root / "docs/kernels.md").read_text().split("## How it is proved")[1].split("\n### ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    everything = (root / "benchmarks/results/kernels.md").read_text().splitlines()
    assert len(rows) == 2 + 12
    assert not set(rows) - set(everything)
    assert "| " + " | ".join(targets.HEADER) + " |" == rows[0]


def _zeros(scheme: Scheme | None, page_size: int, dim: int) -> Any:
    tile = jnp.zeros((1, 1, page_size, dim), jnp.bfloat16)
    if scheme is None:
        return tile
    shapes = jax.eval_shape(lambda tile: quantised(tile, scheme), tile)
    return jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), shapes)


def said(schemes: tuple[Scheme, Scheme] | None) -> str:
    """As the name of a case."""
    return "16 bits" if schemes is None else " and ".join(f"{scheme.format} by {scheme.per}" for scheme in schemes)


KEPT: list[tuple[Scheme, Scheme] | None] = [
    *((scheme, scheme) for format in FORMATS for scheme in (Scheme(format), Scheme(format, "channel"))),
    kivi("int4", "int2"),
    kivi("int2", "int4", 64),
    None,
]


@pytest.mark.parametrize("schemes", KEPT, ids=said)
@pytest.mark.parametrize("with_page_mass", [False, True])
def test_shared_memory_is_counted_as_mosaic_does(schemes, with_page_mass, monkeypatch):
    """Each ref in whole KiB, 2 KiB for sums over a warpgroup, 8 bytes a barrier, of which a group has 32 at most: 227
    KiB hold whatever `refusal` lets pass."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shapes stand for arrays
    sizes = range(32, 257, 32)
    num_held = 0
    for dim, value_dim, page_size, num_consumers in itertools.product(sizes, sizes, (8, 32, 64), (1, 2)):
        if schemes and (num_consumers == 2 or page_size == 8 or any(width % 64 for width in (dim, value_dim))):
            continue
        of_keys, of_values = schemes or (None, None)
        pages = Pages(_zeros(of_keys, page_size, dim), _zeros(of_values, page_size, value_dim))
        if gpu_refusal(Asked.of(pages, 1, "bfloat16")):
            continue
        block_pages = 64 // page_size
        tiles = fit((dim, value_dim), schemes, num_consumers, page_size, with_page_mass=with_page_mass)
        if not tiles.num_stages:
            assert num_consumers == 2, "refusal lets pass what is not held"  # of a chunk's two warpgroups one attends
            continue
        dtype = jnp.dtype(jnp.bfloat16)
        scratch = scratch_for(tiles, pages, dtype, block_pages, num_consumers, with_page_mass, "hopper")
        refs = [ref for ref in scratch.values() if hasattr(ref, "dtype")]
        num_bytes = sum(-(-math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize // 1024) * 1024 for ref in refs)
        assert num_bytes == tiles.num_bytes, (dim, value_dim, page_size, num_consumers)
        barriers = [ref for ref in scratch.values() if not hasattr(ref, "dtype")]
        assert num_bytes + 2048 + 8 * sum(int(np.prod(barrier.num_barriers)) for barrier in barriers) <= 227 * 1024
        assert all(np.prod(barrier.num_barriers) <= 32 for barrier in barriers)
        num_held += 1
    assert num_held >= 16
