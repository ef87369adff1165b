"""The engine beside transformers on the same weights, prompts and threads: one table, JSON.

    make peers && .venv/bin/python benchmarks/engine.py [--rounds 5] [--only decode]

The model is a Llama of 31 M parameters (8 layers, 512 wide, 8 query and 2 KV heads, vocabulary 8192) in float32. Its
weights are drawn once, and both sides read them from one safetensors folder. The peer runs in its own process and
environment (.peers); both take turns, a round each. Floors are weights and live KV bytes over this machine's measured
read bandwidth.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from kvlab.host import keep_freed_memory

keep_freed_memory()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.engine_overhead import overhead  # noqa: E402
from benchmarks.engine_setup import (  # noqa: E402
    BATCH,
    KV_BYTES,
    NEW,
    ROOT,
    VOCAB,
    Peer,
    decode_round,
    engine_of,
    make_model,
    parrot,
    prefill,
    prompts,
    ratio,
    read_bandwidth,
    rounds_of,
    row,
    run_all,
)
from kvlab.engine.engine import Engine  # noqa: E402
from kvlab.engine.sampling import Sampling  # noqa: E402
from kvlab.weights import Pretrained, save_checkpoint  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "engine.json"


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
