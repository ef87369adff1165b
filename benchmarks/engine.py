"""The engine beside transformers on the same weights, prompts and threads: one table, JSON.

    make peers && .venv/bin/python benchmarks/engine.py [--rounds 5] [--only decode]

The model is a Llama of 31 M parameters (8 layers, 512 wide, 8 query and 2 KV heads, vocabulary 8192) in float32. Its
weights are drawn once, and both sides read them from one safetensors folder. The peer runs in its own process and
environment (.peers); both take turns, a round each. Floors are weights and live KV bytes over this machine's measured
read bandwidth.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kvlab.host import keep_freed_memory

keep_freed_memory()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from kvlab.engine.config import EngineConfig  # noqa: E402
from kvlab.engine.engine import Engine  # noqa: E402
from kvlab.engine.sampling import Choices, Mode, Sampling, draw_tokens  # noqa: E402
from kvlab.ledger.plan import Plan  # noqa: E402
from kvlab.memory.layout import MemoryConfig  # noqa: E402
from kvlab.mixers.attention import AttentionConfig  # noqa: E402
from kvlab.models.model import Model  # noqa: E402
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer  # noqa: E402
from kvlab.weights import Pretrained, save_checkpoint  # noqa: E402
from kvlab.weights.architectures import Architecture  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "engine.json"
PEER_PYTHON = ROOT / ".peers" / "bin" / "python"
VOCAB, BATCH, NEW = 8192, 8, 32
KV_BYTES = 8 * 2 * 2 * 64 * 4
"""Of one token: layers, keys and values, KV heads, head dim, float32."""


def make_model() -> Pretrained:
    """The model, wide enough in its weights that greedy answers do not repeat."""
    layers = (LayerConfig("attention", AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=64)),) * 8
    config = ModelConfig(model_dim=512, mlp_dim=1408, tie_embeddings=False)
    model = Model.of(Transformer(layers, config, VOCAB, rngs=nnx.Rngs(0)))
    return Pretrained(Architecture("llama", layers, config, VOCAB), model)


def parrot(pretrained: Pretrained) -> Pretrained:
    """The same shapes with blocks that add nothing: the next token follows from the last alone, so that answers soon go
    round in a circle. What repetitive text is for prompt lookup, at the cost of the real model."""
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf * 0 if jax.tree_util.keystr(path).endswith(("['out']['kernel']", "['down']['kernel']")) else leaf
        ),
        pretrained.model.params,
    )
    return Pretrained(pretrained.architecture, Model(pretrained.model.structure, params))


def prompts(lengths: list[int], seed: int = 7, vocab_size: int = VOCAB) -> list[list[int]]:
    """As `engine_peer.prompts`."""
    return [np.random.default_rng([seed, i, n]).integers(0, vocab_size, n).tolist() for i, n in enumerate(lengths)]


def read_bandwidth() -> float:
    """Bytes a second of summing an array far larger than the caches, with all threads."""
    big = jnp.ones(1 << 25)
    total = jax.jit(lambda x: x.sum())
    times = []
    for _ in range(12):
        began = time.perf_counter()
        total(big).block_until_ready()
        times.append(time.perf_counter() - began)
    return big.nbytes / statistics.median(times[2:])


class Peer:
    """transformers, one command at a time, on a device of torch's."""

    def __init__(
        self,
        folder: str,
        threads: int,
        device: str = "cpu",
        dtype: str = "float32",
        python: Path = PEER_PYTHON,
        errors: int | None = subprocess.DEVNULL,
    ):
        if not python.exists():
            sys.exit("benchmarks/engine.py: transformers' environment is missing; run `make peers` first")
        command = [str(python), str(ROOT / "benchmarks" / "engine_peer.py"), folder, str(threads), device, dtype]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        )
        self.versions = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the peer died; run benchmarks/engine_peer.py by hand")
        return json.loads(line)

    def __call__(self, run: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"run": run, **arguments}) + "\n")
        return self._read()


def engine_of(model: Pretrained, *, memory: str = "paged", chunk_len: int = 128, **fields: Any) -> Engine:
    config = EngineConfig(**{"max_batch": BATCH, "prefix_cache": False, "token_budget": 1024, **fields})
    return Engine(model.model, memory=MemoryConfig(memory, 16, chunk_len), config=config)


def prefill(engine: Engine) -> None:
    """Steps until every prompt is computed."""
    while any(
        sample.num_computed < len(sample.request.prompt) for r in engine.requests.values() for sample in r.samples
    ):
        engine.step()


def run_all(engine: Engine) -> float:
    """Seconds until every request has its answer."""
    began = time.perf_counter()
    while engine.requests:
        engine.step()
    engine.answers.clear()
    return time.perf_counter() - began


def decode_round(engine: Engine, prompt_len: int) -> tuple[float, list[int]]:
    """Seconds of one decode step of a full batch, and the first row's tokens."""
    names = [engine.submit(ids, Sampling(max_tokens=NEW + 1)) for ids in prompts([prompt_len] * BATCH)]
    prefill(engine)
    began = time.perf_counter()
    steps = engine.stats.steps
    while engine.requests:
        engine.step()
    seconds = (time.perf_counter() - began) / (engine.stats.steps - steps)
    answer = engine.answers[names[0]]
    engine.answers.clear()
    return seconds, answer.tokens


