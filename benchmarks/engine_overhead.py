"""What a step of the engine costs on the host, beside the device's work."""

import gc
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from kvlab.host import keep_freed_memory

keep_freed_memory()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from benchmarks.engine_setup import BATCH, Peer, engine_of, prefill, prompts, row  # noqa: E402
from kvlab.engine.config import EngineConfig  # noqa: E402
from kvlab.engine.engine import Engine  # noqa: E402
from kvlab.engine.sampling import Choices, Mode, Sampling, draw_tokens  # noqa: E402
from kvlab.ledger.plan import Plan  # noqa: E402
from kvlab.memory.layout import MemoryConfig  # noqa: E402
from kvlab.mixers.attention import AttentionConfig  # noqa: E402
from kvlab.models.model import Model  # noqa: E402
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer  # noqa: E402
from kvlab.weights import Pretrained  # noqa: E402


def overhead(model: Pretrained, peer: Peer, count: int, bandwidth: float) -> list[dict[str, Any]]:
    """What a step costs beside the device's work.

    At B8 of the real model, on all cores: a whole step less the same programs run back to back. For 256 sequences of a
    tiny model, whose pages of 16 tokens run out 16 times a step: what the engine does while the device has nothing to
    do, by its own count. There a core is the host's and the others run the programs, as beside an accelerator. The JSON
    has both for each, and what is hidden behind the device's work."""
    del peer, bandwidth
    engine = engine_of(model, max_len=512)
    for ids in prompts([128] * BATCH):
        engine.submit(ids, Sampling(max_tokens=300))
    step = beside_device(engine, 40 * max(1, count // 3))
    part = 100 * step.more / step.whole
    rows = [
        row(
            "host work of a step at B8, percent of the step",
            "< 10",
            part,
            step.more,
            step.whole,
            "ms",
            step.alone,
            **step.counted(),
        )
    ]
    for cache, page_size in ((True, 16), (False, 16), (True, 64), (False, 64)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=part_cores) as apart:
            step = apart.submit(of_256_sequences, page_size, cache).result()
        name = f"host, 256 sequences, pages of {page_size}, {'with' if cache else 'without'} the index"
        waits = step.host - step.hidden
        rows.append(row(name, "< 1 ms", waits, waits, step.whole, "ms", step.alone, **step.counted()))
    return rows


class StepTimes(NamedTuple):
    """Medians of a decode step, in ms: the whole of it, its programs alone, the difference, and the host's work by the
    engine's own count, of which `hidden` while the device worked."""

    whole: float
    alone: float
    more: float
    host: float
    hidden: float

    def counted(self) -> dict[str, float]:
        """What the JSON has beside the row."""
        return {"difference_ms": self.more, "host_ms": self.host, "hidden_ms": self.hidden}


def part_cores() -> None:
    """The threads that run programs on all cores but the first, this one on the first."""
    first, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, others or [first])
    jax.block_until_ready(jax.jit(jnp.sin)(jnp.ones(8)))  # makes the threads, which stay where they are
    os.sched_setaffinity(0, [first])


def of_256_sequences(page_size: int, cache: bool) -> StepTimes:
    """Decoding 256 sequences at once."""
    tiny = [LayerConfig("attention", AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=4))]
    small = Model.of(Transformer(tiny, ModelConfig(model_dim=8), 64, rngs=nnx.Rngs(0)))
    config = EngineConfig(max_batch=256, max_len=512, prefix_cache=cache, token_budget=4096)
    many = Engine(small, memory=MemoryConfig("paged", page_size, 128), config=config)
    rng = np.random.default_rng(0)
    for n in rng.integers(100, 140, 256):
        many.submit(rng.integers(0, 64, n).tolist(), Sampling(max_tokens=200))
    return beside_device(many, 160)


def beside_device(engine: Engine, num_steps: int) -> StepTimes:
    """Decode steps, each followed by its programs once more."""
    prefill(engine)
    plans, make_plan = [], engine.ledger.plan

    def kept_plan(*asked: Any) -> Plan:
        plans.append(make_plan(*asked))
        return plans[-1]

    engine.ledger.plan = kept_plan  # type: ignore[method-assign]
    for _ in range(8):
        engine.step()
    device_seconds(engine, plans[-1])
    gc.collect()
    gc.freeze()  # what benchmarks before this one left is not this step's work
    steps = []
    for _ in range(num_steps):
        stats = engine.stats
        host, hidden = stats.host_s, stats.hidden_s
        began = time.perf_counter()
        engine.step()
        whole = time.perf_counter() - began
        alone = device_seconds(engine, plans.pop())
        steps.append(StepTimes(whole, alone, whole - alone, stats.host_s - host, stats.hidden_s - hidden))
    return StepTimes(*(1e3 * statistics.median(values) for values in zip(*steps, strict=True)))


def device_seconds(engine: Engine, plan: Plan) -> float:
    """The programs of a decode step that just ran or comes next. They write the same keys and values to the same
    places."""
    samples: list[Any] = list(engine.scheduler.running)
    tokens = np.array([[sample.ids[start]] for sample, start in zip(samples, plan.starts, strict=True)], np.int32)
    positions = (plan.starts + plan.counts)[:, None]
    choices = Choices(*(jnp.asarray(column) for column in Choices.of([], len(plan.starts))))
    runner = engine.runner
    jax.block_until_ready(runner.pools)
    began = time.perf_counter()
    logits, finite, runner.pools = runner.step_fn.next_logits(runner.params, runner.pools, plan, tokens)
    jax.device_get((draw_tokens(logits, positions, choices, None, mode=Mode()), finite))
    return time.perf_counter() - began
