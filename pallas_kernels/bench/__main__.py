"""What the kernels of paged memory achieve on this machine: one command, with jax alone.

    python -m pallas_kernels.bench --json results.jsonl --budget 540      # run, in at most nine minutes
    python -m pallas_kernels.bench --json results.jsonl --resume          # what is missing
    python -m pallas_kernels.bench report results.jsonl [--plot a.png]    # the table again, on any machine

Every case of correctness and every problem is a process of its own, with a time limit. What is known is in the file at
once, a line each. On a CPU the problems are tiny: that shows that the bench works, and nothing about speed."""

import argparse
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pallas_kernels.bench import plan
from pallas_kernels.bench.environment import child_env, default_cache
from pallas_kernels.bench.problems import PROBLEMS
from pallas_kernels.bench.record import Line, read
from pallas_kernels.bench.report import header, plot, rows
from pallas_kernels.bench.results import Found, gather
from pallas_kernels.bench.runner import Interrupted, Piece, Runner, ask, digest

PACKAGE = Path(__file__).parents[1]
RESERVE_S, LEAST_BUDGET_S = 10.0, 30.0
"""Kept for the summary, the plot, and a last process that dies slowly; and the least budget there is."""
MOST_RETRIES = 3
MOST_LETTERS = 300
"""Of a line that names what is missing; the file names all."""
STATUS_OF_AN_INTERRUPTION = 130


def main(arguments: list[str] | None = None) -> int:
    """Runs the bench, or reports what a file says. The status is 1 where anything of ours is wrong or failed, 130 after
    an interruption."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:
        return report(arguments[1:])
    began, parser = time.monotonic(), make_parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    if options.json is None:
        options.json = Path(tempfile.mkdtemp(prefix="pallas_kernels_bench_")) / "results.jsonl"
    env = child_env(options.cache or default_cache())
    asked = argparse.Namespace(**{**vars(options), "size": options.size or "tiny"})
    first = ask(plan.probe(asked), env)
    answer = first.get("answer", {})
    options.size = options.size or ("full" if answer.get("platform", "cpu") != "cpu" else "tiny")
    if not plan.chosen(options):
        parser.error(f"only = {options.only!r}: is of another size than {options.size!r}")
    known = {name: answer[name] for name in ("device", "platform", "versions") if name in answer}
    identity = {**known, "code": digest(PACKAGE), "size": options.size, "rounds": options.rounds}
    try:
        runner = Runner(
            options.json,
            {"benchmark": "pallas_kernels", **identity},
            about={"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit(), "command": arguments},
            budget_s=options.budget - RESERVE_S,
            began=began,
            resume=options.resume,
            env=env,
        )
    except ValueError as error:
        parser.error(str(error))
    with runner:
        runner.record.keep(first)
        print(f"{answer.get('device', 'no device')}, jax {answer.get('versions', {}).get('jax')}; {options.json}")
        status = 0
        try:
            if first["outcome"] == "done":
                _run_all(runner, options, answer["platform"])
            else:
                print(f"probe: {first['outcome']}, {first['reason']}", first["stderr"], sep="\n")
                status = 1
        except Interrupted as error:
            print(f"interrupted by {error}; go on with --resume")
            status = STATUS_OF_AN_INTERRUPTION
        found = gather(runner.record.lines)
        runner.record.keep(found.summary())
    _conclude(found, options.plot)
    return status or int(bool(found.wrong))


def report(arguments: list[str]) -> int:
    """The table, verdicts and plot of a file; the status as that of the run."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench report")
    parser.add_argument("file", type=Path, help="what a run wrote with --json")
    parser.add_argument("--plot", type=Path, help="draw bandwidth over context and batch here (needs matplotlib)")
    options = parser.parse_args(arguments)
    _check_plot(parser, options.plot)
    try:
        found = gather(read(options.file))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    about = {name: found.header.get(name) for name in ("device", "versions", "date", "commit", "size")}
    print(*(f"{name}: {value}" for name, value in about.items()), *_said_of_cases(found), sep="\n")
    print(*_table(found), sep="\n")
    _conclude(found, options.plot)
    return int(bool(found.wrong))


def _run_all(runner: Runner, options: argparse.Namespace, platform: str) -> None:
    """Stage by stage; what is known is printed as it comes."""
    for stage in plan.stages(options, platform):
        if not stage.pieces:
            continue
        if stage.pieces[0].kind == "case":
            print(f"\n{stage.name}: {len(stage.pieces)}", flush=True)
            before = gather(runner.record.lines)
            runner.run(stage.pieces, workers=stage.workers, share=stage.share)
            print(*_said_of_cases(gather(runner.record.lines), before), sep="\n", flush=True)
            continue
        print(f"\n{stage.name}", *([] if stage.pieces[0].kind == "ceilings" else [header()]), sep="\n", flush=True)
        for piece in stage.pieces:
            line = _run_without_culprits(runner, piece, stage.share)
            print(*_lines_of(line, gather(runner.record.lines)), sep="\n", flush=True)