def rounds_of(count: int, *runs: Callable[[], float]) -> list[list[float]]:
    """Each run in turn, `count` rounds after one that is thrown away; one list of seconds a run."""
    found = [[run() for run in runs] for _ in range(count + 1)][1:]
    return [list(column) for column in zip(*found, strict=True)]


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median over rounds of how many times faster the second is."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def row(
    name: str, goal: str, value: float, ours: float, other: float, unit: str, floor: float | None, **more: Any
) -> dict[str, Any]:
    """One line of the table, printed at once."""
    said = f"{name:<58} {value:6.2f}x  (goal {goal:>8})  ours {ours:9.2f}  other {other:9.2f} {unit}"
    print(said + (f"  floor {floor:7.2f}" if floor is not None else ""), flush=True)
    return {
        "name": name,
        "goal": goal,
        "ratio": value,
        "ours": ours,
        "other": other,
        "unit": unit,
        "floor": floor,
        **more,
    }


def decode(model: Pretrained, peer: Peer, count: int, bandwidth: float) -> list[dict[str, Any]]:
    """Decoding a full batch: paged, dense, transformers' generate."""
    rows = []
    weights = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(model.model.params)) - VOCAB * 512 * 4
    )  # the embedding is looked up
    for prompt_len, goals in ((128, (">= 1.1", "<= 1.15")), (1024, (">= 1.0", "<= 1.4"))):
        engines = [engine_of(model, memory=memory, max_len=prompt_len + NEW + 1) for memory in ("paged", "dense")]
        answers: dict[str, list[int]] = {}

        def ours(index: int, engines: list[Engine] = engines, n: int = prompt_len, answers: dict = answers) -> float:
            seconds, answers[str(index)] = decode_round(engines[index], n)
            return seconds

        def theirs(n: int = prompt_len, answers: dict = answers) -> float:
            said = peer("decode", lengths=[n] * BATCH, num_new=NEW)
            answers["peer"] = said["tokens"][0]
            return said["step_s"]

        paged, dense, reference = rounds_of(count, lambda: ours(0), lambda: ours(1), theirs)
        floor = (weights + BATCH * (prompt_len + NEW / 2) * KV_BYTES) / bandwidth * 1e3
        p, d, t = (statistics.median(seconds) * 1e3 for seconds in (paged, dense, reference))
        same = answers["0"] == answers["1"] == answers["peer"]
        more = {"same_tokens": same, "tokens_per_s": BATCH / p * 1e3, "peer_tokens_per_s": BATCH / t * 1e3}
        rows.append(
            row(
                f"decode B8 prompt {prompt_len}, over generate",
                goals[0],
                ratio(reference, paged),
                p,
                t,
                "ms",
                floor,
                **more,
            )
        )
        cost = 1 / ratio(dense, paged)
        rows.append(row(f"decode B8 prompt {prompt_len}, paged of our own dense", goals[1], cost, p, d, "ms", floor))
        print(f"  same tokens: {same}", flush=True)
    return rows


