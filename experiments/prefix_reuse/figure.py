"""Which pages to keep: replacement policies against Belady's optimum, and which recurrent states a hybrid should keep.

kvlab reproduce prefix_reuse

Requests are served one after the other through the ledger: looked up, computed behind the hit, published, released.
Counted are prompt tokens found instead of computed. The optimum knows the whole trace (Belady, 1966). An endless pool
is the ceiling.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import save, sheet
from kvlab.lab.styles import INK, PALETTE
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.replacement import LRU, POLICIES, Policy, belady
from kvlab.ledger.states import ArraySpec, RecurrentState, TokenState
from kvlab.ledger.tokens import page_keys
from pallas_kernels.visible import Visible

HERE = Path(__file__).resolve().parent
ATTENTION = TokenState(8, 128, 128, "bfloat16")
WINDOW = TokenState(8, 128, 128, "bfloat16", visible=Visible(window=128))
STATE = RecurrentState((ArraySpec("ssm", (80, 64, 128), "bfloat16"),))
PAGE, MAX_LEN, CHUNK = 16, 4096, 512
POOLS = (128, 256, 512, 1024)
"""Pages: the workloads use 1,850 to 3,200 distinct ones."""


class Turn(NamedTuple):
    """One request: its prompt and the answer that a later turn may repeat."""

    prompt: list[int]
    answer: list[int]


def shared_prefix(seed: int = 0, count: int = 400) -> list[Turn]:
    """System prompts of Zipf popularity before short questions. One request in five is a long document that nobody
    asks for again."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(0, 1 << 30, rng.integers(100, 400)).tolist() for _ in range(24)]
    popularity = 1 / np.arange(1, 25)
    turns = []
    for _ in range(count):
        if rng.random() < 0.2:
            prompt = rng.integers(0, 1 << 30, rng.integers(200, 800)).tolist()
        else:
            which = rng.choice(24, p=popularity / popularity.sum())
            prompt = prefixes[which] + rng.integers(0, 1 << 30, rng.integers(10, 60)).tolist()
        turns.append(Turn(prompt, rng.integers(0, 1 << 30, rng.integers(5, 40)).tolist()))
    return turns


def multi_turn(seed: int = 0, count: int = 400) -> list[Turn]:
    """Conversations, 12 open at a time, each of a geometric number of turns; a turn repeats everything before it."""
    rng = np.random.default_rng(seed)
    open_ones: list[list[int]] = []
    turns = []
    while len(turns) < count:
        if len(open_ones) < 12:
            open_ones.append([])
        which = int(rng.integers(len(open_ones)))
        history = open_ones[which]
        prompt = history + rng.integers(0, 1 << 30, rng.integers(20, 120)).tolist()
        answer = rng.integers(0, 1 << 30, rng.integers(20, 150)).tolist()
        turns.append(Turn(prompt, answer))
        open_ones[which] = prompt + answer
        if rng.random() < 0.2 or len(prompt) > 1500:
            del open_ones[which]
    return turns


WORKLOADS: dict[str, Callable[[], list[Turn]]] = {"shared prefix": shared_prefix, "multi-turn": multi_turn}


