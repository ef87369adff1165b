"""What `on_gpu.py` runs, each in a process of its own. After every step it prints all that it knows, a line of JSON.

    python -m benchmarks.gpu_pieces KIND MODEL --size full --scratch FOLDER

`Size` says how much. The models' weights are drawn once and kept in the scratch folder, for transformers to read.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvlab.host import keep_freed_memory

keep_freed_memory()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jaxlib.version import __version__ as jaxlib_version  # noqa: E402

from benchmarks.answers import about, against_floor, kernels, say, spread  # noqa: E402
from benchmarks.engine_setup import prefill, prompts, run_all  # noqa: E402
from benchmarks.gpu_profile import profile_decoding  # noqa: E402
from benchmarks.gpu_training import train  # noqa: E402
from kvlab.engine.config import EngineConfig  # noqa: E402
from kvlab.engine.engine import Engine  # noqa: E402
from kvlab.engine.sampling import Sampling  # noqa: E402
from kvlab.engine.step import MemoryStep  # noqa: E402
from kvlab.evaluation.session import Session  # noqa: E402
from kvlab.memory.layout import MemoryConfig, MemoryLayout  # noqa: E402
from kvlab.mixers.attention import AttentionConfig  # noqa: E402
from kvlab.models.model import Model  # noqa: E402
from kvlab.models.transformer import LayerConfig, ModelConfig, merge, path_name  # noqa: E402
from kvlab.weights import Pretrained, load_checkpoint, save_checkpoint  # noqa: E402
from kvlab.weights.checkpoint import abstract_model  # noqa: E402
from kvlab.weights.families import Architecture  # noqa: E402
from pallas_kernels.bench.clock import ceilings  # noqa: E402
from pallas_kernels.selection import recording  # noqa: E402


@dataclass(frozen=True)
class Size:
    """How much is measured. Decoding: `batches` of prompts of `prompt_len` and `num_new` tokens more. Requests:
    `num_requests` with prompts log-uniform in `prompt_range`, and answers from `answers`."""

    batches: tuple[int, ...]
    prompt_len: int
    num_new: int
    num_requests: int
    prompt_range: tuple[int, int]
    answers: tuple[int, ...]
    rounds: int
    page_size: int
    chunk_len: int


SIZES = {
    "full": Size((32, 1, 64, 8), 1024, 64, 64, (64, 512), (32, 64, 128, 256), 3, 64, 256),
    "tiny": Size((2, 1), 24, 8, 4, (4, 16), (2, 4, 6), 2, 16, 16),
}
PROMPTS_AT_ONCE = 4
"""Of one chunk each: 1,024 tokens a step of size "full"."""


def llama(
    size: str, name: str, dtype: str, num_layers: int, model_dim: int, heads: tuple[int, int], mlp_dim: int, vocab: int
) -> Architecture:
    """A Llama with heads of 64 dims; of size "tiny" all but its dtype is small."""
    if size == "tiny":
        num_layers, model_dim, heads, mlp_dim, vocab = 2, 64, (4, 2), 96, 256
    attention = AttentionConfig(
        num_heads=heads[0], num_kv_heads=heads[1], head_dim=16 if size == "tiny" else 64, rope_base=500_000.0
    )
    model = ModelConfig(model_dim=model_dim, mlp_dim=mlp_dim, tie_embeddings=name == "1b", dtype=dtype)
    return Architecture("llama", (LayerConfig("attention", attention),) * num_layers, model, vocab)


def architecture_of(size: str, name: str) -> Architecture:
    """ "31m" is the model of `engine.py`, "31m-float32" is for checks, "1b" has the shape of Llama 3.2 1B (1.24 B
    parameters)."""
    if name == "1b":
        return llama(size, name, "bfloat16", 16, 2048, (32, 8), 8192, 128_256)
    return llama(size, name, "float32" if name.endswith("float32") else "bfloat16", 8, 512, (8, 2), 1408, 8192)


def model_of(size: str, name: str, scratch: Path) -> Pretrained:
    """Weights of unit gain: drawn on the device the first time, then read from the scratch folder."""
    folder = scratch / f"{size}-{name}"
    if (folder / "config.json").exists():
        return load_checkpoint(folder)
    architecture = architecture_of(size, name)
    shapes = abstract_model(architecture)
    leaves = jax.tree_util.tree_leaves_with_path(shapes.params)

    def draw(index: int, path: Any, leaf: Any) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        fan_in = leaf.shape[1] if path_name(path).endswith("embedding") else leaf.shape[0]
        return _normal(jax.random.key(index), leaf.shape, leaf.dtype, fan_in)

    drawn = [draw(index, *path_and_leaf) for index, path_and_leaf in enumerate(leaves)]
    params = jax.tree.unflatten(jax.tree.structure(shapes.params), drawn)
    made = Pretrained(architecture, Model(shapes.structure, params))
    save_checkpoint(made, folder)
    return made


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, fan_in: int) -> jax.Array:
    return jax.jit(_scaled_normal, static_argnums=(1, 2))(key, shape, jnp.dtype(dtype), jnp.float32(fan_in**-0.5))


def _scaled_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: jax.Array) -> jax.Array:
    return (jax.random.normal(key, shape) * scale).astype(dtype)


def engine_of(model: Pretrained, size: Size, **fields: Any) -> Engine:
    longest = max(size.prompt_len + size.num_new + 1, size.prompt_range[1] + max(size.answers))
    memory = MemoryConfig("paged", size.page_size, size.chunk_len)
    config = {"max_len": longest, "prefix_cache": False, "width_sizes": (size.chunk_len,), **fields}
    return Engine(model.model, memory=memory, config=EngineConfig(**config))


def probe(name: str, size: str, scratch: Path) -> None:
    """What everything is measured on."""
    del name, size, scratch
    versions = {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib_version}
    device = jax.devices()[0]
    say(device=device.device_kind, platform=device.platform, versions=versions)


def measure_ceilings(name: str, size: str, scratch: Path) -> None:
    """Copying, reading, a product: what floors are made of."""
    del name
    for found in ceilings(size):
        (scratch / "ceilings.json").write_text(json.dumps(found))
        say(**about(), **found)


def agree(name: str, size: str, scratch: Path) -> None:
    """Whether a model computes the same through its pages as without memory: the relative error of its logits against
    the float32 parallel form on this machine's processor. Beside it, that of the parallel form in the model's own type,
    over the same tokens."""
    model, chosen = model_of(size, name, scratch), SIZES[size]
    vocab, num_rows, width = model.architecture.vocab_size, 2, chosen.chunk_len
    num_tokens = 2 * width + 8
    tokens = np.array(prompts([num_tokens] * num_rows, vocab_size=vocab), np.int32)
    memory = MemoryConfig("paged", chosen.page_size, width)
    layout = MemoryLayout.of(model.model.states, memory, max_sequences=num_rows, max_len=num_tokens)
    session = Session(MemoryStep.of(model.model.structure, layout), model.model.params)
    parts = []
    with recording() as taken:
        for start in (0, width, *range(2 * width, num_tokens)):
            count = width if start < 2 * width else 1
            parts.append(session.advance({row: tokens[row, start : start + count] for row in range(num_rows)}, count))
    architecture = model.architecture
    in_float32 = replace(architecture, model=replace(architecture.model, dtype="float32"))
    exact_model = Pretrained(architecture, Model(abstract_model(in_float32).structure, model.model.params))
    through, parallel, exact = (
        np.asarray(logits, np.float64)
        for logits in (jnp.concatenate(parts, axis=1), _parallel(model, tokens), _parallel(exact_model, tokens))
    )

    def error(logits: np.ndarray) -> float:
        return float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))

    same = float((through.argmax(-1) == exact.argmax(-1)).mean())
    say(
        **about(model=name, what="logits against the float32 parallel form"),
        error_through_pages=error(through),
        error_of_parallel_form=error(parallel),
        same_argmax=same,
        **kernels(taken),
    )


def _parallel(model: Pretrained, tokens: np.ndarray) -> jax.Array:
    """Logits of whole sequences, without memory, by the host: another compiler's code, and no products of float32 to
    be tuned for a device, which takes a minute."""

    @jax.jit
    def logits(params: Any) -> jax.Array:
        whole = merge(model.model.structure, params)
        return whole.logits(whole.parallel(jnp.asarray(tokens)))

    return logits(jax.device_put(model.model.params, jax.devices("cpu")[0]))


def batches_of(size: Size, name: str) -> tuple[int, ...]:
    """All of them; one where tokens are only to be compared."""
    return size.batches[-1:] if name.endswith("float32") else size.batches


def decoder(model: Pretrained, size: Size) -> Engine:
    """Computes prompts four at a time, whatever the batch, and no prompt beside a decode step."""
    most, budget = max(size.batches), PROMPTS_AT_ONCE * size.chunk_len
    rows = tuple(sorted({min(PROMPTS_AT_ONCE, most), *size.batches}))
    return engine_of(model, size, max_batch=most, row_sizes=rows, token_budget=budget, mixed=False)


def profile(name: str, size: str, scratch: Path) -> None:
    """Where decode steps of the largest and the smallest batch go."""
    model, chosen = model_of(size, name, scratch), SIZES[size]
    fields = {"prompt_len": chosen.prompt_len, "num_new": chosen.num_new, "vocab_size": model.architecture.vocab_size}
    profile_decoding(decoder(model, chosen), name, batches=(max(chosen.batches), min(chosen.batches)), **fields)


def decode(name: str, size: str, scratch: Path) -> None:
    """Decode steps of full batches, a step at a time."""
    if name.endswith("float32"):  # to be compared token for token
        jax.config.update("jax_default_matmul_precision", "highest")
    model, chosen = model_of(size, name, scratch), SIZES[size]
    vocab, engine = model.architecture.vocab_size, decoder(model, chosen)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.model.params))
    if not model.architecture.model.tie_embeddings:
        weights -= model.model.params["embedding"]["embedding"].nbytes  # of which a row a token is read
    batches: dict[str, Any] = {}
    for batch in batches_of(chosen, name):
        asked = prompts([chosen.prompt_len] * batch, vocab_size=vocab)
        with recording() as taken:
            _decode_round(engine, asked, chosen.num_new)  # compiles
        samples, tokens = list[float](), list[list[int]]()
        for _ in range(chosen.rounds):
            seconds, tokens = _decode_round(engine, asked, chosen.num_new)
            samples += seconds
        keep_tokens(scratch, name, batch, tokens)
        step = statistics.median(samples)
        kv_bytes = batch * engine.layout.classes[0].spec.unit_bytes * len(model.architecture.layers)
        read = weights + kv_bytes * (chosen.prompt_len + chosen.num_new / 2)
        batches[str(batch)] = {
            "step_ms": spread(samples, 1e3),
            "tokens_per_s": batch / step,
            **against_floor(read, scratch, step),
            **(kernels(taken) if len(batches) == 0 else {}),
        }
        host = engine.stats.host_s / engine.stats.steps * 1e3
        what = f"decode after a prompt of {chosen.prompt_len} tokens"
        say(**about(model=name, what=what), batches=batches, host_ms_a_step=host)


def _decode_round(engine: Engine, asked: list[list[int]], num_new: int) -> tuple[list[float], list[list[int]]]:
    """Seconds of every decode step, and all answers. Prompts are computed four at a time, whatever the batch, so that
    one program does them all. Where there are fewer, others come along that end with their first token."""
    names = [engine.submit(ids, Sampling(max_tokens=num_new + 1)) for ids in asked]
    others = -len(asked) % PROMPTS_AT_ONCE
    if len(asked) + others <= engine.config.max_batch:
        names += [engine.submit(asked[0], Sampling(max_tokens=1)) for _ in range(others)]
    prefill(engine)
    seconds = []
    while engine.requests:
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds, [engine.answers.pop(name).tokens for name in names][: len(asked)]


def keep_tokens(scratch: Path, name: str, batch: int, tokens: list[list[int]]) -> None:
    """For the peer to compare with."""
    (scratch / f"tokens-{name}-{batch}.json").write_text(json.dumps(tokens))


def ragged(size: Size) -> tuple[list[int], list[int]]:
    """Lengths of prompts and of answers of the ragged requests."""
    rng = np.random.default_rng(3)
    low, high = np.log(size.prompt_range)
    lengths = np.exp(rng.uniform(low, high, size.num_requests)).astype(int).tolist()
    return lengths, rng.choice(size.answers, size.num_requests).tolist()


def requests(name: str, size: str, scratch: Path) -> None:
    """Ragged requests, all there from the beginning, through one engine."""
    model, chosen = model_of(size, name, scratch), SIZES[size]
    lengths, new = ragged(chosen)
    most = chosen.num_requests
    fields: dict[str, Any] = {"max_batch": most, "row_sizes": (max(1, most // 4), most)}
    engine = engine_of(model, chosen, token_budget=PROMPTS_AT_ONCE * chosen.chunk_len, **fields)
    asked = prompts(lengths, vocab_size=model.architecture.vocab_size)
    samples: list[float] = []
    with recording() as taken:
        for turn in range(chosen.rounds + 1):
            read = engine.stats.read_bytes
            for ids, count in zip(asked, new, strict=True):
                engine.submit(ids, Sampling(max_tokens=count))
            seconds = run_all(engine)
            if turn:  # the first compiles
                samples.append(seconds)
                middle = statistics.median(samples)
                say(
                    **about(model=name, what=f"{most} ragged requests", tokens=sum(new), prompt_tokens=sum(lengths)),
                    seconds=spread(samples),
                    tokens_per_s=sum(new) / middle,
                    **against_floor(engine.stats.read_bytes - read, scratch, middle),
                    shapes=sorted(str(shape[:2]) for shape in engine.stats.shapes),
                    **kernels(taken),
                )


KINDS: dict[str, Callable[[str, str, Path], None]] = {
    "probe": probe,
    "ceilings": measure_ceilings,
    "agree": agree,
    "decode": decode,
    "profile": profile,
    "requests": requests,
    "train": train,
}


def main() -> None:
    """One piece."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("name")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    options = parser.parse_args()
    KINDS[options.kind](options.name, options.size, options.scratch)


if __name__ == "__main__":
    sys.exit(main())