def _run_without_culprits(runner: Runner, piece: Piece, share: float) -> Line:
    """Runs a piece; if it ends in somebody's turn, again without them."""
    (line,) = runner.run([piece], share=share)
    if piece.key in runner.known:
        return line
    for _ in range(MOST_RETRIES):
        culprit = line.get("answer", {}).get("doing")
        if line["outcome"] not in ("failed", "timeout") or not culprit:
            break
        piece = replace(piece, command=(*piece.command, "--without", culprit, f"ended its process: {line['reason']}"))
        (again,) = runner.run([piece], share=share)
        line = again if "answer" in again else line
        if again is not line:
            break
    return line


def _lines_of(line: Line, found: Found) -> list[str]:
    """Of one piece that was timed."""
    answer = line.get("answer", {})
    if line["kind"] == "ceilings" and answer:
        return [", ".join(f"{name} {value:.3g}" for name, value in answer.items())]
    if answer.get("timings") or answer.get("failed"):
        return ["| " + " | ".join(row) + " |" for row in rows(found.result(line))]
    return [f"| {line['name'] or line['kind']} | nobody | - | - | - | - | - | {line['outcome']}: {line['reason']} |"]


def _table(found: Found) -> list[str]:
    return [
        "",
        header(),
        *("| " + " | ".join(line) + " |" for result in found.results + found.beside for line in rows(result)),
    ]


def _said_of_cases(found: Found, before: Found | None = None) -> list[str]:
    right = ", ".join(f"{number} of {op} by {name}" for (op, name), number in sorted(found.right.items()))
    known = before.wrong if before else []
    return [f"right: {right or 'no case'}", *(f"WRONG {failure}" for failure in found.wrong if failure not in known)]


def _conclude(found: Found, path: Path | None) -> None:
    print("", *found.verdicts, *(f"WRONG {failure}" for failure in found.wrong), sep="\n")
    for outcome, names in found.missing.items():
        print(f"{outcome}: {len(names)}, {'; '.join(names)}"[:MOST_LETTERS], flush=True)
    if path and found.bandwidth:
        plot(found.bandwidth, found.limits, path)
    elif path:
        print(f"nothing to draw in {path}: no point of the sweep is known")


def _commit() -> str | None:
    """Of the code that runs, if it lies in a repository."""
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


RESUME = """go on with the file of --json. Pieces that it has as "done", or that "failed" by themselves (an error, an
abort), are told from it. Those that reached their time limit, were cut by the budget, skipped or interrupted, and those
that it lacks, are run; the probe always. A file of another device, other versions, other code, another
size or number of rounds is refused"""


def make_parser() -> argparse.ArgumentParser:
    """The options of the bench."""
    workers = min(10, os.cpu_count() or 1)
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=(__doc__ or "").splitlines()[0],
        epilog="`report FILE` prints the table of a file again. The status is 1 where anything of ours is wrong.",
    )
    parser.add_argument("--size", choices=tuple(PROBLEMS), help="default: full on an accelerator, tiny on a CPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose name has TEXT, and no sweep")
    stages = ", ".join(f'"{name}"' for name in plan.SHARES)
    said = f"stages that are not run, of {stages}: what an earlier window has done already"
    parser.add_argument("--leave-out", nargs="+", default=[], choices=plan.SHARES, metavar="STAGE", help=said)
    parser.add_argument("--rounds", type=int, default=9, help="samples of each figure (default 9)")
    parser.add_argument("--cases", type=int, default=40, help="generated cases of the correctness check (default 40)")
    parser.add_argument("--json", type=Path, help="the file of results, JSON lines; default: in a temporary folder")
    parser.add_argument("--plot", type=Path, help="draw bandwidth over context and batch here (needs matplotlib)")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="end in this time")
    parser.add_argument("--resume", action="store_true", help=RESUME)
    parser.add_argument(
        "--workers", type=int, default=workers, help=f"cases at once (default {workers}); timings run alone"
    )
    parser.add_argument("--cache", type=Path, help="compiled programs are kept here; default: in the user's cache")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Whatever can be refused before a process is started."""
    for name, least in (("rounds", 1), ("cases", 0), ("workers", 1), ("budget", LEAST_BUDGET_S)):
        if not getattr(options, name) >= least:
            parser.error(f"{name} = {getattr(options, name)}: must be at least {least}")
    if not set(plan.SHARES) - set(options.leave_out):
        parser.error("leave-out: must leave a stage to be run")
    if options.only and options.plot:
        parser.error(f"plot = {options.plot}: is drawn of the sweep, which only = {options.only!r} leaves out")
    if options.resume and options.json is None:
        parser.error("resume: needs the file to go on with, as --json")
    names = [problem.name for size in PROBLEMS if size == (options.size or size) for problem in PROBLEMS[size]]
    if not any(options.only in name for name in names):
        parser.error(f"only = {options.only!r}: must be part of one of: {'; '.join(names)}")
    _check_plot(parser, options.plot)


def _check_plot(parser: argparse.ArgumentParser, path: Path | None) -> None:
    if path and importlib.util.find_spec("matplotlib") is None:
        parser.error(f"plot = {path}: needs matplotlib, which is not installed")


if __name__ == "__main__":
    sys.exit(main())
