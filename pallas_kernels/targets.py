"""Compiles kernels for chips that are not here, down to machine code, and says what they take.

    python -m pallas_kernels.targets [--json results.json] [--table docs/kernels.md]      # `make kernels-check`

Each target is compiled in a process of its own, since the compilers speak to standard error and remember their platform. They
come from `pallas_kernels/compilers.txt`, in an environment apart; where one is missing, that is the answer.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

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
    """One compilation of an op: 32 sequences of 4,096 tokens, 32 query heads on 8 KV heads."""

    op: str
    dtype: str
    head_dim: int
    num_queries: int
    lists: str = "sequence"
    """Whether each sequence lists its pages, or each "KV head" its own, with valid slots."""

    @property
    def page_bytes(self) -> int:
        """Keys and values that must move: live bytes once."""
        itemsize = {"float32": 4}.get(self.dtype, 2)
        return 32 * 4096 * 8 * 2 * self.head_dim * itemsize


def shapes(backend: str) -> list[Shape]:
    """What is compiled for a backend: every type and head dim for decoding, and a chunk."""
    dtypes = {"gpu": ("bfloat16", "float16"), "tpu": ("bfloat16", "float32")}[backend]
    return [Shape("paged_attention", dtype, dim, 1) for dtype in dtypes for dim in (64, 128, 256)] + [
        Shape("paged_attention", "bfloat16", 128, 256),
        Shape("paged_attention", "bfloat16", 128, 1, "KV head"),
    ]


@dataclass(frozen=True)
class Compiled:
    """What became of one compilation. `on_chip_bytes` is shared memory; `temp_bytes` what XLA adds around the kernel."""

    target: str
    shape: Shape
    seconds: float = 0.0
    registers: int | None = None
    spilled_bytes: int | None = None
    on_chip_bytes: int | None = None
    temp_bytes: int = 0
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


def compile_for(target: Target) -> list[Compiled]:
    """Every shape of the target's backend, in a process of its own. A compiler that is missing is each one's error."""
    if reason := missing(target):
        return [Compiled(target.name, shape, error=reason) for shape in shapes(target.backend)]
    variables = {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    command = [sys.executable, "-m", "pallas_kernels.targets", "--worker", target.name]
    said = subprocess.run(
        command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    ).stdout.decode(errors="replace")
    found = list(_read(target, said))
    done = {one.shape for one in found}
    died = said.strip().splitlines()[-1:] or ["the compiler's process said nothing"]
    return found + [Compiled(target.name, one, error=died[0]) for one in shapes(target.backend) if one not in done]


MARK = "== compiled "


def _read(target: Target, said: str) -> Iterator[Compiled]:
    """What a worker's output says: its own lines, each behind the compiler's remarks on that kernel."""
    for part in re.split(rf"^(?={MARK})", said, flags=re.MULTILINE)[1:]:
        line, _, _ = part.partition("\n")
        yield Compiled(target.name, **(own := json.loads(line.removeprefix(MARK))) | {"shape": Shape(**own["shape"])})


def _work(target: Target) -> None:
    """In the worker: compiles every shape and prints a line for each."""
    compile_one = {"gpu": _gpu_compiler, "tpu": _tpu_compiler}[target.backend](target)
    for shape in shapes(target.backend):
        began = time.perf_counter()
        outcome: dict[str, Any] = {"shape": asdict(shape)}
        with _Overheard() as heard:
            try:
                compiled = compile_one(shape)
                outcome["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            except Exception as error:  # whatever a compiler refuses is an answer
                outcome["error"] = re.sub(r".*error +: ", "", str(error).strip().splitlines()[0])
        outcome["seconds"] = time.perf_counter() - began
        if target.backend == "gpu" and "error" not in outcome:
            outcome |= _resources(heard.text, shape)
        print(f"{MARK}{json.dumps(outcome)}", flush=True)


def _resources(remarks: str, shape: Shape) -> dict[str, int]:
    """Registers and spills as ptxas reports them; shared memory as the kernel asks for it."""
    from pallas_kernels.paged_attention import gpu

    registers = max(map(int, re.findall(r"[Uu]sed (\d+) registers", remarks)))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", remarks)))
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "on_chip_bytes": gpu.ring(shape.head_dim, shape.head_dim, 2)[1],
    }


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


def _arguments(shape: Shape, page_size: int, sharding: Any) -> list[Any]:
    import jax
    import jax.numpy as jnp

    batch, table_len, dtype = 32, 4096 // page_size, jnp.dtype(shape.dtype)

    def array(*dims: int, of: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(dims, of, sharding=sharding)

    pool = array(batch * table_len + 1, 8, page_size, shape.head_dim, of=dtype)
    heads = () if shape.lists == "sequence" else (8,)
    table = array(batch, *heads, table_len)
    valid = array(batch, *heads, table_len, page_size, of=jnp.bool) if heads else None
    queries = array(batch, shape.num_queries, 32, shape.head_dim, of=dtype)
    return [queries, pool, pool, table, table, array(batch, shape.num_queries), array(batch), valid]


def _gpu_compiler(target: Target) -> Callable[[Shape], Any]:
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels.paged_attention import gpu

    topology = topologies.get_topology_desc(platform="cuda", topology="1 x 1 x 1", target_config=target.description)
    sharding = SingleDeviceSharding(topology.devices[0])

    def compile_one(shape: Shape) -> Any:
        def run(*arrays: Any, valid: Any) -> Any:
            scale = shape.head_dim**-0.5
            options = {"window": None, "num_sinks": 0, "soft_cap": None, "scale": scale}
            return gpu.paged_attention(*arrays, valid_slots=valid, **options)

        *arrays, valid = _arguments(shape, 64, sharding)
        traced = jax.jit(run).trace(*arrays, valid=valid)
        return traced.lower(lowering_platforms=("cuda",)).compile()

    return compile_one


def _tpu_compiler(target: Target) -> Callable[[Shape], Any]:
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    from pallas_kernels.paged_attention import tpu

    device = topologies.get_topology_desc(platform="tpu", topology_name=target.description).devices[0]
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=abstract)
    sharding = SingleDeviceSharding(device)

    def compile_one(shape: Shape) -> Any:
        def run(*arrays: Any, valid: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh):
                scale = shape.head_dim**-0.5
                options = {"window": None, "num_sinks": 0, "soft_cap": None, "scale": scale}
                return tpu.paged_attention(*arrays, valid_slots=valid, **options)

        *arrays, valid = _arguments(shape, 128, sharding)
        return jax.jit(run).trace(*arrays, valid=valid).lower().compile()

    return compile_one


def simulate(backend: str) -> str:
    """Runs a backend's kernel in its simulator on cases of `proof`; says what came of it."""
    from pallas_kernels.paged_attention import gpu, proof, tpu

    cases = (
        "lengths 0, 1, page, page + 1; an empty one first and last",
        "a chunk in two tiles, window, sinks, soft cap",
    )
    if backend == "gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        kernels = [functools.partial(gpu.paged_attention, interpret=plgpu.InterpretGPUParams(detect_races=True))]
    else:
        from jax.experimental.pallas import tpu as pltpu

        kernels = [
            functools.partial(
                tpu.paged_attention,
                interpret=pltpu.InterpretParams(
                    detect_races=True, dma_execution_mode=mode, uninitialized_memory="nan", out_of_bounds_reads="raise"
                ),
            )
            for mode in ("on_wait", "eager")
        ]
    with _Overheard() as heard:
        try:
            for kernel in kernels:
                for name in cases:
                    proof.check(kernel, **proof.CASES[name], dtype="bfloat16")
        except Exception as error:  # a race, a wrong answer, or a simulator that could not go on
            return f"FAILED: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if "RACE" in heard.text:  # which jax 0.11 prints and does not raise
        return "FAILED: a race"
    return f"{len(kernels) * len(cases)} cases right, no race"


