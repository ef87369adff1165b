"""Compiles kernels for chips that are not here, down to machine code, and says what they take.

    python -m pallas_kernels.targets [--dims 128] [--json results.json] [--table docs/kernels.md]      # `make kernels-check`

Each target is compiled in a process of its own, since the compilers speak to standard error and remember their platform. They
come from `pallas_kernels/compilers.txt`, in an environment apart; where one is missing, that is the answer.
"""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pallas_kernels.formats import FORMATS

INSTALL = "run `make kernels-check`, which builds the environment with the compilers"
GPU_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
"""What XLA's compiler asks of a GPU, in the text form of its GpuTargetConfigProto."""


@dataclass(frozen=True)
class Target:
    """A chip. `bandwidth` is its data sheet's, in bytes a second; `description` is XLA's for GPUs, a topology's name for TPUs."""

    name: str
    backend: str
    bandwidth: float
    description: str


def _gpu(name: str, full_name: str, bandwidth: float, memory: int, cores: int, major: int) -> Target:
    description = GPU_DESCRIPTION.format(name=full_name, bandwidth=bandwidth, memory=memory, cores=cores, major=major)
    return Target(name, "gpu", bandwidth, description)


TARGETS = {
    one.name: one
    for one in (
        _gpu("H100", "NVIDIA H100 80GB HBM3", 3.35e12, 85_000_000_000, 132, 9),
        _gpu("H200", "NVIDIA H200 141GB HBM3e", 4.8e12, 151_397_597_184, 132, 9),
        _gpu("B200", "NVIDIA B200", 8.0e12, 192_000_000_000, 148, 10),
        Target("v4", "tpu", 1.228e12, "v4:2x2x1"),
        Target("v5e", "tpu", 0.819e12, "v5e:2x2"),
        Target("v5p", "tpu", 2.765e12, "v5p:2x2x1"),
        Target("v6e", "tpu", 1.638e12, "v6e:2x2"),
        Target("7x", "tpu", 7.38e12, "tpu7x:2x2x1"),
    )
}


