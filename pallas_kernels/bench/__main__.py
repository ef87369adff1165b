"""What the kernels of paged memory achieve on this machine: one command, with jax alone.

    python -m pallas_kernels.bench [--json results.json] [--plot bandwidth.png] [--size tiny]

First whether it is right here (`proof`), then ceilings (copying, reading, a product), then every problem: ours beside every peer that
is installed, in turns, medians; a table, verdicts on the goals, and JSON. On a CPU the problems are tiny: that shows that the bench
works, and nothing about speed. The status is 1 where a kernel is wrong: then nothing is timed, or its time does not count.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.bench.clock import ceilings, is_accelerated
from pallas_kernels.bench.goals import verdicts
from pallas_kernels.bench.measure import measure, sweep
from pallas_kernels.bench.peers import PEERS
from pallas_kernels.bench.problems import PROBLEMS
from pallas_kernels.bench.report import header, plot, rows
from pallas_kernels.bench.verify import verify


def main() -> int:
    """Correctness, ceilings, problems, sweep."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=tuple(PROBLEMS), help="default: full on an accelerator, tiny on a CPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose name has TEXT, and no sweep")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each figure (default 9)")
    parser.add_argument("--cases", type=int, default=40, help="generated cases of the correctness check (default 40)")
    parser.add_argument("--json", type=Path, help="write every result here")
    parser.add_argument("--plot", type=Path, help="draw bandwidth over context and batch here (needs matplotlib)")
    options = parser.parse_args()
    for name, least in (("rounds", 1), ("cases", 0)):
        if getattr(options, name) < least:
            parser.error(f"{name} = {getattr(options, name)}: must be at least {least}")
    if options.only and options.plot:
        parser.error(f"plot = {options.plot}: is drawn of the sweep, which only = {options.only!r} leaves out")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error(f"plot = {options.plot}: needs matplotlib, which is not installed")
    size = options.size or ("full" if is_accelerated() else "tiny")
    problems = [one for one in PROBLEMS[size] if options.only in one.name]
    if not problems:
        legal = "; ".join(one.name for one in PROBLEMS[size])
        parser.error(f"only = {options.only!r}: must be part of one of: {legal}")
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    checked, wrong = verify(options.cases)
    if wrong:
        print(*(f"WRONG {one}" for one in wrong), sep="\n")
        return 1
    right = ", ".join(f"{number} of {op} by {name}" for (op, name), number in sorted(checked.items()))
    print(f"every case right: {right}", flush=True)
    limits = ceilings(size)
    print(", ".join(f"{name} {value:.3g}" for name, value in limits.items()), flush=True)
    record: dict[str, Any] = {
        "benchmark": "pallas_kernels",
        "date": datetime.now(UTC).date().isoformat(),
        "device": device.device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "size": size,
        "checked": {f"{op} by {name}": number for (op, name), number in checked.items()},
        "ceilings": limits,
    }

    def save(**more: Any) -> None:
        """What is known so far: nothing is lost if a later problem ends the process."""
        record.update(more)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")

    print("", header(), sep="\n", flush=True)
    results = []
    for problem in problems:
        results.append(measure(problem, limits, options.rounds))
        print(*("| " + " | ".join(line) + " |" for line in rows(results[-1])), sep="\n", flush=True)
        save(results=[asdict(one) for one in results])
    said = list(verdicts(results))
    print("", *said, sep="\n", flush=True)
    save(verdicts=said)
    ours = [(one.problem.name, t) for one in results for t in one.timings if t.name not in PEERS]
    differing = [f"WRONG {name}: {timing.name} {timing.absent}" for name, timing in ours if timing.is_wrong]
    print(*differing, sep="\n")
    if (options.plot or options.json) and not options.only:
        points = sweep(size, limits, options.rounds)
        save(bandwidth=points)
        if options.plot:
            plot(points, limits, options.plot)
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
