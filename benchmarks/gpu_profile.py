"""Where a decode step of the engine goes on a device: kernels, launches, and the time between them."""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks.answers import about, say
from benchmarks.engine_setup import prefill, prompts
from kvlab.engine import runner as running
from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.engine.step import MemoryStep

STEPS = 12
"""Most steps of a profile; half as many go before."""
KEPT = 24
"""Kernels that are named, those that took longest first."""
GAP_US = 2.0
"""Between two kernels: what is longer is a wait."""

type Events = list[tuple[float, float, str]]
"""Begin and duration in microseconds, and the name, in their order; none where there is no GPU."""


def device_events(folder: Path) -> Events:
    """What the streams of all GPUs did in a profile; none on a CPU."""
    (path,) = folder.rglob("*.xplane.pb")
    return sorted(
        (event.start_ns / 1e3, event.duration_ns / 1e3, event.name)
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        if "GPU" in plane.name.upper()
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )


def told(events: Events, steps: int) -> dict[str, Any]:
    """Of a step: how long the device was busy, how many launches and waits it had, and what took longest."""
    if not events:
        return {"missing": "no GPU: nothing was recorded"}
    by_name, gaps, busy, end = defaultdict[str, list[float]](list), list[float](), 0.0, events[0][0]
    for begin, duration, name in events:
        by_name[name].append(duration)
        gaps.append(begin - end)
        busy += max(0.0, begin + duration - max(begin, end))  # streams may run side by side
        end = max(end, begin + duration)
    waits = [gap for gap in gaps if gap > GAP_US]
    longest = sorted(by_name.items(), key=lambda pair: -sum(pair[1]))[:KEPT]
    return {
        "busy_us": busy / steps,
        "launches": len(events) / steps,
        "waits": len(waits) / steps,
        "waited_us": sum(waits) / steps,
        "kernels": [
            {"name": name[:60], "launches": len(times) / steps, "us": sum(times) / steps} for name, times in longest
        ],
    }


def profile_decoding(
    engine: Engine, name: str, *, batches: tuple[int, ...], prompt_len: int, num_new: int, vocab_size: int
) -> None:
    """A profile of decode steps for each batch, after some that are not looked at; beside it the time of steps that no
    profiler slowed. In all at most `num_new` steps."""
    found, steps = dict[str, Any](), min(STEPS, num_new // 3)
    for batch in batches:
        for ids in prompts([prompt_len] * batch, vocab_size=vocab_size):
            engine.submit(ids, Sampling(max_tokens=num_new + 1))
        prefill(engine)
        _timed(engine, steps // 2)
        before = _spent(engine)
        with _calls_timed(engine.runner.step_fn) as calls:
            quiet = _timed(engine, steps)
        spent = {name: (_spent(engine)[name] - seconds) / steps * 1e3 for name, seconds in before.items()}
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                slowed = _timed(engine, steps)
            events = device_events(Path(folder))
        in_a_row = _in_a_row(engine)
        while engine.requests:
            engine.step()
        found[str(batch)] = {
            "step_ms": statistics.median(quiet) * 1e3,
            **spent,
            "calls_ms": {name: seconds / steps * 1e3 for name, seconds in calls.items()},
            "model_in_a_row_ms": in_a_row * 1e3,
            "profiled_step_ms": statistics.median(slowed) * 1e3,
            **told(events, steps),
        }
        say(**about(model=name, what=f"a decode step after a prompt of {prompt_len} tokens"), batches=found)


def _in_a_row(engine: Engine, calls: int = 8) -> float:
    """Seconds of a call of the model's program alone: several in a row, that nobody waits for, on one plan. They write
    the same keys and values to the same places."""
    samples: list[Any] = list(engine.scheduler.running)
    plan = engine.ledger.plan([sample.name for sample in samples], len(samples), 1)
    tokens = np.array([[sample.ids[start]] for sample, start in zip(samples, plan.starts, strict=True)], np.int32)
    plan, tokens = jax.device_put((plan, tokens))
    runner, spent = engine.runner, 0.0
    for _ in range(2):  # the first compiles, if the batch had another size
        jax.block_until_ready(runner.pools)
        began = time.perf_counter()
        for _ in range(calls):
            _, _, runner.pools = runner.step_fn.next_logits(runner.params, runner.pools, plan, tokens)
        jax.block_until_ready(runner.pools)
        spent = time.perf_counter() - began
    return spent / calls


def _spent(engine: Engine) -> dict[str, float]:
    """Seconds of the host until now: its own work, handing programs over, and waiting for what they draw."""
    stats = engine.stats
    return {"host_ms": stats.host_s, "handed_over_ms": stats.dispatch_s, "waited_ms": stats.wait_s}


@contextmanager
def _calls_timed(step: MemoryStep) -> Iterator[dict[str, float]]:
    """Seconds in which each program was handed over: the model's, and that which draws."""
    spent = {"model": 0.0, "drawing": 0.0}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            answer = call(*given, **named)
            spent[name] += time.perf_counter() - began
            return answer

        return wrapped

    model, drawing = timed("model", step.next_logits), timed("drawing", running.draw_tokens)
    # A step's programs are its own.
    with mock.patch.dict(vars(step), next_logits=model), mock.patch.object(running, "draw_tokens", drawing):
        yield spent


def _timed(engine: Engine, steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds
