"""How long everybody takes, on one problem after the other."""

import statistics
from typing import Any

import jax
import numpy as np

from pallas_kernels.bench.clock import Clock
from pallas_kernels.bench.goals import Result, Timing
from pallas_kernels.bench.paged import Problem
from pallas_kernels.bench.problems import MOST_BYTES, SWEEPS, TINY

MOST_ERROR = 0.02
"""Relative difference from the reference beyond which an answer is wrong: both round to 16 bits."""


def measure(problem: Any, limits: dict[str, float], rounds: int, *, alone: bool = False) -> Result:
    """Everybody on one problem, in turns, compared with the reference's answer; or `alone` what `None` chooses, not compared. Whatever
    fails is a line that says why."""
    result = Result(problem, problem.floor_us(limits))
    wanted = None
    try:
        works = problem.works(alone=True) if alone else problem.works()  # alone: a sweep's, of attention over pages
        wanted = None if alone else _numbers(problem.wanted())
    except Exception as error:
        result.failed = _said(error)
        return result
    clocks: dict[str, Clock] = {}
    for name, make in works.items():
        timing = Timing(name)
        result.timings.append(timing)
        try:
            work = make()
            if wanted is not None:
                answer = work.answer(work.arrays) if work.wait else jax.jit(work.answer)(work.arrays)
                timing.error = float(np.linalg.norm(_numbers(answer) - wanted) / np.linalg.norm(wanted))
                if not timing.error <= MOST_ERROR:  # NaN is wrong
                    timing.is_wrong, timing.absent = True, f"WRONG: differs by {timing.error:.1e}"
                    continue
            clocks[name] = Clock(work)
        except Exception as error:  # a peer that is missing or refuses
            timing.absent = _said(error)
    for _ in range(rounds):
        for name, clock in list(clocks.items()):
            try:
                clock.sample()
            except Exception as error:
                next(one for one in result.timings if one.name == name).absent = _said(error)
                del clocks[name]
    for timing in result.timings:
        if timing.name in clocks:
            clock = clocks[timing.name]
            timing.device_us = clock.median_us
            timing.wall_us = statistics.median(clock.wall_us)
            timing.fraction = result.floor_us / timing.device_us
    return result


def _said(error: Exception) -> str:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {said[0]}"[:120]


def _numbers(answer: Any) -> np.ndarray:
    """An answer of jax's or PyTorch's."""
    return np.asarray(answer.float().cpu() if hasattr(answer, "cpu") else answer, np.float32)


def sweep(size: str, limits: dict[str, float], rounds: int) -> list[dict[str, Any]]:
    """Achieved bandwidth of what `None` chooses, over batch and context."""
    batches, contexts = SWEEPS[size]
    found = []
    for batch in batches:
        for context in contexts:
            problem = Problem(f"B{batch} S{context}", (context,) * batch, **(TINY if size == "tiny" else {}))
            if problem.live_bytes > MOST_BYTES:
                continue
            best = measure(problem, limits, rounds, alone=True).best
            if best is None or best.device_us is None:
                continue
            rate = problem.live_bytes / best.device_us * 1e6
            found.append({"batch": batch, "context": context, "bytes_per_s": rate, "device_us": best.device_us})
    return found