def batching(model: Pretrained, peer: Peer, count: int, bandwidth: float) -> list[dict[str, Any]]:
    """64 requests, all there from the beginning. Prompts are log-uniform in 16 to 256 tokens, answers of 32 to 256:
    twice as much to write as to read, as in conversations (ShareGPT's means: 161 in, 338 out). The peer does it in
    three ways, see `engine_peer.batch`; tokens count as far as they were asked for."""
    rng = np.random.default_rng(3)
    lengths = np.exp(rng.uniform(np.log(16), np.log(256), 64)).astype(int).tolist()
    new = rng.choice([32, 64, 128, 256], 64).tolist()
    engine = engine_of(model, max_batch=64, max_len=512)

    def ours() -> float:
        for ids, most in zip(prompts(lengths), new, strict=True):
            engine.submit(ids, Sampling(max_tokens=most))
        return run_all(engine)

    def theirs(way: str) -> float:
        return peer("batch", lengths=lengths, num_new=new, max_batch_tokens=1024, way=way)["seconds"]

    ways = {
        "whole": ("64 ragged requests, over one call of generate_batch", ">= 4"),
        "grouped": ("the same, over a call for every length of answer", "-"),
        "manager": ("the same, over its manager with each request's own bound", "-"),
    }
    mine, *others = rounds_of(max(2, count // 2), ours, *(partial(theirs, way) for way in ways))
    total = sum(new)
    rows = []
    for (name, goal), seconds in zip(ways.values(), others, strict=True):
        ours_rate, their_rate = (total / statistics.median(runs) for runs in (mine, seconds))
        rows.append(row(name, goal, ratio(seconds, mine), ours_rate, their_rate, "tok/s", None))
    return rows


def latency(model: Pretrained, peer: Peer, count: int, bandwidth: float) -> list[dict[str, Any]]:
    """Six sequences decode; a prompt of 1,024 tokens arrives. With prompts first, nobody decodes until it is
    computed."""
    del peer, bandwidth

    def run(mixed: bool, budget: int) -> tuple[float, float]:
        """Seconds to the newcomer's first token, and the longest gap between two tokens of the others meanwhile."""
        engine = engines[mixed, budget]
        for ids in prompts([64] * 6):
            engine.submit(ids, Sampling(max_tokens=400))
        prefill(engine)
        for _ in range(3):
            engine.step()
        late = engine.submit(prompts([1024], seed=8)[0], Sampling(max_tokens=2))
        began = last = time.perf_counter()
        longest = 0.0
        while True:
            events = engine.step()
            now = time.perf_counter()
            if any(event.name != late for event in events):
                longest, last = max(longest, now - last), now
            if any(event.name == late for event in events):
                break
        for name in list(engine.requests):
            engine.cancel(name)
        engine.answers.clear()
        return now - began, max(longest, now - last)

    cases = {"prompts first": (False, 2048), "chunked, budget 128": (True, 128)}
    engines = {
        case: engine_of(
            model, max_len=1152, mixed=case[0], token_budget=case[1], chunk_len=1024 if not case[0] else 128
        )
        for case in cases.values()
    }
    found = {name: [run(*case) for _ in range(count + 1)][1:] for name, case in cases.items()}
    medians = {
        name: [statistics.median(times) * 1e3 for times in zip(*pairs, strict=True)] for name, pairs in found.items()
    }
    (first_whole, gap_whole), (first_chunked, gap_chunked) = medians.values()
    return [
        row(
            "longest stall of decoding while a 1K prompt arrives",
            "-",
            gap_whole / gap_chunked,
            gap_chunked,
            gap_whole,
            "ms",
            None,
        ),
        row(
            "its time to first token, whole prompt over chunked",
            "-",
            first_whole / first_chunked,
            first_chunked,
            first_whole,
            "ms",
            None,
        ),
    ]


def reuse(model: Pretrained, peer: Peer, count: int, bandwidth: float) -> list[dict[str, Any]]:
    """Eight requests share a prompt of 1,024 tokens and differ in the last 16; two requests answer 8 tokens each."""
    del peer, bandwidth
    shared = prompts([1024], seed=9)[0]
    engines = [engine_of(model, max_len=1152, prefix_cache=cache) for cache in (True, False)]
    seeds = iter(range(10_000))

    def run(engine: Engine) -> float:
        for ids in prompts([16] * BATCH, seed=100 + next(seeds)):
            engine.submit(shared + ids, Sampling(max_tokens=8))
        return run_all(engine)

    cached, plain = rounds_of(max(3, count // 2), lambda: run(engines[0]), lambda: run(engines[1]))
    fast, slow = (statistics.median(seconds) * 1e3 for seconds in (cached, plain))
    return [
        row(
            "8 requests behind a shared 1K prompt, with and without reuse",
            ">= 3",
            ratio(plain, cached),
            fast,
            slow,
            "ms",
            None,
        )
    ]


def speculation(model: Pretrained, peer: Peer, count: int, bandwidth: float) -> list[dict[str, Any]]:
    """Prompt lookup where text repeats itself: a prompt and answers that go round in a circle."""
    del peer, bandwidth
    rows, circling = [], parrot(model)
    for batch in (1, BATCH):
        engines = [
            engine_of(circling, max_len=512, max_batch=batch, speculation=kind, num_drafts=7)
            for kind in ("ngram", "none")
        ]

        def run(engine: Engine, batch: int = batch) -> float:
            for ids in prompts([32] * batch):
                engine.submit(ids, Sampling(max_tokens=400))
            prefill(engine)
            return run_all(engine)

        fast, plain = rounds_of(max(2, count // 2), lambda: run(engines[0]), lambda: run(engines[1]))  # noqa: B023
        drafted, alone = (batch * 400 / statistics.median(seconds) for seconds in (fast, plain))
        accepted = engines[0].stats.acceptance_rate
        more = {"acceptance_rate": accepted}
        rows.append(
            row(
                f"prompt lookup B{batch}, {accepted:.0%} of drafts accepted",
                ">= 1.5",
                ratio(plain, fast),
                drafted,
                alone,
                "tok/s",
                None,
                **more,
            )
        )
    return rows


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


PARTS = {
    "decode": decode,
    "batching": batching,
    "latency": latency,
    "reuse": reuse,
    "speculation": speculation,
    "overhead": overhead,
}


def main() -> None:
    """Prints the table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    model, bandwidth = make_model(), read_bandwidth()
    print(f"{bandwidth / 1e9:.1f} GB/s read by {threads} threads")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, folder)
        peer = Peer(folder, threads)
        for name, part in PARTS.items():
            if options.only in (None, name):
                rows += part(model, peer, options.rounds, bandwidth)
        peer.process.terminate()
    result = {
        "benchmark": "engine",
        "date": date.today().isoformat(),
        "machine": {"processor": platform.machine(), "threads": threads, "read_gb_per_s": bandwidth / 1e9},
        "versions": {"python": platform.python_version(), "jax": jax.__version__, **peer.versions},
        "rows": rows,
    }
    if options.only is None or options.output != RESULTS:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
