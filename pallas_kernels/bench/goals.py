"""What a problem's fastest implementation of ours is to reach, and whether it did."""

from collections.abc import Iterator, Sequence
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
    """One implementation on one problem. `device_us` is a call inside a program of many, `wall_us` a call of its own."""

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


@dataclass
class Result:
    """One problem: its floor, and everybody's times, ours first."""

    problem: Any
    floor_us: float
    timings: list[Timing] = field(default_factory=list)
    failed: str = ""
    """Why there are none, or nothing to compare them with."""

    @property
    def best(self) -> Timing | None:
        """The first that ran."""
        return next((one for one in self.timings if one.device_us is not None), None)


def verdicts(results: Sequence[Result]) -> Iterator[str]:
    """A line for each goal of each problem."""
    times = {one.problem.name: one.best.device_us for one in results if one.best}
    for result in results:
        goals, best, name = result.problem.goals, result.best, result.problem.name
        if goals == NONE:
            continue
        if best is None or best.device_us is None:
            yield f"{name}: nothing ran{': ' * bool(result.failed)}{result.failed}"
            continue
        mine, said = best.device_us, f"{name} ({best.name})"
        if goals.fraction:
            share = result.floor_us / max(mine - goals.spared_us, 1e-9)
            spared = f" and {goals.spared_us:.0f} us" if goals.spared_us else ""
            yield f"{said}: {share:.2f} of the floor{spared}, {_judged(share, goals.fraction)}"
        if goals.most_us:
            yield f"{said}: {mine:.1f} us, {_judged(mine, goals.most_us, ' us', is_least=False)}"
        for peer, factors in goals.faster_than:
            other = next((one for one in result.timings if one.name == peer), None)
            if other is best or other is None or other.device_us is None:
                why = "it is that itself" if other is best else other.absent if other else "not asked"
                yield f"{said}: beside {peer}, goal {factors[0]:.2f}x: not compared, {why}"
            else:
                ratio = other.device_us / mine
                yield f"{said}: {ratio:.2f}x {peer}, {_judged(ratio, factors, 'x')}"
        for names, factors in goals.over:
            known = [time for one in names if (time := times.get(one)) is not None]
            if len(known) == len(names):
                ratio = sum(known) / mine
                yield f"{said}: {ratio:.2f}x {' + '.join(names)}, {_judged(ratio, factors, 'x')}"


def _judged(value: float, wanted: tuple[float, ...], unit: str = "", *, is_least: bool = True) -> str:
    """The goal, the stretch if there is one, and whether a value reaches them."""
    reached = [value >= one if is_least else value <= one for one in wanted]
    verdict = "missed" if not reached[0] else "stretch met" if len(wanted) > 1 and reached[1] else "met"
    goals = [f"{one:.2f}{unit}" if is_least else f"{one:.0f}{unit}" for one in wanted]
    return f"goal {goals[0]}{''.join(f', stretch {one}' for one in goals[1:])}: {verdict}"
