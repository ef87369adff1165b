"""How long everybody takes, on one problem after the other."""

import statistics
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from pallas_kernels.bench.clock import Clock, Work
from pallas_kernels.bench.goals import Result, Timing
from pallas_kernels.bench.paged import Problem
from pallas_kernels.bench.problems import MOST_BYTES, SWEEPS, TINY
from pallas_kernels.bench.verify import said

MOST_ERROR = 0.02
"""Relative difference from the reference beyond which an answer is wrong: both round to 16 bits."""


def measure(
    problem: Any,
    rounds: int,
    *,
    chosen: Callable[[list[str]], Collection[str]] = lambda names: names,
    without: Mapping[str, str] = MappingProxyType({}),
    tell: Callable[[Result], None] = lambda result: None,
    alone: bool = False,
) -> Result:
    """Those who are `chosen` by name on one problem, in turns, compared with the reference's answer; or `alone` what
    `None` chooses, not compared.

    Those of `without` are not run, with the reason given. Whatever fails is a line that says why. `tell` gets what is
    known before every step: should the next one end the process, that is not lost."""
    result = Result(problem)
    wanted, clocks = None, dict[str, Clock]()
    tell(result)
    try:
        works = problem.works(alone=True) if alone else problem.works()  # alone: a sweep's, of attention over pages
        wanted = None if alone else _numbers(problem.wanted())
    except Exception as error:
        result.failed = said(error)
        return result
    taking_part = chosen(list(works))
    result.timings = [Timing(name, absent=without.get(name, "")) for name in works if name in taking_part]
    for timing in result.timings:
        if timing.name in without:
            timing.has_failed = True
            continue
        result.doing = timing.name
        tell(result)
        clock = _made(works[timing.name], wanted, timing)
        if clock is not None:
            clocks[timing.name] = clock
    for _ in range(rounds):
        for timing in result.timings:
            if timing.name not in clocks:
                continue
            result.doing, clock = timing.name, clocks[timing.name]
            tell(result)
            try:
                clock.sample()
            except Exception as error:
                timing.device_us, timing.wall_us, timing.absent, timing.has_failed = None, None, said(error), True
                del clocks[timing.name]
                continue
            timing.device_us, timing.wall_us = clock.median_us, statistics.median(clock.wall_us)
    result.doing = ""
    return result


def _made(make: Callable[[], Work], wanted: np.ndarray | None, timing: Timing) -> Clock | None:
    """A clock of one of them, compiled and compared; None where it cannot run or is wrong, as its timing then says."""
    try:
        work = make()
        if wanted is not None:
            answer = work.answer(work.arrays) if work.wait else jax.jit(work.answer)(work.arrays)
            timing.error = float(np.linalg.norm(_numbers(answer) - wanted) / np.linalg.norm(wanted))
            if not timing.error <= MOST_ERROR:  # NaN is wrong
                timing.is_wrong, timing.absent = True, f"WRONG: differs by {timing.error:.1e}"
                return None
        return Clock(work)
    except Exception as error:  # a peer that is missing, or what refuses
        timing.absent, timing.has_failed = said(error), not isinstance(error, NotImplementedError)
        return None


def _numbers(answer: Any) -> np.ndarray:
    """An answer of jax's or PyTorch's."""
    return np.asarray(answer.float().cpu() if hasattr(answer, "cpu") else answer, np.float32)


def sweep(size: str) -> list[Problem]:
    """Decoding over batch and context, whose achieved bandwidth is drawn."""
    batches, contexts = SWEEPS[size]
    more = TINY if size == "tiny" else {}
    every = [Problem(f"B{batch} S{context}", (context,) * batch, **more) for batch in batches for context in contexts]
    return [problem for problem in every if problem.live_bytes <= MOST_BYTES]
