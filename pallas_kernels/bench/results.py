"""What a record of the bench says: results, verdicts, and what is wrong. Needs no device."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pallas_kernels.bench.goals import NONE, Goals, Result, Timing, verdicts
from pallas_kernels.bench.measure import sweep
from pallas_kernels.bench.paged import PLANNED
from pallas_kernels.bench.peers import PEERS
from pallas_kernels.bench.problems import PROBLEMS
from pallas_kernels.bench.record import Line, latest
from pallas_kernels.ops import WITH_KERNELS


@dataclass
class Found:
    """All that a record knows."""

    header: Line
    limits: dict[str, float]
    """The ceilings."""
    results: list[Result] = field(default_factory=list)
    """Of problems, beside the peers of their goals."""
    beside: list[Result] = field(default_factory=list)
    """Of our first beside other peers."""
    bandwidth: list[dict[str, Any]] = field(default_factory=list)
    """Points of the sweep."""
    right: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Cases, by op and implementation."""
    wrong: list[str] = field(default_factory=list)
    """What of ours is wrong, or failed."""
    missing: dict[str, list[str]] = field(default_factory=dict)
    """By outcome, what was not run to its end."""
    doubts: dict[tuple[str, str], str] = field(default_factory=dict)
    """Why the times of an op by an implementation do not count; by "" is by any."""

    @property
    def verdicts(self) -> list[str]:
        """Of the goals."""
        return list(verdicts(self.results))

    def result(self, line: Line) -> Result:
        """What a line with an answer says of a problem, with its floor where ceilings are known. Its goals are
        today's."""
        answer, problems = line["answer"], {problem.name: problem for problem in PROBLEMS[self.header["size"]]}
        timings, failed = [Timing(**timing) for timing in answer["timings"]], answer["failed"]
        has_ended = line["outcome"] in ("failed", "timeout")
        if has_ended and not answer["doing"]:
            failed = failed or line["reason"]
        for timing in timings:
            if has_ended and timing.name == answer["doing"]:  # it was its turn
                timing.device_us, timing.has_failed, timing.absent = None, True, line["reason"]
            elif line["outcome"] != "done" and timing.device_us is None:
                timing.absent = timing.absent or f"not reached: {line['reason']}"
        found = Result(problems.get(line["name"], _Unknown(line["name"])), timings, failed)
        found.judge(self.limits)
        for timing in timings:
            timing.doubt = (
                "" if timing.name in PEERS else self._doubt(found.problem.ops, timing.name.removesuffix(PLANNED))
            )
        return found

    def _doubt(self, ops: tuple[str, ...], name: str) -> str:
        """A program of two ops is by "None": by any implementation."""
        mine = (why for (op, by), why in self.doubts.items() if op in ops and (name == "None" or by in ("", name)))
        return "; ".join(sorted(mine))

    def summary(self) -> Line:
        """The record's last line."""
        return {
            "kind": "summary",
            "name": "",
            "right": {f"{op} by {name}": number for (op, name), number in sorted(self.right.items())},
            "wrong": self.wrong,
            "missing": self.missing,
            "verdicts": self.verdicts,
        }


@dataclass(frozen=True)
class _Unknown:
    """A problem of a record that there is none of any more."""

    name: str
    goals: Goals = NONE
    ops: tuple[str, ...] = ()

    def floor_us(self, limits: dict[str, float]) -> float:
        raise KeyError(self.name)


def gather(lines: Iterable[Line]) -> Found:
    """What the lines of a record say, the header first."""
    lines = list(lines)
    kinds = defaultdict[str, list[Line]](list)
    for line in latest(lines).values():
        kinds[line["kind"]].append(line)
    found = Found(lines[0], next((line.get("answer", {}) for line in kinds["ceilings"]), {}))
    _count_cases(kinds["case"], found)
    if lines[0].get("platform") in ("gpu", "tpu"):
        found.wrong += _never_ran(kinds["case"], f"mosaic_{lines[0]['platform']}")
    found.results = [found.result(line) for line in kinds["problem"] if "answer" in line]
    found.beside = [found.result(line) for line in kinds["beside"] + kinds["slow"] if "answer" in line]
    found.bandwidth = list(_bandwidth(kinds["sweep"], lines[0]["size"]))
    for line in (line for kind in ("probe", "ceilings", "problem", "sweep") for line in kinds[kind]):
        if line["outcome"] in ("failed", "timeout") and not (line["kind"] == "problem" and "answer" in line):
            found.wrong.append(f"{_named(line)}: {line['reason']}")
    for result in found.results:
        if result.failed:
            found.wrong.append(f"{result.problem.name}: {result.failed}")
        failed = [
            timing for timing in result.timings if timing.name not in PEERS and (timing.is_wrong or timing.has_failed)
        ]
        found.wrong += [f"{result.problem.name}: {timing.name} {timing.absent}" for timing in failed]
    for line in (line for of_kind in kinds.values() for line in of_kind):
        if line.get("outcome", "done") != "done":
            found.missing.setdefault(line["outcome"], []).append(_named(line))
    return found


def _bandwidth(lines: Iterable[Line], size: str) -> Iterator[dict[str, Any]]:
    problems = {problem.name: problem for problem in sweep(size)}
    for line in lines:
        for timing in line.get("answer", {}).get("timings", ()):
            if timing["device_us"] and line["name"] in problems:
                problem = problems[line["name"]]
                yield {
                    "batch": len(problem.lengths),
                    "context": problem.lengths[0],
                    "bytes_per_s": problem.live_bytes / timing["device_us"] * 1e6,
                    "device_us": timing["device_us"],
                }


def _count_cases(lines: Iterable[Line], found: Found) -> None:
    """Counts the cases that are right, tells those that are not, and puts their implementations in doubt."""
    counts = Counter[tuple[str, str]]()
    for line in lines:
        op, _, name = line["name"].partition(": ")
        answer = line.get("answer", {})
        if line["outcome"] == "done" and not answer["wrong"]:
            found.right.update((op, backend) for backend in answer["by"])
        elif line["outcome"] in ("done", "failed", "timeout"):
            by, why = answer.get("by") or [""], answer.get("wrong") or line.get("reason")
            found.wrong.append(f"{op}{' by ' * bool(by[0])}{', '.join(by)}, {name}: {why}")
            counts.update((op, backend) for backend in by)
    for (op, by), number in counts.items():
        found.doubts[op, by] = f"{number} case{'s' * (number > 1)} of {op}{' by ' * bool(by)}{by} wrong"


def _never_ran(lines: Iterable[Line], kernel: str) -> Iterator[str]:
    """Ops of which cases ran, and none by its kernel."""
    done = [(line["name"].partition(": ")[0], line["answer"]["by"]) for line in lines if line["outcome"] == "done"]
    ran, mine = {op for op, _ in done}, {op for op, by in done if kernel in by}
    return (f"{op}: no case ran by {kernel}" for op in WITH_KERNELS if op in ran - mine)


def _named(line: Line) -> str:
    return f"{line['kind']} {line['name']}".strip()
