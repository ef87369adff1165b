"""Decoding through compressed memories on this machine: tokens a second, bytes read and held, beside what the bytes
alone would give.

python -m benchmarks.compression [--batch 8] [--context 2048] [--rounds 7] [--steps 4]

A random Llama of 31 M parameters decodes a full batch. Every memory lives in a process of its own, whose resident
bytes are its own; their rounds are interleaved, so that other work on the machine is shared by all, and times are
medians over steps. Prompts are given to the ledger and not computed: pages, compactions and sealings are real, their
contents zeros, on which no time depends. Speed is not quality.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Hashable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvlab.host import keep_freed_memory

keep_freed_memory()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.engine_setup import make_model  # noqa: E402
from kvlab.engine.step import MemoryStep, Pools  # noqa: E402
from kvlab.evaluation.measure import MemoryReport, Observed, measures  # noqa: E402
from kvlab.evaluation.session import Session  # noqa: E402
from kvlab.ledger.plan import Plan  # noqa: E402
from kvlab.memory.config import MemoryConfig  # noqa: E402
from kvlab.memory.layout import MemoryLayout  # noqa: E402
from kvlab.typing import Params  # noqa: E402
from kvlab.units import UNTIMED  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "compression.json"
VOCAB = 8192
MEMORIES: dict[str, dict[str, Any]] = {
    "full": {},
    "snapkv 0.25": {"compression": {"type": "snapkv"}, "budget": 0.25},
    "int8": {"format": "int8"},
    "int4": {"format": "int4"},
    "kivi4": {"format": "kivi4", "page_size": 32},
    "quest 0.25": {"selection": {"type": "quest", "fraction": 0.25, "dense_layers": 0}},
}


class Filling(MemoryStep):
    """A step that computes nothing: tokens are only counted as stored."""

    def run(self, params: Params, pools: Pools, plan: Plan, tokens: np.ndarray) -> tuple[jax.Array, Pools]:
        return jnp.zeros(()), self.copied(pools, plan)[1]


def resident_bytes() -> int:
    """Of this process, as the kernel counts (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Decoding:
    """A full batch in one memory, ready to decode."""

    def __init__(self, memory: dict[str, Any], batch: int, context: int, num_steps: int):
        model = make_model().model
        self.num_params, self.weight_bytes = model.num_params, model.num_bytes
        config = MemoryConfig(chunk_len=256, **memory)
        max_len = context + num_steps + 1
        sizes = {"max_sequences": batch, "max_len": max_len, "prompt_len": context}
        self.layout = MemoryLayout.of(model.states, config, **sizes)
        step = MemoryStep(model.structure, self.layout)
        before = resident_bytes()
        self.session = Session(Filling(model.structure, self.layout), model.params)
        for pool in jax.tree.leaves(self.session.pools):
            pool.block_until_ready()
        self.session.prompt_len = self.session.decode_from = context
        self.tokens = np.random.default_rng(0).integers(0, VOCAB, (batch, max_len)).astype(np.int32)
        for row in range(batch):  # one after the other: only one prompt is ever whole
            for start in range(0, context, 256):
                end = min(start + 256, context)
                self.session.advance({row: self.tokens[row, start:end]}, 256, 1)
        self.session.step, self.length = step, context
        self.times: list[float] = []
        self.round(1)
        self.times.clear()  # it has compiled
        self.grown = resident_bytes() - before

    def round(self, num_steps: int) -> None:
        """Decodes a token of every sequence, so many times."""
        for _ in range(num_steps):
            began = time.perf_counter()
            at = slice(self.length, self.length + 1)
            fed: dict[Hashable, np.ndarray] = {row: tokens[at] for row, tokens in enumerate(self.tokens)}
            jax.block_until_ready(self.session.advance(fed, 1))
            self.times.append(time.perf_counter() - began)
            self.length += 1

    def report(self) -> dict[str, Any]:
        """What was measured of this memory."""
        ledger = self.session.ledger
        ledger.check()
        seen = Observed(self.layout, ledger.audit(), None, UNTIMED, UNTIMED, ledger, None)
        names = ("logical_bytes", "allocated_bytes", "pool_bytes", "read_bytes_per_token", "held_peak_bytes", "stored")
        found = {name: measures(MemoryReport)[name].take(seen) for name in names}
        of_pages = sum(account.allocated for account in seen.accounts)
        pages = sum(
            state.page_bytes * (len(store.refs) - 1 - len(store.free))
            for state, store in zip(self.layout.classes, ledger.stores, strict=True)
            if state.paged
        )
        return found | {
            "pages_in_use_bytes": pages,
            "allocated_bytes": of_pages,
            "resident_bytes": resident_bytes(),
            "resident_growth_bytes": self.grown,
            "weight_bytes": self.weight_bytes,
            "step_ms": 1e3 * statistics.median(self.times),
            "step_ms_quartiles": [1e3 * float(np.quantile(self.times, q)) for q in (0.25, 0.75)],
        }


def _serve(calls: Connection, memory: dict[str, Any], batch: int, context: int, num_steps: int) -> None:
    """A child: builds, then decodes when it is told to, and reports."""
    decoding = Decoding(memory, batch, context, num_steps)
    calls.send("ready")
    while (count := calls.recv()) > 0:
        decoding.round(count)
        calls.send("done")
    calls.send(decoding.report())


def measure_all(batch: int, context: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row a memory, in the order of MEMORIES; each is compared with the first."""
    spawn, children = multiprocessing.get_context("spawn"), []
    for name, memory in MEMORIES.items():
        ours, theirs = spawn.Pipe()
        child = spawn.Process(target=_serve, args=(theirs, memory, batch, context, rounds * steps + 1), daemon=True)
        child.start()
        children.append((name, ours, child))
    for name, calls, _ in children:
        assert calls.recv() == "ready", name
    for _ in range(rounds):
        for _, calls, _ in children:
            calls.send(steps)
            calls.recv()
    rows = []
    for name, calls, child in children:
        calls.send(0)
        rows.append({"memory": name, **calls.recv()})
        child.join()
    return [compared(row, rows[0], batch) for row in rows]


def compared(row: dict[str, Any], full: dict[str, Any], batch: int) -> dict[str, Any]:
    """A row with its speed over full's, and what its bytes would give: a step reads the weights once, and of each
    sequence what the memory reads."""
    ours, theirs = (each["weight_bytes"] + batch * each["read_bytes_per_token"] for each in (row, full))
    return row | {
        "tokens_per_s": batch / row["step_ms"] * 1e3,
        "speed_over_full": full["step_ms"] / row["step_ms"],
        "speed_by_bytes": theirs / ours,
        "allocated_over_full": row["allocated_bytes"] / full["allocated_bytes"],
    }


def main() -> None:
    """Measures, prints a table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("batch", 8), ("context", 2048), ("rounds", 7), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    before = os.getloadavg()[0]
    rows = measure_all(options.batch, options.context, options.rounds, options.steps)
    found = {
        "benchmark": "compression",
        "date": date.today().isoformat(),
        "machine": {"threads": os.cpu_count(), "load_before": before, "load_after": os.getloadavg()[0]},
        "versions": {"jax": jax.__version__},
        "batch": options.batch,
        "context": options.context,
        "rounds": options.rounds,
        "steps": options.steps,
        "rows": rows,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['memory']:<12} {row['tokens_per_s']:8.1f} tokens/s, x {row['speed_over_full']:.2f} of full, by "
            f"bytes x {row['speed_by_bytes']:.2f}; read {row['read_bytes_per_token'] / 2**20:.2f} MiB a token, "
            f"allocated {row['allocated_bytes'] / 2**20:.1f} MiB, "
            f"resident growth {row['resident_growth_bytes'] / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