HEADER = (
    "op",
    "target",
    "pages",
    "head dim",
    "queries",
    "lists",
    "compiled",
    "registers",
    "spills",
    "shared memory",
    "floor",
)


def row(one: Compiled) -> tuple[str, ...]:
    """A compilation in words, in the order of HEADER."""
    dash, shape = "-", one.shape
    return (
        shape.op,
        one.target,
        shape.dtype,
        str(shape.head_dim),
        str(shape.num_queries),
        shape.lists,
        f"no: {one.error}" if one.error else f"{one.seconds:.1f} s",
        dash if one.registers is None else str(one.registers),
        dash if one.spilled_bytes is None else f"{one.spilled_bytes} B",
        dash if one.on_chip_bytes is None else f"{one.on_chip_bytes / 1024:.0f} KiB",
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
    """What must not be: a kernel that does not compile for a chip it is made for, or that spills there."""
    made_for = [one for one in compiled if one.target != "B200"]  # whose tensor cores take other instructions
    return [f"{one.shape} for {one.target}: {one.error}" for one in made_for if one.error] + [
        f"{one.shape} for {one.target}: spills {one.spilled_bytes} bytes" for one in made_for if one.spilled_bytes
    ]


def main() -> int:
    """Compiles everything; the status is 1 where `failures` finds any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"some of {', '.join(TARGETS)}; all, if none is named")
    parser.add_argument("--worker", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write every result here")
    parser.add_argument("--table", type=Path, help="a page whose table is to be renewed")
    options = parser.parse_args()
    if options.worker:
        _work(TARGETS[options.worker])
        return 0
    if unknown := [one for one in options.targets if one not in TARGETS]:
        parser.error(f"target = {unknown[0]!r}: must be some of {', '.join(TARGETS)}")
    compiled = []
    for target in (TARGETS[one] for one in options.targets or TARGETS):
        compiled += compile_for(target)
        print(markdown(compiled[-len(shapes(target.backend)) :]).split("\n", 2)[2], end="", flush=True)
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