@dataclass(frozen=True)
class Shape:
    """One compilation of an op: 32 sequences of 4,096 tokens, 32 query heads on 8 KV heads; a chunk is of 256 tokens each. `format`
    is the pages', scaled `per` token or channel where it is quantised."""

    op: str
    format: str
    head_dim: int
    per: str = ""
    extra: str = ""
    """What is asked for beside: "lists" of each KV head with valid slots, page "mass"; to write, "decode" of one token each, and "few" of three sequences."""

    @property
    def num_queries(self) -> int:
        """New tokens of each sequence."""
        return 1 if self.op == "paged_attention" or self.extra in ("decode", "few") else 256

    @property
    def batch(self) -> int:
        """Sequences."""
        return 3 if self.extra == "few" else 32

    @property
    def page_bytes(self) -> int:
        """Keys and values that must move: live bytes once, with their scales; to write, the tokens in 16 bits and what they become."""
        bits = {"float32": 32, "int8": 8, "fp8": 8, "int4": 4}.get(self.format, 16)
        a_token = 2 * self.head_dim * bits // 8 + (2 * 4 if self.per == "token" else 0)
        if self.op == "kv_write":
            return self.batch * self.num_queries * 8 * (a_token + 2 * self.head_dim * max(2, bits // 16))
        return self.batch * 4096 * 8 * a_token


OPS = ("paged_attention", "paged_prefill", "kv_write")
DIMS = (64, 128, 256)


def shapes(backend: str, dims: Sequence[int] = DIMS) -> list[Shape]:
    """What is compiled for a backend: every op, format and head dim, and what may be asked for beside."""
    plain = {"gpu": ("bfloat16", "float16"), "tpu": ("bfloat16", "float32")}[backend]
    formats = [(one, "") for one in plain] + [(one, per) for per in ("token", "channel") for one in FORMATS]
    found = [Shape(op, format, dim, per) for op in OPS for format, per in formats for dim in dims]
    return [
        *found,
        Shape("paged_attention", "bfloat16", 128, extra="lists"),
        Shape("paged_attention", "bfloat16", 128, extra="mass"),
        Shape("paged_attention", "int8", 128, "token", extra="mass"),
        Shape("kv_write", "bfloat16", 128, extra="decode"),
        Shape("kv_write", "int8", 128, "token", extra="decode"),
        Shape("kv_write", "int4", 128, "channel", extra="few"),
    ]


@dataclass(frozen=True)
class Compiled:
    """What became of one compilation. `on_chip_bytes` is the shared memory of a thread block, or what lies in VMEM at once (blocks of
    the grid twice); `temp_bytes` what XLA adds around the kernel; `estimate_us` the time that XLA's own cost model gives."""

    target: str
    shape: Shape
    seconds: float = 0.0
    registers: int | None = None
    spilled_bytes: int | None = None
    on_chip_bytes: int | None = None
    temp_bytes: int = 0
    estimate_us: float | None = None
    error: str = ""

    @property
    def floor_us(self) -> float:
        """Microseconds that moving the live bytes once takes at the data sheet's bandwidth."""
        return self.shape.page_bytes / TARGETS[self.target].bandwidth * 1e6


def missing(target: Target) -> str | None:
    """Why nothing can be compiled for a target here; None: it can."""
    module = "libtpu" if target.backend == "tpu" else "jax_plugins.xla_cuda13"
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"no compiler ({module} is not installed): {INSTALL}"


def compile_for(target: Target, dims: Sequence[int] = DIMS) -> list[Compiled]:
    """Every shape of the target's backend, in a process of its own. A compiler that is missing is each one's error."""
    wanted = shapes(target.backend, dims)
    if reason := missing(target):
        return [Compiled(target.name, shape, error=reason) for shape in wanted]
    variables = {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    command = [sys.executable, "-m", "pallas_kernels.targets", "--worker", target.name, "--dims", *map(str, dims)]
    said = subprocess.run(
        command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    ).stdout.decode(errors="replace")
    found = list(_read(target, said))
    done = {one.shape for one in found}
    died = said.strip().splitlines()[-1:] or ["the compiler's process said nothing"]
    return found + [Compiled(target.name, one, error=died[0]) for one in wanted if one not in done]


MARK = "== compiled "


def _read(target: Target, said: str) -> Iterator[Compiled]:
    """What a worker's output says: its own lines, each behind the compiler's remarks on that kernel."""
    for part in re.split(rf"^(?={MARK})", said, flags=re.MULTILINE)[1:]:
        line, _, _ = part.partition("\n")
        yield Compiled(target.name, **(own := json.loads(line.removeprefix(MARK))) | {"shape": Shape(**own["shape"])})


def _work(target: Target, dims: Sequence[int]) -> None:
    """In the worker: compiles every shape and prints a line for each."""
    compile_one = {"gpu": _gpu_compiler, "tpu": _tpu_compiler}[target.backend](target)
    for shape in shapes(target.backend, dims):
        began = time.perf_counter()
        outcome: dict[str, Any] = {"shape": asdict(shape)}
        with _Overheard() as heard:
            try:
                compiled, outcome["on_chip_bytes"] = compile_one(shape)
                outcome["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
                outcome["estimate_us"] = _estimate_us(compiled)
            except Exception as error:  # whatever a compiler refuses is an answer
                outcome["error"] = re.sub(r".*error +: ", "", str(error).strip().splitlines()[0])
        outcome["seconds"] = time.perf_counter() - began
        if target.backend == "gpu" and "error" not in outcome:
            outcome |= _resources(heard.text)
        print(f"{MARK}{json.dumps(outcome)}", flush=True)


def _estimate_us(compiled: Any) -> float | None:
    """What XLA's cost model says of a program, where it says how long."""
    costs = compiled.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    seconds = (costs or {}).get("optimal_seconds")
    return seconds * 1e6 if seconds and seconds > 0 else None


def _resources(remarks: str) -> dict[str, int]:
    """Registers and spills as ptxas reports them."""
    registers = max(map(int, re.findall(r"[Uu]sed (\d+) registers", remarks)))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", remarks)))
    return {"registers": registers, "spilled_bytes": spilled}


def on_chip_bytes(jaxpr: Any) -> int:
    """The shared memory, or VMEM, that the kernels in a program keep at once: the most of any."""
    most = 0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, equation.params.get("jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        mine = 0
        if name in ("pallas_call", "run_scoped") and inner is not None:
            for variable in inner.invars:
                space, shape = (
                    str(getattr(variable.aval, "memory_space", "")),
                    list(getattr(variable.aval, "shape", ())),
                )
                dtype: Any = getattr(variable.aval, "dtype", None)
                if getattr(dtype, "itemsize", None) is None or "barrier" in str(dtype) or "sem" in str(dtype):
                    continue
                if space in ("vmem", "default") and len(shape) >= 2:  # whole registers of 8 x 128 words
                    rows = 32 // dtype.itemsize
                    shape[-2:] = [-(-shape[-2] // rows) * rows, -(-shape[-1] // 128) * 128]
                copies = {"smem": int(name == "run_scoped"), "vmem": 1, "default": 2}.get(space, 0)
                mine += copies * math.prod(shape) * dtype.itemsize
        for parameter in equation.params.values():
            for one in parameter if isinstance(parameter, tuple | list) else (parameter,):
                one = getattr(one, "jaxpr", one)
                if hasattr(one, "eqns"):
                    mine = max(mine, on_chip_bytes(one))
        most = max(most, mine)
    return most


class _Overheard:
    """What C++ writes to this process's standard output and error meanwhile."""

    def __enter__(self) -> "_Overheard":
        self._file = tempfile.TemporaryFile()
        sys.stdout.flush()
        self._kept = [os.dup(1), os.dup(2)]
        for descriptor in (1, 2):
            os.dup2(self._file.fileno(), descriptor)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.stdout.flush()
        for descriptor, kept in zip((1, 2), self._kept, strict=True):
            os.dup2(kept, descriptor)
            os.close(kept)
        self._file.seek(0)
        self.text = self._file.read().decode(errors="replace")


def _call(shape: Shape, backend: str, page_size: int, sharding: Any, **options: Any) -> tuple[Any, list[Any]]:
    """A function of arrays that runs an op's kernel, and the arrays' shapes; pages come first."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.formats import Quantised

    batch, table_len, dim = shape.batch, 4096 // page_size, shape.head_dim

    def array(*dims: int, of: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(dims, of, sharding=sharding)

    leading = batch * table_len + 1, 8, page_size
    dtype = jnp.dtype(shape.format if shape.format not in FORMATS else "bfloat16")
    if shape.format in FORMATS:
        payload = array(*leading, dim // 2 if shape.format == "int4" else dim, of=FORMATS[shape.format])
        scales = array(*leading[:2], page_size if shape.per == "token" else dim, of=jnp.float32)
        pool: Any = Quantised(payload, scales, "token" if shape.per == "token" else "channel")
    else:
        pool = array(*leading, dim, of=dtype)
    module = importlib.import_module(f"pallas_kernels.{shape.op}.{backend}")
    if shape.op == "kv_write":
        tokens = array(batch, shape.num_queries, 8, dim, of=dtype)
        return module.kv_write, [pool, pool, tokens, tokens, array(batch, shape.num_queries)]
    heads = (8,) if shape.extra == "lists" else ()
    table = array(batch, *heads, table_len)
    options |= {"window": None, "num_sinks": 0, "soft_cap": None, "scale": dim**-0.5}
    options["with_page_mass"] = shape.extra == "mass"
    queries = array(batch, shape.num_queries, 32, dim, of=dtype)
    of_each = array(batch, shape.num_queries) if shape.op == "paged_attention" else array(batch)
    arrays = [pool, pool, queries, table, table, of_each, array(batch)]
    if heads:
        arrays.append(array(batch, *heads, table_len, page_size, of=jnp.bool))

    def run(keys: Any, values: Any, queries: Any, *rest: Any) -> Any:
        valid = rest[4] if heads else None
        return getattr(module, shape.op)(queries, keys, values, *rest[:4], valid_slots=valid, **options)

    return run, arrays


def _gpu_compiler(target: Target) -> Callable[[Shape], Any]:
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(platform="cuda", topology="1 x 1 x 1", target_config=target.description)
    sharding = SingleDeviceSharding(topology.devices[0])
    chip = "blackwell" if target.name == "B200" else "hopper"

    def compile_one(shape: Shape) -> Any:
        run, arrays = _call(shape, "gpu", 64, sharding, chip=chip)
        traced = jax.jit(run, donate_argnums=(0, 1) if shape.op == "kv_write" else ()).trace(*arrays)
        return traced.lower(lowering_platforms=("cuda",)).compile(), on_chip_bytes(traced.jaxpr.jaxpr)

    return compile_one


def _tpu_compiler(target: Target) -> Callable[[Shape], Any]:
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=target.description).devices[0]
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=abstract)
    sharding = SingleDeviceSharding(device)

    def compile_one(shape: Shape) -> Any:
        run, arrays = _call(shape, "tpu", 128, sharding)

        def under_mesh(*arrays: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh):
                return run(*arrays)

        traced = jax.jit(under_mesh, donate_argnums=(0, 1) if shape.op == "kv_write" else ()).trace(*arrays)
        return traced.lower().compile(), on_chip_bytes(traced.jaxpr.jaxpr)

    return compile_one


def simulate(backend: str) -> dict[str, str]:
    """Runs a backend's kernels in their simulator on cases of each op's `proof`; says of each op what came of it."""
    from pallas_kernels.kv_write import proof as write_proof
    from pallas_kernels.paged_attention import proof

    if backend == "gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        modes: list[Any] = [plgpu.InterpretGPUParams(detect_races=True)]
    else:
        from jax.experimental.pallas import tpu as pltpu

        modes = [
            pltpu.InterpretParams(
                detect_races=True, dma_execution_mode=mode, uninitialized_memory="nan", out_of_bounds_reads="raise"
            )
            for mode in ("on_wait", "eager")
        ]
    chunk = {"lengths": [70, 3], "num_queries": 40, "group": 2, "prefill": True}
    cases = {
        "paged_attention": [
            proof.CASES["lengths 0, 1, page, page + 1; an empty one first and last"],
            proof.CASES["int8 by token, window, soft cap"],
        ],
        "paged_prefill": [chunk],
        "kv_write": [write_proof.CASES["one token each, some dropped"], write_proof.CASES["int8 by token"]],
    }

    def verdict(op: str) -> str:
        check = write_proof.check if op == "kv_write" else proof.check
        run = getattr(importlib.import_module(f"pallas_kernels.{op}.{backend}"), op)
        with _Overheard() as heard:
            try:
                for mode in modes:
                    for case in cases[op]:
                        check(functools.partial(run, interpret=mode), **case, dtype="bfloat16")
            except Exception as error:  # a race, a wrong answer, or a simulator that could not go on
                return f"FAILED: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        if "RACE" in heard.text:  # which jax 0.11 prints and does not raise
            return "FAILED: a race"
        return f"{len(modes) * len(cases[op])} cases right, no race"

    return {op: verdict(op) for op in OPS}


HEADER = (
    "op",
    "target",
    "pages",
    "head dim",
    "beside",
    "compiled",
    "registers",
    "spills",
    "on chip",
    "XLA's estimate",
    "floor",
)


def row(one: Compiled) -> tuple[str, ...]:
    """A compilation in words, in the order of HEADER."""
    dash, shape = "-", one.shape
    return (
        shape.op,
        one.target,
        f"{shape.format} by {shape.per}" if shape.per else shape.format,
        str(shape.head_dim),
        shape.extra or dash,
        f"no: {one.error}" if one.error else f"{one.seconds:.1f} s",
        dash if one.registers is None else str(one.registers),
        dash if one.spilled_bytes is None else f"{one.spilled_bytes} B",
        dash if one.on_chip_bytes is None else f"{one.on_chip_bytes / 1024:.0f} KiB",
        dash if one.estimate_us is None else f"{one.estimate_us:.0f} us",
        f"{one.floor_us:.0f} us",
    )


def markdown(compiled: Sequence[Compiled]) -> str:
    """The table as Markdown."""
    lines = [HEADER, tuple("---" for _ in HEADER), *map(row, compiled)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_table(path: Path, compiled: Sequence[Compiled]) -> None:
    """Replaces what stands between the marks in a page. Raises ValueError where there are none."""
    begin, end = "<!-- compiled -->\n", "<!-- end -->\n"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path}: has no lines {begin.strip()} and {end.strip()} to write between")
    path.write_text(before + begin + markdown(compiled) + end + after)


def failures(compiled: Sequence[Compiled]) -> list[str]:
    """What must not be: a kernel that does not compile for a chip, or that spills there."""
    return [f"{one.shape} for {one.target}: {one.error}" for one in compiled if one.error] + [
        f"{one.shape} for {one.target}: spills {one.spilled_bytes} bytes" for one in compiled if one.spilled_bytes
    ]


def main() -> int:
    """Compiles everything; the status is 1 where `failures` finds any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"some of {', '.join(TARGETS)}; all, if none is named")
    parser.add_argument("--worker", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write every result here")
    parser.add_argument("--table", type=Path, help="a page whose table is to be renewed")
    parser.add_argument("--dims", type=int, nargs="+", choices=DIMS, default=DIMS, help="head dims (default: all)")
    options = parser.parse_args()
    if options.worker:
        _work(TARGETS[options.worker], options.dims)
        return 0
    if unknown := [one for one in options.targets if one not in TARGETS]:
        parser.error(f"target = {unknown[0]!r}: must be some of {', '.join(TARGETS)}")
    chosen = [TARGETS[one] for one in options.targets or TARGETS]

    def of_backend(backend: str) -> list[Compiled]:
        found = []
        for target in chosen:
            if target.backend == backend:
                found.append(compile_for(target, options.dims))
                print(markdown(found[-1]).split("\n", 2)[2], end="", flush=True)
        return list(itertools.chain.from_iterable(found))

    with ThreadPoolExecutor(2) as pool:  # the compilers of the two run side by side
        compiled = list(itertools.chain.from_iterable(pool.map(of_backend, ("gpu", "tpu"))))
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        found = {"date": date.today().isoformat(), "versions": versions, "compiled": [asdict(one) for one in compiled]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.table:
        write_table(options.table, compiled)
    for one in failures(compiled):
        print(f"failed: {one}", file=sys.stderr)
    return 1 if failures(compiled) else 0


if __name__ == "__main__":
    sys.exit(main())