def make_ledger(
    specs: tuple, num_pages: int, policy: Callable[[int], Policy], checkpoints: str = "junctions"
) -> Ledger:
    """A model's classes over pools of `num_pages`; one recurrent state costs as much as 20 pages of attention."""
    classes = []
    for number, spec in enumerate(specs):
        name = f"{number}.{type(spec).__name__}"
        if spec.per_token:
            classes.append(StateClass(name, spec, PAGE, num_pages + 1, MAX_LEN // PAGE))
        else:
            classes.append(StateClass(name, spec, 1, max(4, num_pages // 20), 1))
    return Ledger(classes, MAX_LEN, CHUNK, policy=policy, checkpoints=Checkpoints(checkpoints), page_size=PAGE)


def serve(ledger: Ledger, turns: list[Turn]) -> tuple[float, int]:
    """The share of prompt tokens found, and the pages evicted."""
    for turn in turns:
        hit = ledger.lookup(turn.prompt)
        done, tokens = hit.length, turn.prompt + turn.answer
        while done < len(tokens):
            begun = hit not in ledger.hits
            left = len(turn.prompt) - done
            count = ledger.clip(
                "r" if begun else hit, min(CHUNK, left) if left > 0 else min(PAGE - done % PAGE, len(tokens) - done)
            )
            assert ledger.reserve("r", count, hit=None if begun else hit).ready
            ledger.commit("r", count, tokens[max(done, len(turn.prompt)) : done + count])
            done += count
        ledger.release("r")
    counters = ledger.counters
    return counters.hit_tokens / counters.looked_up_tokens, sum(store.evicted for store in ledger.stores)


def future(turns: list[Turn]) -> dict[bytes, list[int]]:
    """When each page is asked for: what Belady knows."""
    uses: dict[bytes, list[int]] = {}
    for number, turn in enumerate(turns, 1):
        for key in page_keys(turn.prompt, PAGE):
            uses.setdefault(key, []).append(number)
    return uses


def compare_policies() -> pd.DataFrame:
    """Every policy on every workload in every pool."""
    rows = []
    for workload, make in WORKLOADS.items():
        turns = make()
        ceiling, _ = serve(make_ledger((ATTENTION,), 20_000, LRU), turns)
        for num_pages in POOLS:
            optimum, _ = serve(make_ledger((ATTENTION,), num_pages, belady(future(turns))), turns)
            base = {"workload": workload, "pages": num_pages, "ceiling": ceiling}
            rows.append({**base, "policy": "belady", "hits": optimum, "of_optimum": 1.0})
            for name, policy in POLICIES.items():
                hits, _ = serve(make_ledger((ATTENTION,), num_pages, policy), turns)
                rows.append({**base, "policy": name, "hits": hits, "of_optimum": hits / optimum})
    return pd.DataFrame(rows)


def compare_checkpoints() -> pd.DataFrame:
    """Which recurrent states to keep: a hybrid of attention, windows and states, in an ample and in a tight memory."""
    rows = []
    for workload, make in WORKLOADS.items():
        turns = make()
        for num_pages in (512, 8192):
            for checkpoints in ("none", "junctions", "all"):
                ledger = make_ledger((ATTENTION, WINDOW, STATE), num_pages, LRU, checkpoints)
                hits, _ = serve(ledger, turns)
                rows.append({"workload": workload, "pages": num_pages, "checkpoints": checkpoints, "hits": hits})
    return pd.DataFrame(rows)


def claims(policies: pd.DataFrame, states: pd.DataFrame) -> list[Claim]:
    """What must hold on any trace, and what these traces show."""
    rows = []
    worst = policies[policies.policy != "belady"].of_optimum.max()
    rows.append(Claim("no policy finds more than Belady", "<= 1", f"{worst:.4f}", bool(worst <= 1)))
    over = (policies.hits > policies.ceiling + 1e-12).any()
    rows.append(Claim("nothing finds more than an endless pool", "<= ceiling", "above" if over else "below", not over))
    monotone = policies[policies.policy == "belady"].groupby("workload").hits.apply(lambda h: h.is_monotonic_increasing)
    rows.append(Claim("a larger pool never hurts the optimum", "grows", str(monotone.tolist()), bool(monotone.all())))
    tight = policies[policies.pages == POOLS[1]].set_index(["workload", "policy"]).of_optimum
    apart = (
        policies[policies.policy == "lru"].hits.to_numpy() - policies[policies.policy == "fifo"].hits.to_numpy()
    ).max()
    what = "on a trie arrival is recency: who uses a page puts a younger leaf on it"
    rows.append(Claim(what, "lru = fifo", f"{apart:.4f} apart", bool(abs(apart) < 0.01)))
    share = {name: tight["shared prefix", name] for name in POLICIES}
    better = max(share["slru"], share["s3fifo"], share["lfu"])
    rows.append(
        Claim(
            "shared prefix with scans: frequency beats recency",
            "slru, s3fifo or lfu > lru",
            f"{better:.3f} > {share['lru']:.3f}",
            bool(better > share["lru"]),
        )
    )
    for workload in WORKLOADS:
        kept = states[(states.workload == workload) & (states.pages == 8192)].set_index("checkpoints").hits
        ceiling = policies[policies.workload == workload].ceiling.iloc[0]
        rows.append(Claim(f"{workload}: hybrid without kept states", "0", f"{kept['none']:.3f}", kept["none"] == 0))
        rows.append(
            Claim(
                f"{workload}: hybrid, states at junctions",
                ">= 0.8 of attention's ceiling",
                f"{kept['junctions'] / ceiling:.3f}",
                bool(kept["junctions"] >= 0.8 * ceiling),
            )
        )
    return rows


def redraw(output: Path = HERE) -> None:
    """reuse.png, of the tables beside this file."""
    policies = pd.read_csv(HERE / "policies.csv")
    states = pd.read_csv(HERE / "checkpoints.csv", keep_default_na=False)  # "none" is a word
    draw(policies, states, output / "reuse.png")


def main(output: Path = HERE, results: Path | None = None) -> int:
    """Writes policies.csv, checkpoints.csv and reuse.png; returns 1 if a claim fails."""
    policies, states = compare_policies(), compare_checkpoints()
    policies.to_csv(output / "policies.csv", index=False, float_format="%.4g")
    states.to_csv(output / "checkpoints.csv", index=False, float_format="%.4g")
    draw(policies, states, output / "reuse.png")
    return verdict(claims(policies, states), "Prefix reuse")


def draw(policies: pd.DataFrame, states: pd.DataFrame, path: Path) -> None:
    """Hits against pool size, one panel a workload; kept states of the hybrid beside them."""
    figure, axes = sheet(1, 3, size=(15, 4.6))
    names = ["belady", *POLICIES]
    for panel, workload in zip(axes, WORKLOADS, strict=False):
        rows = policies[policies.workload == workload]
        panel.axhline(100 * rows.ceiling.iloc[0], color="0.5", ls=":", label="endless pool")
        for index, name in enumerate(names):
            curve = rows[rows.policy == name]
            style = {"color": INK, "lw": 2.5} if name == "belady" else {"color": PALETTE[index - 1]}
            style["ls"] = "--" if name == "fifo" else "-"  # it lies on lru
            panel.semilogx(curve.pages, 100 * curve.hits, marker="o", base=2, label=name, ms=4, **style)
        panel.set(title=f"Attention, {workload}", xlabel="pages in the pool", ylabel="percent of prompt tokens found")
        panel.set_xticks(POOLS, [str(size) for size in POOLS])
        panel.minorticks_off()
        panel.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)
    labels = [f"{workload}\n{pages} pages" for workload in WORKLOADS for pages in (512, 8192)]
    for offset, name in enumerate(("none", "junctions", "all")):
        rows = states[states.checkpoints == name]
        axes[2].bar(np.arange(4) + 0.27 * (offset - 1), 100 * rows.hits, 0.25, label=name, color=PALETTE[offset])
    axes[2].set_xticks(range(4), labels, fontsize=9)
    axes[2].set(title="Hybrid: recurrent states kept", ylabel="percent of prompt tokens found")
    axes[2].legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    for panel in axes:
        panel.grid(alpha=0.25)
    save(figure, [path])


if __name__ == "__main__":
    sys.exit(main())
