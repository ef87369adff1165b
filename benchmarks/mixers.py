"""What each mixer costs beside attention, on this machine: a training step, its temporaries, and decoding.

    .venv/bin/python -m benchmarks.mixers [MIXER ...] [--rounds 5] [--output FILE]

Two layers of each, as configs/mixer has them, width 64, no MLP, vocabulary 512. Training: batches of 64 x 128 tokens of
MQAR with 32 labelled, AdamW. Decoding: 8 sequences behind 128 and behind 2,048 tokens, one token each, the step's
device program alone. All take turns, a round each; medians and ratios to `mha`.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from kvlab.host import keep_freed_memory

keep_freed_memory()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from kvlab.compose import compose  # noqa: E402
from kvlab.engine.step import MemoryStep  # noqa: E402
from kvlab.lab.laboratory import Laboratory  # noqa: E402
from kvlab.random import named_key  # noqa: E402
from kvlab.training.step import init_state  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mixers.json"
BASE = "mha"
MIXERS = (
    BASE, "mqa", "swa16", "mla", "indexed", "linear_attention", "retnet", "lightning", "gla", "based", "deltanet",
    "gated_deltanet", "kda", "deltaproduct", "mamba2", "mamba3", "rglru",
)  # fmt: skip
BATCH, LENGTH, PAIRS, STEPS = 64, 128, 32, 4
DECODED, CONTEXTS, DECODE_STEPS = 8, (128, 2048), 20

type Round = Callable[[], float]
"""Runs some steps; returns milliseconds of one."""


class Made(NamedTuple):
    """A compiled program: a round of it, the compiler's temporaries, and the bytes that its memory takes a sequence."""

    round_ms: Round
    temporary_bytes: int
    bytes_per_sequence: int = 0


def laboratory(mixer: str) -> Laboratory:
    """Two layers of a mixer."""
    fields = [f"mixer={mixer}", "model.num_layers=2", "model.mlp_dim=0", "optimizer.name=adamw"]
    fields += [f"train.batch_size={BATCH}", f"task.train=[{LENGTH}:{PAIRS}]", "task.train_weights=[1]"]
    return Laboratory.of(compose(fields))


def temporaries(compiled: Any) -> int:
    """The compiler's own bytes; 0 where it does not say."""
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes if analysis else 0


def training(lab: Laboratory) -> Made:
    """Steps of the optimizer, several a call."""
    step_fn = lab.train_step()
    state = init_state(jax.tree.map(jnp.copy, lab.model.params), step_fn.optimizer, 1e-3)
    key, knobs = named_key(0, "train"), jnp.full(STEPS, PAIRS, jnp.int32)
    compiled = type(step_fn).__call__.lower(step_fn, state, (), key, knobs, LENGTH).compile()

    def round_ms() -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = step_fn(state, (), key, knobs, LENGTH)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - began) * 1e3 / STEPS

    return Made(round_ms, temporaries(compiled))


def decoding(lab: Laboratory, context: int) -> Made:
    """One token of each sequence behind `context` others, over and over."""
    layout = lab.layout(context + 1, DECODED)
    ledger, names = layout.ledger(), [str(number) for number in range(DECODED)]
    for name in names:
        for begin in range(0, context, ledger.chunk_len):
            count = min(ledger.chunk_len, context - begin)
            ledger.reserve(name, count)
            ledger.commit(name, count)
        ledger.reserve(name, 1)
    plan = jax.tree.map(jnp.asarray, ledger.plan(names, DECODED, 1))
    step, params = MemoryStep.of(lab.model.structure, layout), lab.model.params
    pools, tokens = layout.allocate(), jnp.zeros((DECODED, 1), jnp.int32)
    compiled = type(step).next_logits.lower(step, params, pools, plan, tokens).compile()

    def round_ms() -> float:
        nonlocal pools
        began = time.perf_counter()
        for _ in range(DECODE_STEPS):
            _, _, pools = step.next_logits(params, pools, plan, tokens)
        jax.block_until_ready(pools)
        return (time.perf_counter() - began) * 1e3 / DECODE_STEPS

    return Made(round_ms, temporaries(compiled), layout.pool_bytes // DECODED)


def measured(made: dict[str, Made], rounds: int) -> dict[str, dict[str, Any]]:
    """Medians of all, in turns, and of the ratios to attention's round before; the first round of each warms up."""
    for each in made.values():
        each.round_ms()
    samples = [{name: each.round_ms() for name, each in made.items()} for _ in range(rounds)]
    return {
        name: {
            "ms": statistics.median(sample[name] for sample in samples),
            "spread_ms": [min(sample[name] for sample in samples), max(sample[name] for sample in samples)],
            "of_attention": statistics.median(sample[name] / sample[BASE] for sample in samples),
            "temporary_bytes": each.temporary_bytes,
            "bytes_per_sequence": each.bytes_per_sequence,
        }
        for name, each in made.items()
    }


def table(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Markdown."""
    heads = ["mixer", "training step, ms (range)", "times attention's", "temporaries, MiB"]
    for context in CONTEXTS:
        heads += [f"tokens/s behind {context:,}", "times attention's", "KiB a sequence"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, trained in found["training"].items():
        low, high = trained["spread_ms"]
        cells = [f"{trained['ms']:.1f} ({low:.0f} to {high:.0f})", f"{trained['of_attention']:.2f}"]
        cells.append(f"{trained['temporary_bytes'] / 2**20:.0f}")
        for context in CONTEXTS:
            mine = found[f"decoding behind {context}"][name]
            rate, kept = DECODED / mine["ms"] * 1e3, mine["bytes_per_sequence"] / 2**10
            cells += [f"{rate:,.0f}", f"{1 / mine['of_attention']:.2f}", f"{kept:.1f}"]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Prints the table and writes JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "mixers", nargs="*", default=[], help=f"of configs/mixer, beside {BASE}; default: one of a kind"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    names = list(dict.fromkeys([BASE, *options.mixers])) if options.mixers else list(MIXERS)
    labs = {name: laboratory(name) for name in names}
    found = {"training": measured({name: training(lab) for name, lab in labs.items()}, options.rounds)}
    for context in CONTEXTS:
        made = {name: decoding(lab, context) for name, lab in labs.items()}
        found[f"decoding behind {context}"] = measured(made, options.rounds)
    print(*table(found), sep="\n")
    about = {"benchmark": "mixers", "date": date.today().isoformat(), "rounds": options.rounds}
    about |= {"machine": {"processor": platform.machine(), "threads": len(os.sched_getaffinity(0))}}
    about |= {"versions": {"python": platform.python_version(), "jax": jax.__version__}}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**about, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
