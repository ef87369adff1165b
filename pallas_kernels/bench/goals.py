"""What a problem's fastest implementation of ours is to reach, and whether it did."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Goals:
    """Of the first implementation that ran; of each what must be, and what would be a stretch."""

    fraction: tuple[float, ...] = ()
    """The floor's time over its own, at least."""
    spared_us: float = 0.0
    """Microseconds of its time that are not held against it."""
    most_us: tuple[float, ...] = ()
    faster_than: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """Names of others on the same problem, and how many times as fast as they it is to be."""
    over: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...] = ()
    """Names of other problems, and the least of the sum of their times over its own."""


NONE = Goals()


@dataclass
class Timing:
    """One implementation on one problem. `device_us` is a call inside a program of many, `wall_us` a call of its
    own."""

    name: str
    device_us: float | None = None
    wall_us: float | None = None
    fraction: float | None = None
    """The floor's time over `device_us`."""
    error: float | None = None
    """Relative difference from the reference."""
    absent: str = ""
    """Why it was not run, or is not counted."""
    is_wrong: bool = False
    has_failed: bool = False
    """Whether that was no refusal, but an error or the end of its process."""
    doubt: str = ""
    """Why its time does not count: cases in which it is wrong."""


@dataclass
class Result:
    """One problem: its floor, and everybody's times, ours first."""

    problem: Any
    timings: list[Timing] = field(default_factory=list)
    failed: str = ""
    """Why there are none, or nothing to compare them with."""
    doing: str = ""
    """Whose turn it is, while it is being measured: if the process ends, it was they."""
    floor_us: float | None = None
    """By the device's ceilings: None until they are known."""

    def judge(self, limits: Mapping[str, float]) -> None:
        """Finds the floor, and everybody's share of it, where all ceilings that it takes are known."""
        try:
            floor_us = self.problem.floor_us(limits)
        except KeyError:
            return
        self.floor_us = floor_us
        for timing in self.timings:
            if timing.device_us is not None:
                timing.fraction = floor_us / timing.device_us

    @property
    def best(self) -> Timing | None:
        """The first that ran."""
        return next((timing for timing in self.timings if timing.device_us is not None), None)


def verdicts(results: Sequence[Result]) -> Iterator[str]:
    """A line for each goal of each problem; one whose time does not count says why."""
    times = {result.problem.name: result.best.device_us for result in results if result.best}
    for result in results:
        if result.problem.goals == NONE:
            continue
        best = result.best
        if best is None or best.device_us is None:
            yield f"{result.problem.name}: nothing ran{': ' * bool(result.failed)}{result.failed}"
            continue
        for said in _verdicts_of(result, best, best.device_us, times):
            yield f"{result.problem.name} ({best.name}): {said}{'; does not count: ' * bool(best.doubt)}{best.doubt}"


def _verdicts_of(result: Result, best: Timing, mine: float, times: Mapping[str, float | None]) -> Iterator[str]:
    goals = result.problem.goals
    if goals.fraction and result.floor_us is None:
        yield f"goal {goals.fraction[0]:.2f} of the floor: not compared, the ceilings are not known"
    elif goals.fraction and mine <= goals.spared_us:
        yield f"{mine:.1f} us, within the {goals.spared_us:.0f} us that are not held against it: met"
    elif goals.fraction and result.floor_us is not None:
        share = result.floor_us / (mine - goals.spared_us)
        spared = f" and {goals.spared_us:.0f} us" if goals.spared_us else ""
        yield f"{share:.2f} of the floor{spared}, {_judged(share, goals.fraction)}"
    if goals.most_us:
        yield f"{mine:.1f} us, {_judged(mine, goals.most_us, ' us', is_least=False)}"
    for peer, factors in goals.faster_than:
        other = next((timing for timing in result.timings if timing.name == peer), None)
        if other is best or other is None or other.device_us is None:
            why = "it is that itself" if other is best else other.absent if other else "not asked"
            yield f"beside {peer}, goal {factors[0]:.2f}x: not compared, {why}"
        else:
            ratio = other.device_us / mine
            yield f"{ratio:.2f}x {peer}, {_judged(ratio, factors, 'x')}"
    for names, factors in goals.over:
        known = [time for name in names if (time := times.get(name)) is not None]
        if len(known) == len(names):
            ratio = sum(known) / mine
            yield f"{ratio:.2f}x {' + '.join(names)}, {_judged(ratio, factors, 'x')}"


def _judged(value: float, wanted: tuple[float, ...], unit: str = "", *, is_least: bool = True) -> str:
    """The goal, the stretch if there is one, and whether a value reaches them."""
    reached = [value >= goal if is_least else value <= goal for goal in wanted]
    verdict = "missed" if not reached[0] else "stretch met" if len(wanted) > 1 and reached[1] else "met"
    goals = [f"{goal:.2f}{unit}" if is_least else f"{goal:.0f}{unit}" for goal in wanted]
    return f"goal {goals[0]}{''.join(f', stretch {stretch}' for stretch in goals[1:])}: {verdict}"
