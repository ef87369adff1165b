"""What a problem's fastest implementation of ours is to reach, and whether it did."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Goals:
    """Of the first implementation that ran."""

    fraction: float | None = None
    """The floor's time over its own, at least."""
    stretch: float | None = None
    """The fraction to be proud of."""
    spared_us: float = 0.0
    """Microseconds of its time that are not held against it."""
    most_us: float | None = None
    faster_than: tuple[tuple[str, float], ...] = ()
    """Names of others on the same problem, and how many times as fast as they it is to be."""
    over: tuple[tuple[str, ...], float] | None = None
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
    """Why it was not run."""


@dataclass
class Result:
    """One problem: its floor, and everybody's times, ours first."""

    problem: Any
    floor_us: float
    timings: list[Timing] = field(default_factory=list)

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
            yield f"{name}: nothing ran"
            continue
        mine, said = best.device_us, f"{name} ({best.name})"
        if goals.fraction is not None:
            share = result.floor_us / max(mine - goals.spared_us, 1e-9)
            spared = f" and {goals.spared_us:.0f} us" if goals.spared_us else ""
            stretch = f", stretch {goals.stretch:.2f}" if goals.stretch else ""
            verdict = "stretch met" if goals.stretch and share >= goals.stretch else _met(share >= goals.fraction)
            yield f"{said}: {share:.2f} of the floor{spared}, goal {goals.fraction:.2f}{stretch}: {verdict}"
        if goals.most_us is not None:
            yield f"{said}: {mine:.1f} us, goal {goals.most_us:.0f} us: {_met(mine <= goals.most_us)}"
        for peer, factor in goals.faster_than:
            other = next((one for one in result.timings if one.name == peer), None)
            goal = f"goal {factor:.2f}x"
            if other is None or other.device_us is None:
                why = other.absent if other else "not asked"
                yield f"{said}: beside {peer}, {goal}: not compared, {why}"
            else:
                ratio = other.device_us / mine
                yield f"{said}: {ratio:.2f}x {peer}, {goal}: {_met(ratio >= factor)}"
        if goals.over is not None:
            names, factor = goals.over
            parts = [times.get(one) for one in names]
            known = [one for one in parts if one is not None]
            if len(known) == len(parts):
                ratio = sum(known) / mine
                yield f"{said}: {ratio:.2f}x {' + '.join(names)}, goal {factor:.2f}x: {_met(ratio >= factor)}"


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"
