"""What the engine's benchmarks share: the model, transformers in a process of its own, rounds in turns, rows."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvlab.host import keep_freed_memory

keep_freed_memory()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from kvlab.engine.config import EngineConfig  # noqa: E402
from kvlab.engine.engine import Engine  # noqa: E402
from kvlab.engine.sampling import Sampling  # noqa: E402
from kvlab.memory.layout import MemoryConfig  # noqa: E402
from kvlab.mixers.attention import AttentionConfig  # noqa: E402
from kvlab.models.model import Model  # noqa: E402
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer  # noqa: E402
from kvlab.weights import Pretrained  # noqa: E402
from kvlab.weights.families import Architecture  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
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
