"""A whole model on one chip, in a few minutes: decoding and ragged requests beside transformers, training with members
vmapped.

    python3 -m benchmarks.on_gpu --budget 240 --output on_gpu.jsonl        # in the repository's folder
    python3 -m benchmarks.on_gpu --output tiny.jsonl                       # without a GPU: a rehearsal, 100 CPU seconds
    make gpu BUDGET=540                                                    # the kernels' bench first, then this

Every piece is a process with a time limit: a hang or an abort costs one, and what a piece knew by then is kept. Lines
are on the disk as they come, the most telling first; `--resume` goes on with a file that was cut short.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pallas_kernels.bench.record import Line, latest
from pallas_kernels.bench.runner import Interrupted, Piece, Runner, ask, digest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "on_gpu.jsonl"


@dataclass(frozen=True)
class Task:
    """A piece of `gpu_pieces` or `gpu_peer`, by kind and model, and the seconds after which it is given up."""

    module: str
    kind: str
    model: str
    limit_s: float

    @property
    def label(self) -> str:
        """The kind of its line."""
        return f"peer {self.kind}" if self.module == "gpu_peer" else self.kind

    def piece(self, size: str, scratch: Path) -> Piece:
        """Its process."""
        command = (sys.executable, "-m", f"benchmarks.{self.module}", self.kind, self.model, "--size", size)
        return Piece(self.label, self.model, (*command, "--scratch", str(scratch)), self.limit_s, least_s=8.0)


TASKS = (
    Task("gpu_pieces", "ceilings", "-", 40),
    Task("gpu_pieces", "agree", "31m", 110),
    Task("gpu_pieces", "decode", "1b", 120),
    Task("gpu_peer", "decode", "1b", 75),
    Task("gpu_pieces", "profile", "1b", 80),
    Task("gpu_pieces", "train", "mqar", 125),
    Task("gpu_pieces", "requests", "1b", 110),
    Task("gpu_peer", "requests", "1b", 75),
    Task("gpu_pieces", "decode", "31m-float32", 50),
    Task("gpu_peer", "decode", "31m-float32", 50),
    Task("gpu_pieces", "decode", "31m", 60),
    Task("gpu_peer", "decode", "31m", 60),
    Task("gpu_pieces", "requests", "31m", 60),
    Task("gpu_peer", "requests", "31m", 60),
)
"""In the order in which a window is spent. On an H200 training took 109 s, requests 82, most of it compiling."""


def summary(lines: list[Line]) -> list[dict[str, Any]]:
    """Ours beside the peer's, a row for each thing that was measured by either."""
    answers = {key: line.get("answer") or {} for key, line in latest(lines).items()}
    rows = []
    for (kind, model), ours in answers.items():
        peer = answers.get((f"peer {kind}", model), {})
        if kind == "decode":
            for batch, mine in ours.get("batches", {}).items():
                other = peer.get("batches", {}).get(batch, {})
                row = _row(f"decode {model} B{batch}", mine, other.get("tokens_per_s"))
                rows.append(row | {"same_tokens": other.get("share_of_tokens_equal_to_ours")})
        elif kind == "requests" and ours:
            best = max((way["tokens_per_s"] for way in peer.get("ways", {}).values()), default=None)
            rows.append(_row(f"requests {model}", ours, best))
    return rows


def _row(what: str, ours: Line, peer: float | None) -> dict[str, Any]:
    rate = ours["tokens_per_s"]
    row = {"what": what, "tokens_per_s": rate, "peer_tokens_per_s": peer}
    return row | {"ratio": rate / peer if peer else None, "of_floor": ours.get("of_floor")}


def environment(scratch: Path) -> dict[str, str]:
    """Of every piece: programs are compiled once, memory is taken as it is needed, and packages are found here."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        "PYTHONPATH": path,
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(scratch / "programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TOKENIZERS_PARALLELISM": "false",
    }


def tell(line: Line) -> None:
    """A line on the terminal, at most three of them long."""
    said = {name: value for name, value in line.items() if name not in ("stderr", "answer")}
    print(f"{said}\n  {str(line.get('answer'))[:400]}", flush=True)
    if line.get("outcome") != "done" and line.get("stderr"):
        print(f"  {line['stderr'].strip().splitlines()[-1][:300]}", flush=True)


def run(options: argparse.Namespace, scratch: Path, began: float) -> int:
    """Runs the pieces; returns 0 when all of them ended well."""
    env = environment(scratch)
    probe = ask(Task("gpu_pieces", "probe", "-", 90).piece(options.size or "tiny", scratch), env)
    tell(probe)
    if "answer" not in probe:
        return 1
    size = options.size or ("tiny" if probe["answer"]["platform"] == "cpu" else "full")
    identity = {**probe["answer"], "size": size, "code": digest(*(ROOT / path for path in CODE))}
    wanted = [task for task in TASKS if options.only in f"{task.label} {task.model}"]
    pieces = [task.piece(size, scratch) for task in wanted]
    about = {"benchmark": "on_gpu", "date": time.strftime("%Y-%m-%d"), "budget_s": options.budget}
    fields = {"about": about, "budget_s": options.budget, "began": began, "resume": options.resume, "env": env}
    with Runner(options.output, identity, **fields, tell=tell) as runner:
        lines = runner.run(pieces)
        rows = summary(runner.record.lines)
        runner.record.keep({"kind": "summary", "name": "", "rows": rows})
    for row in rows:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    return 0 if all(line.get("outcome") == "done" for line in lines) else 1


CODE = ("kvlab", "pallas_kernels", "benchmarks")
"""Folders whose state is part of what was measured."""


def main() -> int:
    """Everything, within the budget."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds in all")
    parser.add_argument("--size", choices=("full", "tiny"), help="default: full on an accelerator, tiny on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="leave out what the output has already")
    parser.add_argument("--only", default="", help="pieces with this in kind and model, such as 'decode 1b'")
    parser.add_argument("--scratch", type=Path, help="keep weights and programs here; default: nowhere")
    options = parser.parse_args()
    in_memory = Path("/dev/shm")
    roomy = in_memory.is_dir() and shutil.disk_usage(in_memory).free > 8e9
    scratch = options.scratch or Path(tempfile.mkdtemp(prefix="on_gpu", dir=in_memory if roomy else None))
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        return run(options, scratch, began)
    except (ValueError, Interrupted) as error:
        print(f"on_gpu: {error or type(error).__name__}", file=sys.stderr)
        return 2
    finally:
        if options.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
