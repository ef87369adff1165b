"""Predicts what the GPU kernels take on an H100 and an H200 that are not here, from their machine code.

    python -m pallas_kernels.predict [TEXT ...] [--label before] [--json FILE]     # in .venv-kernels

For every problem of the bench that has a GPU kernel (or whose name has a TEXT): what one call launches, the kernel's
registers, the cycles of its inner loop, and a time by `timing_model`. Nothing here was measured on a chip."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from pallas_kernels.chips import TARGETS, Call, stored_as
from pallas_kernels.machine_code import Turn
from pallas_kernels.masking import Scoring
from pallas_kernels.ops import OPS
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.timing_model import ASSUMED, GPUS, WAITS, Gpu, Kernel, cycles, kernel_us, read_kernels, waits

LIMITS = {"product_flops_per_s": 790e12}
"""Of the floor, besides reading: what a large product of an H200 is expected to reach."""


@dataclass(frozen=True)
class Predicted:
    """One problem: `launches` by kind; `kernels` that Mosaic compiled; per GPU `kernel_us` of those with products (None
    where the model knows none), and `floor_us`."""

    problem: str
    launches: dict[str, int]
    kernels: tuple[Kernel, ...]
    kernel_us: dict[str, float | None]
    floor_us: dict[str, float]

    @property
    def num_launches(self) -> int:
        """Kernels and copies of one call."""
        return sum(self.launches.values())

    def call_us(self, gpu: str) -> tuple[float, float] | None:
        """Least and most of a whole call: other launches in a graph, or each by itself."""
        if (mine := self.kernel_us[gpu]) is None:
            return None
        others = self.num_launches - sum(kernel.attending is not None for kernel in self.kernels)
        return mine + others * ASSUMED.graph_launch_us, mine + others * ASSUMED.own_launch_us


def problems() -> list[Any]:
    """Those of the bench that a GPU kernel of ours takes: attention over pages, and writing into them."""
    from pallas_kernels.bench.others import Write
    from pallas_kernels.bench.paged import Problem
    from pallas_kernels.bench.problems import PROBLEMS
    from pallas_kernels.paged_attention.gpu import refusal
    from pallas_kernels.selection import Asked

    def is_taken(problem: Problem) -> bool:
        asked = Asked(
            problem.format,
            problem.page_size,
            (problem.dim, problem.value_dim),
            problem.num_heads // problem.num_kv_heads,
            is_latent=problem.latent_dim > 0,
            num_queries=problem.num_queries,
        )
        return refusal(asked) is None

    return [
        problem
        for problem in PROBLEMS["full"]
        if isinstance(problem, Write) or (isinstance(problem, Problem) and is_taken(problem))
    ]


def program_of(problem: Any, sharding: Any) -> Call:
    """A function of arrays that answers a problem by our GPU kernel."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.bench.others import Write

    def array(*dims: int, of: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(dims, of, sharding=sharding)

    def pages(num_pages: int) -> Pages:
        shape = num_pages, problem.num_kv_heads, problem.page_size, problem.dim
        pool = stored_as(problem.format, "token", shape, sharding)
        latent_dim = getattr(problem, "latent_dim", 0)
        return Pages(pool, value_dim=latent_dim) if latent_dim else Pages(pool, pool)

    (op,) = problem.ops
    kernel = OPS[op].kernel("gpu")
    if isinstance(problem, Write):
        num_tokens = problem.num_tokens
        tokens = array(1, num_tokens, problem.num_kv_heads, problem.dim, of=jnp.bfloat16)
        arrays = pages(8 * num_tokens // problem.page_size + 1), tokens, tokens, array(1, num_tokens)
        return Call(lambda *given: kernel(*given, chip="hopper"), arrays, (0,))
    batch = len(problem.lengths)
    heads = (problem.num_kv_heads,) if problem.keep < 1 else ()
    table = array(batch, *heads, problem.table_len)
    queries = array(batch, problem.num_queries, problem.num_heads, problem.dim, of=jnp.bfloat16)
    pool = pages(1 + batch * -(-max(problem.lengths) // problem.page_size))
    arrays = queries, pool, Lists(table, table), array(batch, problem.num_queries), array(batch)
    scoring = Scoring(problem.dim**-0.5)
    return Call(lambda *given: kernel(*given, scoring, chip="hopper"), arrays)


def turns_of(problem: Any, grid: tuple[int, int, int]) -> list[int]:
    """How many blocks of 64 tokens each thread block of a grid attends to, in order: as `sharing.split` cuts the lists;
    where one query is asked, the longest first, as a plan launches them. A grid of another size is taken to have equal
    shares."""
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.paged_attention.plan import BLOCK_LEN, PIECES
    from pallas_kernels.paged_attention.sharing import split
    from pallas_kernels.tensor_cores import ROWS

    by_head = problem.keep < 1
    heads = 1 if by_head else problem.num_kv_heads
    group = problem.num_heads // problem.num_kv_heads
    is_wide = problem.num_queries * group > ROWS and problem.format == "bfloat16"
    tile_len = min(problem.num_queries, ROWS * (2 if is_wide else 1) // group)
    page_size = min(problem.page_size, BLOCK_LEN)
    counts = []
    for length in problem.lengths:
        for begin in range(0, problem.num_queries, tile_len):
            last = length - problem.num_queries + min(begin + tile_len, problem.num_queries)
            pages = min(-(-last // page_size), problem.table_len * problem.page_size // page_size)
            counts += [pages] * (problem.num_kv_heads if by_head else 1)
    block_pages = BLOCK_LEN // page_size
    pieces = np.asarray(split(jnp.array(counts, jnp.int32), block_pages, max(1, PIECES // heads), problem.table_len))
    sizes = -np.sort(-pieces[:, 2]) if problem.num_queries == 1 else pieces[:, 2]
    turns = [-(-int(count) // block_pages) for count in sizes]
    # Heads of a piece, or of a chunk the pieces of a head, come one after the other.
    turns = [count for count in turns for _ in range(heads)] if problem.num_queries == 1 else turns * heads
    size = grid[0] * grid[1] * grid[2]
    if len(turns) == size:
        return turns
    total = sum(turns)
    return [total // size + (number < total % size) for number in range(size)]


MARK = "== launches "


def predict(problem: Any) -> Predicted:
    """Compiles a problem for an absent H200 in a process of its own, and reads what came of it. Raises RuntimeError,
    with the compiler's last words, where that fails."""
    from pallas_kernels.bench.inputs import bytes_of
    from pallas_kernels.bench.paged import Problem

    with tempfile.TemporaryDirectory() as folder:
        variables = {
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_SASS_CTRL": "1",
            "MOSAIC_GPU_DUMP_TO": folder,
        }
        command = [sys.executable, "-m", "pallas_kernels.predict", "--worker", problem.name]
        ran = subprocess.run(command, env=os.environ | variables, stdout=-1, stderr=-2, check=False)
        said = ran.stdout.decode(errors="replace")
        found = [line for line in said.splitlines() if line.startswith(MARK)]
        if ran.returncode or not found:
            raise RuntimeError(f"{problem.name}: {(said.strip().splitlines() or ['nothing was said'])[-1]}")
        kernels = read_kernels(Path(folder))
    with_products = [kernel for kernel in kernels if kernel.attending]
    times: dict[str, float | None] = {gpu.name: None for gpu in GPUS}
    if isinstance(problem, Problem) and with_products:
        num_bytes = 64 * bytes_of(problem.dim + (not problem.latent_dim) * problem.value_dim, problem.format)
        is_cached = problem.num_queries > 1  # but for the first tile of a chunk, pages come from the second-level cache
        times = {
            gpu.name: sum(
                kernel_us(kernel, gpu, turns_of(problem, kernel.grid), num_bytes, is_cached=is_cached)
                for kernel in with_products
            )
            for gpu in GPUS
        }
    return Predicted(
        problem.name, json.loads(found[0].removeprefix(MARK)), tuple(kernels), times, floors(problem, GPUS)
    )


def floors(problem: Any, gpus: Sequence[Gpu]) -> dict[str, float]:
    """Microseconds that a problem takes at least, by what each chip is expected to read."""
    return {
        gpu.name: problem.floor_us({"read_bytes_per_s": gpu.bytes_per_s, "copy_bytes_per_s": gpu.bytes_per_s, **LIMITS})
        for gpu in gpus
    }


def _work(name: str) -> None:
    """In the worker: compiles one problem, and prints what it launches."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels.launches import count_launches

    (problem,) = (problem for problem in problems() if problem.name == name)
    target = TARGETS["H200"].description
    topology = topologies.get_topology_desc(platform="cuda", topology="1 x 1 x 1", target_config=target)
    call = program_of(problem, SingleDeviceSharding(topology.devices[0]))
    lowered = jax.jit(call.run, donate_argnums=call.donated).trace(*call.arrays).lower(lowering_platforms=("cuda",))
    print(f"{MARK}{json.dumps(count_launches(lowered.compile().as_text() or ''))}", flush=True)


LOOPS = ("attending", "fetching", "longest")


def as_json(prediction: Predicted) -> dict[str, Any]:
    """A prediction as it is kept."""

    def loop(turn: Turn | None) -> dict[str, Any] | None:
        if turn is None:
            return None
        return {
            "address": hex(turn.address),
            "instructions": len(turn.instructions),
            "stall_cycles": turn.stall_cycles,
            "tensor_cycles": turn.tensor_cycles,
            "wait_cycles": waits(turn),
            "cycles": cycles(turn),
            "inner_loops_counted_once": turn.num_inner_loops,
            "operations": dict(turn.counts.most_common()),
        }

    def kernel(kernel: Kernel) -> dict[str, Any]:
        mine = {name: value for name, value in vars(kernel).items() if name not in LOOPS}
        loops = {name: loop(getattr(kernel, name)) for name in LOOPS}
        return mine | {"num_resident": kernel.num_resident, "num_attending": kernel.num_attending} | loops

    return {
        "problem": prediction.problem,
        "launches": prediction.launches,
        "num_launches": prediction.num_launches,
        "kernel_us": prediction.kernel_us,
        "call_us": {gpu.name: prediction.call_us(gpu.name) for gpu in GPUS},
        "floor_us": prediction.floor_us,
        "kernels": [kernel(each) for each in prediction.kernels],
    }


HEADER = (
    "problem",
    "launches",
    "registers",
    "thread blocks an SM",
    "inner loop (without products: the longest): instructions; stalls + products + waits",
    "the other warpgroup's",
    *(f"{gpu.name}: kernel, of floor; call" for gpu in GPUS),
)


def row(prediction: dict[str, Any]) -> tuple[str, ...]:
    """A prediction as it is kept, in words, in the order of HEADER; of several kernels one behind the other."""

    def loop(turn: dict[str, Any] | None) -> str:
        if turn is None:
            return "-"
        parts = f"{turn['stall_cycles']} + {turn['tensor_cycles']:.0f} + {turn['wait_cycles']}"
        once = " (inner loops once)" * bool(turn["inner_loops_counted_once"])
        return f"{turn['instructions']}; {parts} = {turn['cycles']:.0f}{once}"

    def on(gpu: str) -> str:
        if (mine := prediction["kernel_us"][gpu]) is None:
            return "-"
        low, high = prediction["call_us"][gpu]
        return f"{mine:.0f} us, {prediction['floor_us'][gpu] / mine:.2f}; {low:.0f}-{high:.0f} us"

    def each(values: Sequence[object]) -> str:
        return " / ".join(map(str, values)) or "-"

    kernels = prediction["kernels"]
    return (
        prediction["problem"],
        str(prediction["num_launches"]),
        each([f"{kernel['registers']}{' (spills)' * bool(kernel['spilled_bytes'])}" for kernel in kernels]),
        each([kernel["num_resident"] for kernel in kernels]),
        each([loop(kernel["attending"] or kernel["longest"]) for kernel in kernels]),
        each([loop(kernel["fetching"]) for kernel in kernels]),
        *(on(gpu.name) for gpu in GPUS),
    )


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Predictions as they are kept, as a table in Markdown."""
    lines = [HEADER, tuple("---" for _ in HEADER), *map(row, found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def page(kept: dict[str, Any]) -> str:
    """Everything that was kept, a table for each label."""
    parts = ["# Predicted from machine code: nothing here was measured on a chip\n"]
    for label, entry in kept.items():
        parts.append(f"## {label}\n\n{entry['date']}, jax {entry['versions']['jax']}.\n\n{markdown(entry['problems'])}")
    return "\n".join(parts)


def main() -> int:
    """Predicts every problem; the status is 1 where one does not compile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", nargs="*", help="only problems whose name has one of these; all, if none is given")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument(
        "--label", default="now", help="the name under which --json keeps the result, beside others there"
    )
    parser.add_argument("--json", type=Path, help="results by label, made or added to; all tables go into the same .md")
    options = parser.parse_args()
    if options.worker:
        _work(options.worker)
        return 0
    found, failed = [], []
    for problem in problems():
        if options.texts and not any(text in problem.name for text in options.texts):
            continue
        try:
            found.append(as_json(predict(problem)))
            print(markdown(found[-1:]).split("\n", 2)[2], end="", flush=True)
        except RuntimeError as error:
            failed.append(str(error))
    if options.json:
        kept = json.loads(options.json.read_text()) if options.json.exists() else {}
        kept[options.label] = {
            "date": date.today().isoformat(),
            "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "nvidia-cuda-nvcc")},
            "assumed": asdict(ASSUMED) | {"exposed_cycles": WAITS},
            "gpus": [asdict(gpu) for gpu in GPUS],
            "problems": found,
        }
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(page(kept))
    for reason in failed:
        print(f"failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
