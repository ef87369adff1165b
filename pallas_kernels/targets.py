"""Compiles kernels for chips that are not here, down to machine code, and says what they take.

    python -m pallas_kernels.targets [H200 ...] [--dims 128] [--only TEXT] [--cases 40] [--json FILE] [--table FILE]

`make kernels-check` does. With `--cases`, the cases that the bench would run on such a chip are compiled too, or only
lowered (`lowering`). Each target is compiled in a process of its own, since the compilers speak to standard error and
remember their platform. Chips of one architecture (H100 and H200) get the same kernels: a program that is, to the
letter, one that was compiled for the other is not compiled twice. The compilers come from
`pallas_kernels/compilers.txt`, in an environment apart; where one is missing, that is the answer.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
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
from functools import partial
from pathlib import Path
from typing import Any

from pallas_kernels import lowering
from pallas_kernels.chips import DIMS, KIVI, TARGETS, Shape, Target
from pallas_kernels.compilers import Overheard, estimate_us, lowered_for, resources, sharding_of
from pallas_kernels.lowering import Lowered
from pallas_kernels.ops import OPS, shapes

INSTALL = "run `make kernels-check`, which builds the environment with the compilers"


@dataclass(frozen=True)
class Compiled:
    """What became of one compilation. `on_chip_bytes` is the shared memory of a thread block, or what lies in VMEM at
    once (blocks of the grid twice); `temp_bytes` what XLA adds around the kernel; `estimate_us` the time that XLA's own
    cost model gives."""

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
        return OPS[self.shape.op].floor_bytes(self.shape) / TARGETS[self.target].bandwidth * 1e6


def missing(target: Target) -> str | None:
    """Why nothing can be compiled for a target here; None: it can."""
    module = "libtpu" if target.backend == "tpu" else "jax_plugins.xla_cuda13"
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"no compiler ({module} is not installed): {INSTALL}"


def wanted_shapes(target: Target, dims: Sequence[int], only: str) -> list[Shape]:
    """Those of the target's backend whose row of the table has a text, in any case."""
    found = shapes(target.backend, dims)
    return [shape for shape in found if only.lower() in " ".join(in_words(target.name, shape)).lower()]


def wanted_cases(target: Target, num_generated: int, only: str) -> list[lowering.Case]:
    """The bench's cases whose name has a text, in any case."""
    return [case for case in lowering.cases(target, num_generated) if only.lower() in case.name.lower()]


def compile_for(
    target: Target, dims: Sequence[int] = DIMS, only: str = "", known: Path | None = None
) -> list[Compiled]:
    """The shapes of the target's backend, in a process of its own. A compiler that is missing is each one's error. The
    folder `known` has what programs of other chips compiled to (`Known`)."""
    wanted = wanted_shapes(target, dims, only)
    if reason := missing(target):
        return [Compiled(target.name, shape, error=reason) for shape in wanted]
    said = _ask(target, "--only", only, *(["--known", str(known)] if known else []), "--dims", *map(str, dims))
    found = [Compiled(shape=Shape(**own.pop("shape")), **own) for own in _read(said)]
    done = {outcome.shape for outcome in found}
    return found + [Compiled(target.name, shape, error=_last_words(said)) for shape in wanted if shape not in done]


def lower_for(target: Target, num_generated: int, only: str = "", *, is_compiled: bool) -> list[Lowered]:
    """The cases that the bench would run on a target, in a process of its own, as `compile_for`."""
    wanted = wanted_cases(target, num_generated, only)
    if reason := missing(target):
        return [Lowered(target.name, case.op, case.name, error=reason) for case in wanted]
    said = _ask(target, "--only", only, "--cases", str(num_generated), *([] if is_compiled else ["--lower"]))
    found = [Lowered(**own) for own in _read(said)]
    done = {(outcome.op, outcome.name) for outcome in found}
    left = [case for case in wanted if (case.op, case.name) not in done]
    return found + [Lowered(target.name, case.op, case.name, error=_last_words(said)) for case in left]


