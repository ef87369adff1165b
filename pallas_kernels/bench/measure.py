"""Whether it is right here, and how long everybody takes."""

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from pallas_kernels.bench.clock import Clock
from pallas_kernels.bench.goals import Result, Timing
from pallas_kernels.bench.paged import Problem
from pallas_kernels.bench.problems import MOST_BYTES, SWEEPS, TINY
from pallas_kernels.kv_write import kv_write
from pallas_kernels.kv_write import proof as write_proof
from pallas_kernels.paged_attention import paged_attention, proof
from pallas_kernels.paged_prefill import paged_prefill

SPACE: dict[str, Any] = {"dtypes": ("bfloat16", "float16"), "page_sizes": (16, 64), "dims": (64, 128)}


def verify(num_generated: int) -> Iterator[str]:
    """Runs the cases of every op's contract on this device with what `None` chooses; yields what went wrong."""
    cases = proof.CASES | {f"generated {n}": proof.generated(n, **SPACE) for n in range(num_generated)}
    attend, write = partial(proof.check, paged_attention), partial(write_proof.check, kv_write)
    prefill = partial(proof.check, paged_prefill, prefill=True)
    checks = [(name, partial(attend, **{"page_size": 16, **case})) for name, case in cases.items()]
    chunks = [(name, case) for name, case in cases.items() if case["num_queries"] > 1]
    checks += [(f"chunk, {name}", partial(prefill, **{"page_size": 16, **case})) for name, case in chunks]
    checks += [(f"write, {name}", partial(write, **case)) for name, case in write_proof.CASES.items()]
    for name, check in checks:
        try:
            check(**({} if "dtype" in check.keywords else {"dtype": "bfloat16"}))
        except Exception as error:  # wrong, or not to be run: both are failures
            yield f"{name}: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"


def measure(problem: Any, limits: dict[str, float], rounds: int, *, alone: bool = False) -> Result:
    """Everybody on one problem, in turns, compared with the oracle's answer; or `alone` what `None` chooses, not compared."""
    result, works = Result(problem, problem.floor_us(limits)), problem.works(alone=alone)
    wanted = None if alone else _numbers(works[problem.oracle]().answer())
    clocks: dict[str, Clock] = {}
    for name, make in works.items():
        timing = Timing(name)
        result.timings.append(timing)
        try:
            work = make()
            if wanted is not None:
                timing.error = float(np.linalg.norm(_numbers(work.answer()) - wanted) / np.linalg.norm(wanted))
            clocks[name] = Clock(work)
        except Exception as error:  # a peer that is missing or refuses is a line of the table
            said = str(error).strip().splitlines() or [type(error).__name__]
            timing.absent = f"{type(error).__name__}: {said[0]}"[:120]
    for _ in range(rounds):
        for clock in clocks.values():
            clock.sample()
    for timing in result.timings:
        if timing.name in clocks:
            clock = clocks[timing.name]
            timing.device_us = clock.median_us
            timing.wall_us = statistics.median(clock.wall_us)
            timing.fraction = result.floor_us / timing.device_us
    return result


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
