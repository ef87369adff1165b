"""A window needs its sinks: perplexity of SmolLM2 under StreamingLLM (arXiv 2309.17453), and where attention goes.

kvlab reproduce sinks_smollm2
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from kvlab.evaluation.sinks import sink_shares
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import save, sheet
from kvlab.lab.smollm2 import Bench, Material, Window, with_material
from kvlab.lab.styles import BLUE, GREY, RED

HERE = Path(__file__).resolve().parent
SINKS = (0, 1, 4)
FOUND_BEFORE = {"full": 98.7, "0": 221.9, "1": 112.4, "4": 109.7}
"""Of the same weights and text under a mask in another implementation (transformers): not published."""
WINDOW = Window(20_000, 2048, 1024)


@dataclass(frozen=True)
class Sizes:
    """What is run; tests run less."""

    window: Window = WINDOW
    budget: int = 256
    attention_len: int = 1024
    """Tokens over which the share of the first is taken."""
    chunk_len: int = 256
    flat_layers: int = 12
    """The first layers, whose attention to token 0 is small."""


def perplexities(bench: Bench, sizes: Sizes) -> pd.DataFrame:
    """A row a memory: full, and streaming with each number of sinks at the same budget."""
    memories = {"full": {}} | {
        str(sinks): {"compression": {"type": "streaming", "sinks": sinks}, "budget": sizes.budget} for sinks in SINKS
    }
    rows = []
    for name, memory in memories.items():
        outcome = bench.through(memory)
        rows.append(
            {
                "sinks": name,
                "slots": sizes.budget if memory else sizes.window.seq_len,
                "perplexity": outcome.value,
                "pool_bytes": outcome.pool_bytes,
                "logit_difference": outcome.worst,
                "cpu_s": outcome.cpu_s,
            }
        )
        print(f"{name}: perplexity {outcome.value:.1f}, {outcome.cpu_s:.0f} CPU-s", flush=True)
    return pd.DataFrame(rows)


def claims(found: pd.DataFrame, shares: npt.NDArray[np.float64], flat_layers: int = 12) -> list[Claim]:
    """Every claim; `shares` [L] are means over heads."""
    by_sinks = found.set_index("sinks").perplexity
    ratio, loss = by_sinks["0"] / by_sinks["4"], by_sinks["4"] / by_sinks["full"] - 1
    worst = found.logit_difference.max()
    flat, sunk, last = shares[:flat_layers], shares[flat_layers:], len(shares) - 1
    rows = [
        Claim("perplexity, window only / 4 sinks", ">= 1.8", f"{ratio:.2f}", bool(ratio >= 1.8)),
        Claim("perplexity, 4 sinks over full", "<= 15%", f"{loss:.1%}", bool(loss <= 0.15)),
        Claim(
            f"share of token 0, layers 0-{flat_layers - 1}",
            "<= 0.10",
            f"{flat.max():.3f}",
            bool(flat.max() <= 0.10),
        ),
        Claim(
            f"share of token 0, layers {flat_layers}-{last}",
            ">= 0.30",
            f"{sunk.min():.3f}",
            bool(sunk.min() >= 0.3),
        ),
        Claim("logits, pages against the mask", "<= 1e-4", f"{worst:.1e}", bool(worst <= 1e-4)),
    ]
    for name, before in FOUND_BEFORE.items():
        title = "full" if name == "full" else f"{name} sinks"
        rows.append(Claim.near(f"perplexity, {title}, as found before", before, by_sinks[name], 0.02 * before))
    return rows


def draw(found: pd.DataFrame, shares: npt.NDArray[np.float64], path: Path) -> None:
    """Bars of perplexity beside attention by layer: a line for the mean, dots for heads."""
    figure, (left, right) = sheet(1, 2, size=(10, 4))
    names = ["full cache", *(f"{s} sinks + {found.slots.iloc[-1] - s}" for s in SINKS)]
    colours = [GREY, RED, BLUE, BLUE]
    bars = left.bar(names, found.perplexity, color=colours)
    left.bar_label(bars, fmt="%.0f")
    left.margins(y=0.12)
    left.set(ylabel="perplexity", title="The newest tokens alone do not suffice")
    left.tick_params(axis="x", labelsize=8)
    layers = np.arange(len(shares))
    for head in range(shares.shape[1]):
        right.plot(layers, shares[:, head], ".", color=GREY, ms=4, label="a query head" if not head else None)
    right.plot(layers, shares.mean(axis=1), "-", color=BLUE, label="mean of the layer")
    right.set(xlabel="layer", ylabel="share of attention", title="What goes to token 0", ylim=(0, 1))
    right.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    save(figure, [path])


def reproduce(material: Material, output: Path, sizes: Sizes | None = None) -> int:
    """Writes sinks.csv, attention.csv and sinks.png; returns 1 if a claim fails."""
    sizes, began = sizes or Sizes(), time.process_time()
    overrides = [f"memory.chunk_len={sizes.chunk_len}", "memory.page_size=16"]
    bench = Bench.of_text(material, sizes.window, overrides)
    tokens = material.tokens(sizes.window.start, sizes.attention_len)[None]
    shares = sink_shares(bench.blockwise, tokens, min(64, sizes.attention_len // 2))
    found = perplexities(bench, sizes)
    found.to_csv(output / "sinks.csv", index=False, float_format="%.5g")
    by_head = pd.DataFrame(shares, columns=[f"head_{head}" for head in range(shares.shape[1])])
    by_head.rename_axis("layer").to_csv(output / "attention.csv", float_format="%.4g")
    draw(found, shares, output / "sinks.png")
    print(f"{time.process_time() - began:.0f} CPU seconds")
    return verdict(
        claims(found, shares.mean(axis=1), sizes.flat_layers), "Attention sinks of SmolLM2-135M (arXiv 2309.17453)"
    )


def redraw(output: Path = HERE) -> None:
    """sinks.png, of the tables beside this file."""
    shares = pd.read_csv(HERE / "attention.csv", index_col="layer").to_numpy()
    draw(pd.read_csv(HERE / "sinks.csv"), shares, output / "sinks.png")


def main(output: Path = HERE, results: Path | None = None) -> int:
    """As `reproduce`; 3, and a sentence, where the model or the text cannot be had."""
    return with_material(lambda material: reproduce(material, output))


if __name__ == "__main__":
    sys.exit(main())