def _ask(target: Target, *arguments: str) -> str:
    """What a worker says, and the compilers in it."""
    variables = {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # of the newest and the oldest at once
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    command = [sys.executable, "-m", "pallas_kernels.targets", "--worker", target.name, *arguments]
    ran = subprocess.run(
        command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return ran.stdout.decode(errors="replace")


MARK = "== compiled "


def _read(said: str) -> Iterator[dict[str, Any]]:
    """A worker's own lines, each behind the compiler's remarks on that kernel."""
    for part in re.split(rf"^(?={MARK})", said, flags=re.MULTILINE)[1:]:
        yield json.loads(part.partition("\n")[0].removeprefix(MARK))


def _last_words(said: str) -> str:
    return (said.strip().splitlines() or ["the compiler's process said nothing"])[-1]


class Known:
    """A folder of what programs compiled to, a file each, by their text and the chip's architecture; None: nothing is
    known, and nothing kept. Only what compiled is kept, so an error is each chip's own."""

    def __init__(self, folder: Path | None):
        self._folder = folder

    def __call__(self, target: Target, program: str, compile_it: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a program compiles to: what the folder says, or else what `compile_it` answers."""
        if self._folder is None or not target.architecture:
            return compile_it()
        digest = hashlib.sha256(f"{target.architecture}\n{program}".encode()).hexdigest()
        path = self._folder / f"{digest}.json"
        if path.exists():
            return json.loads(path.read_text())
        path.write_text(json.dumps(found := compile_it()))
        return found


def _compiled(target: Target, lowered: Any) -> dict[str, Any]:
    """What the compiler makes of a program, and what it says of it."""
    with Overheard() as heard:
        compiled = lowered.compile()
        found = {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes, "estimate_us": estimate_us(compiled)}
    return found | (resources(heard.text) if target.backend == "gpu" else {})


def _work(target: Target, dims: Sequence[int], only: str, known: Known) -> None:
    """In the worker: compiles every shape and prints a line for each."""
    sharding = sharding_of(target)
    for shape in wanted_shapes(target, dims, only):
        began = time.perf_counter()
        outcome: dict[str, Any] = {"target": target.name, "shape": asdict(shape)}
        try:
            lowered, outcome["on_chip_bytes"] = lowered_for(target, OPS[shape.op].call(shape, target, sharding))
            outcome |= known(target, lowered.as_text(), partial(_compiled, target, lowered))
        except Exception as error:  # whatever a compiler refuses is an answer
            outcome["error"] = re.sub(r".*error +: ", "", str(error).strip().splitlines()[0])
        outcome["seconds"] = time.perf_counter() - began
        print(f"{MARK}{json.dumps(outcome)}", flush=True)


def _work_cases(target: Target, num_generated: int, only: str, *, is_compiled: bool) -> None:
    """In the worker: lowers every case and prints a line for each; then, for Hopper, counts what a layer launches."""
    lowered = lowering.lower(target, wanted_cases(target, num_generated, only), is_compiled=is_compiled)
    more = [lowering.layers] if target.backend == "gpu" and target.name != "B200" and not only else []
    for outcome in itertools.chain(lowered, (count(target) for count in more)):
        print(f"{MARK}{json.dumps(asdict(outcome))}", flush=True)


def generations(targets: Sequence[Target]) -> list[Target]:
    """The last of the targets of each kind of code: Hopper's, Blackwell's, TPUs'. Cases are lowered for these."""
    return list({(target.backend, target.name == "B200"): target for target in targets}.values())


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


def in_words(target: str, shape: Shape) -> tuple[str, ...]:
    """What is compiled, in words: the first of HEADER."""
    per = shape.per if shape.per in ("", KIVI) else f"by {shape.per}"
    return (
        shape.op if shape.num_queries == 1 else f"{shape.op}, {shape.num_queries} tokens",
        target,
        f"{shape.format} {per}".strip(),
        str(shape.head_dim),
        shape.extra or "-",
    )


def row(compiled: Compiled) -> tuple[str, ...]:
    """A compilation in words, in the order of HEADER."""
    dash = "-"
    return (
        *in_words(compiled.target, compiled.shape),
        f"no: {compiled.error}" if compiled.error else f"{compiled.seconds:.1f} s",
        dash if compiled.registers is None else str(compiled.registers),
        dash if compiled.spilled_bytes is None else f"{compiled.spilled_bytes} B",
        dash if compiled.on_chip_bytes is None else f"{compiled.on_chip_bytes / 1024:.0f} KiB",
        dash if compiled.estimate_us is None else f"{compiled.estimate_us:.0f} us",
        f"{compiled.floor_us:.0f} us",
    )


def markdown(compiled: Sequence[Compiled]) -> str:
    """The table as Markdown."""
    lines = [HEADER, tuple("---" for _ in HEADER), *map(row, compiled)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


MOST_SPILLED = 480
"""Bytes that may be spilled beyond 128 dims, where all registers are taken: what decoding over KIVI's pages of 2 bits
spills on jax 0.12, which is the most."""


def failures(compiled: Sequence[Compiled], lowered: Sequence[Lowered] = ()) -> list[str]:
    """What must not be: a kernel that does not compile for a chip, or that spills there; a case that does not lower."""
    spilled = [
        kernel
        for kernel in compiled
        if (kernel.spilled_bytes or 0) > (MOST_SPILLED if kernel.shape.head_dim > 128 else 0)
    ]
    return [
        *(f"{kernel.shape} for {kernel.target}: {kernel.error}" for kernel in compiled if kernel.error),
        *(f"{kernel.shape} for {kernel.target}: spills {kernel.spilled_bytes} bytes" for kernel in spilled),
        *(f"{case.op}, {case.name} for {case.target}: {case.error}" for case in lowered if case.error),
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"some of {', '.join(TARGETS)}; all, if none is named")
    parser.add_argument("--worker", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--known", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dims", type=int, nargs="+", choices=DIMS, default=DIMS, help="head dims (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="what has this text in its row, or its case's name")
    parser.add_argument("--cases", type=int, help="the bench's cases as well: named ones, and so many drawn of each op")
    parser.add_argument("--lower", action="store_true", help="lower cases, and do not compile them")
    parser.add_argument("--json", type=Path, help="write every result here")
    parser.add_argument("--table", type=Path, help="write the table here")
    options = parser.parse_args()
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"target = {unknown[0]!r}: must be some of {', '.join(TARGETS)}")
    return options


def main() -> int:
    """Compiles everything; the status is 1 where `failures` finds any."""
    options = _options()
    if options.worker and options.cases is not None:
        _work_cases(TARGETS[options.worker], options.cases, options.only, is_compiled=not options.lower)
        return 0
    if options.worker:
        _work(TARGETS[options.worker], options.dims, options.only, Known(options.known))
        return 0
    chosen = [TARGETS[name] for name in options.targets or TARGETS]
    with_cases = generations(chosen) if options.cases is not None else []

    def of_backend(backend: str) -> tuple[list[Compiled], list[Lowered]]:
        compiled, lowered = [], []
        for target in chosen:
            if target.backend == backend:
                compiled += (now := compile_for(target, options.dims, options.only, known))
                print(markdown(now).split("\n", 2)[2], end="", flush=True)
                if target in with_cases:
                    lowered += (these := lower_for(target, options.cases, options.only, is_compiled=not options.lower))
                    said = f"{sum(not case.error for case in these)} of {len(these)} cases"
                    print(f"{target.name}: {said} {'lowered' if options.lower else 'compiled'}", flush=True)
        return compiled, lowered

    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(2) as pool,  # the compilers of the two run side by side
    ):
        known = Path(folder)
        compiled, lowered = (
            list(itertools.chain(*parts)) for parts in zip(*pool.map(of_backend, ("gpu", "tpu")), strict=True)
        )
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        found = {
            "date": date.today().isoformat(),
            "versions": versions,
            "compiled": [asdict(outcome) for outcome in compiled],
        }
        options.json.write_text(
            json.dumps(found | {"cases": [asdict(outcome) for outcome in lowered]}, indent=1) + "\n"
        )
    if options.table:
        options.table.write_text(
            f"# What the kernels compile to (jax {importlib.metadata.version('jax')})\n\n" + markdown(compiled)
        )
    for failure in failures(compiled, lowered):
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures(compiled, lowered) else 0


if __name__ == "__main__":
    sys.exit(main())
