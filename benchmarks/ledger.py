"""What the ledger costs on the host, beside vLLM's block manager, in turns; and how it grows.

    make peers-ledger && .venv/bin/python benchmarks/ledger.py      # without the peer's environment: ours alone

A steady decode: every sequence of 8,192 tokens (pages of 16) appends one token a step, lengths staggered so that one in
sixteen opens a page. `manage` is reserve and commit, or allocate_slots and append_output_token_ids, for all sequences.
`tables` is the step's page tables (ours: the whole Plan; the peer: its new table entries only). Medians over 64 steps
and three rounds; the collector is frozen, as in the peer's own engine. The floor is this machine's time to copy the
page tables that the device reads.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PAGE, TOKENS, STEPS = 16, 8192, 64


def ours(num_sequences: int, num_tokens: int, prefix_caching: bool) -> dict[str, float]:
    """Milliseconds of a step and of a prompt."""
    from kvlab.host import keep_freed_memory
    from kvlab.ledger.classes import StateClass
    from kvlab.ledger.ledger import Ledger
    from kvlab.ledger.states import TokenState

    keep_freed_memory()  # as every run does: without it glibc maps and unmaps half a megabyte of tables each step
    table_len = (num_tokens + STEPS) // PAGE + 2
    num_pages = 1 + (num_sequences + 2) * table_len
    state = StateClass("kv", TokenState(8, 128, 128, "bfloat16"), PAGE, num_pages, table_len, 32)
    ledger = Ledger([state], table_len * PAGE, table_len * PAGE)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 32_000, num_tokens - i % PAGE).tolist() for i in range(num_sequences)]
    began = time.perf_counter()
    for name, prompt in enumerate(prompts):
        ledger.reserve(name, len(prompt), hit=ledger.lookup(prompt) if prefix_caching else None)
        ledger.commit(name, len(prompt))
    fill = (time.perf_counter() - began) / num_sequences * 1e3
    names, sampled = list(range(num_sequences)), (7,)
    manage, tables = [], []
    gc.collect()
    gc.freeze()
    for _ in range(STEPS):
        start = time.perf_counter()
        for name in names:
            ledger.reserve(name, 1)
        reserved = time.perf_counter()
        ledger.plan(names, num_sequences, 1)
        planned = time.perf_counter()
        for name in names:
            ledger.commit(name, 1, sampled if prefix_caching else ())
        manage.append(time.perf_counter() - planned + reserved - start)
        tables.append(planned - reserved)
    lookups = []
    for _ in range(9 if prefix_caching else 0):
        start = time.perf_counter()
        hit = ledger.lookup(prompts[0])
        lookups.append(time.perf_counter() - start)
        assert hit.length == (len(prompts[0]) - 1) // PAGE * PAGE
        ledger.unpin(hit)
    start = time.perf_counter()
    ledger.audit()
    audit = time.perf_counter() - start
    ledger.check() if num_sequences <= 16 else None
    gc.unfreeze()
    found = {"manage_ms": statistics.median(manage) * 1e3, "tables_ms": statistics.median(tables) * 1e3}
    found |= {"slowest_ms": statistics.median(sorted(manage)[-4:]) * 1e3, "prompt_ms": fill, "audit_ms": audit * 1e3}
    return found | ({"lookup_ms": statistics.median(lookups) * 1e3} if lookups else {})


def floor_ms(num_sequences: int) -> float:
    """Copying [sequences, 514] int32 page ids and first positions: the least that a step's tables can cost."""
    tables = np.zeros((2, num_sequences, (TOKENS + STEPS) // PAGE + 2), np.int32)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        tables.copy()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def in_its_own_process(python: Path, script: Path, *arguments: str) -> dict:
    """One measurement, in a fresh process."""
    done = subprocess.run([python, script, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def median_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Each figure's median over rounds."""
    return {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]}


def draw(growth: list[dict], path: Path) -> None:
    """Milliseconds of a step against sequences and against pages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for panel, axis, fixed in zip(panels, ("sequences", "tokens"), ("tokens", "sequences"), strict=True):
        rows = [row for row in growth if row["grows"] == axis]
        for caching, colour in ((False, "#0072b2"), (True, "#d55e00")):
            some = [row for row in rows if row["prefix_caching"] == caching]
            total = [row["manage_ms"] + row["tables_ms"] for row in some]
            panel.loglog(
                [row[axis] for row in some],
                total,
                "o-",
                color=colour,
                label=f"prefix index {'on' if caching else 'off'}",
            )
        first = rows[0]
        scale = [
            (first["manage_ms"] + first["tables_ms"]) * row[axis] / first[axis]
            for row in rows
            if not row["prefix_caching"]
        ]
        panel.loglog([row[axis] for row in rows if not row["prefix_caching"]], scale, "--", color="0.6", label="linear")
        panel.axhline(1, color="0.8", lw=1)
        panel.set(xlabel=f"{axis} ({rows[0][fixed]:,} {fixed})", ylabel="ms a step, planning included")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("SEQUENCES", "TOKENS", "CACHING"), help="one measurement as JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.one:
        sequences, tokens, caching = (int(value) for value in options.one)
        print(json.dumps(ours(sequences, tokens, bool(caching))))
        return
    me, peer_python = Path(__file__), ROOT / ".peers-ledger" / "bin" / "python"
    rows = []
    for num_sequences in (16, 64, 256):
        for caching in (0, 1):
            arguments = (str(num_sequences), str(TOKENS), str(caching))
            found: dict[str, list] = {"kvlab": [], "vllm": []}
            for _ in range(options.rounds):
                found["kvlab"].append(in_its_own_process(Path(sys.executable), me, "--one", *arguments))
                if peer_python.exists():
                    found["vllm"].append(in_its_own_process(peer_python, me.with_name("ledger_peer.py"), *arguments))
            row = {
                "sequences": num_sequences,
                "prefix_caching": bool(caching),
                "floor_tables_ms": floor_ms(num_sequences),
            }
            row |= {name: median_of(rounds) for name, rounds in found.items() if rounds}
            rows.append(row)
            total = {name: row[name]["manage_ms"] + row[name]["tables_ms"] for name in found if name in row}
            row["ratio"] = round(total["vllm"] / total["kvlab"], 2) if "vllm" in total else None
            per_token = total["kvlab"] / num_sequences * 1e3
            print(
                f"{num_sequences:4} sequences, index {'on ' if caching else 'off'}: {total} ms a step, "
                f"{per_token:.1f} us a token, vLLM/kvlab {row['ratio']}, "
                f"floor of the tables {row['floor_tables_ms']:.3f} ms",
                flush=True,
            )
    growth = []
    for axis, points in (
        ("sequences", [(n, 2048) for n in (16, 64, 256, 1024)]),
        ("tokens", [(64, n) for n in (512, 2048, 8192, 32_768)]),
    ):
        for caching in (False, True):
            for sequences, tokens in points:
                measured = in_its_own_process(
                    Path(sys.executable), me, "--one", str(sequences), str(tokens), str(int(caching))
                )
                growth.append(
                    {"grows": axis, "sequences": sequences, "tokens": tokens, "prefix_caching": caching, **measured}
                )
                print(growth[-1], flush=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "date": str(date.today()),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "ledger.json").write_text(
        json.dumps({"machine": machine, "steps": rows, "growth": growth}, indent=1) + "\n"
    )
    draw(growth, options.output / "ledger.png")


if __name__ == "__main__":
    main()
