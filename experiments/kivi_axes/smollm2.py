"""KIVI's axes on published weights (arXiv 2402.02750, Table 1): perplexity of SmolLM2 with keys and values rounded by
channel or by token, and through the memory's own sealed pages. The second half of `kvlab reproduce kivi_axes`.

python experiments/kivi_axes/smollm2.py      # this half alone
"""

import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from kvlab.evaluation.rounding import Rounding, rounded
from kvlab.lab.axes import byte_axis
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import beside_legend, save, sheet
from kvlab.lab.smollm2 import Bench, Material, Window, with_material
from kvlab.lab.styles import BLUE, INK, PALETTE, SKY
from pallas_kernels.formats import Scheme

HERE = Path(__file__).resolve().parent
GROUP = 32
"""Numbers that share a scale on every axis: tokens of a page by channel, channels by token."""
AXES = {"K channel, V token": "ct", "K token, V token": "tt", "K channel, V channel": "cc", "K token, V channel": "tc"}
ROTATED = "rotated, K token, V token"
FOUND_BEFORE = {
    ("full", 0, 0): 84.7,
    ("K channel, V token", 4, 0): 86.8,
    ("K token, V token", 4, 0): 88.7,
    ("K channel, V channel", 4, 0): 83.8,
    ("K token, V channel", 4, 0): 89.9,
    (ROTATED, 4, 0): 90.2,
    ("K channel, V token", 2, 0): 128.7,
    ("K token, V token", 2, 0): 322.8,
    ("K channel, V channel", 2, 0): 193.5,
    ("K token, V channel", 2, 0): 651.9,
    (ROTATED, 2, 0): 393.1,
    ("K channel, V token", 2, 128): 93.3,
    ("K token, V token", 2, 128): 148.7,
    ("K2 V4", 0, 0): 107.9,
    ("K4 V2", 0, 0): 95.3,
}
"""(axes, bits, residual) of the same weights and text in another implementation, scales in float32: not published."""
THROUGH_PAGES = (("kivi4", 0), ("kivi4", 32), ("kivi4", 128), ("kivi2", 0), ("kivi2", 32), ("kivi2", 128))
BY_TOKEN = ("int8", "int4", "int2")
WINDOW = Window(30_000, 1024, 768)


@dataclass(frozen=True)
class Sizes:
    """What is run; tests run less."""

    window: Window = WINDOW
    page_size: int = GROUP
    chunk_len: int = 32
    residual: int = 128
    group: int = GROUP


def scheme(axis: str, bits: int, group: int | None) -> Scheme:
    """How keys or values are rounded: "c" by channel, "t" by token; asymmetric, scales and zeros in bfloat16."""
    if axis == "c":
        return Scheme(f"int{bits}", "channel", has_zeros=True, scale_dtype="bfloat16")
    return Scheme(f"int{bits}", "token", group, has_zeros=True, scale_dtype="bfloat16")


def roundings(sizes: Sizes) -> dict[tuple[str, int, int], Rounding]:
    """Every cell of the table in the parallel form, by axes, bits and residual."""
    page, group = sizes.page_size, sizes.group
    found = {("full", 0, 0): Rounding(None, None)}
    for bits in (4, 2):
        for name, (keys, values) in AXES.items():
            pair = scheme(keys, bits, group), scheme(values, bits, group)
            found[name, bits, 0] = Rounding(*pair, page)
            if bits == 2 and values == "t":
                found[name, bits, sizes.residual] = Rounding(*pair, page, sizes.residual)
        whole = scheme("t", bits, None)
        found[ROTATED, bits, 0] = Rounding(whole, whole, page, rotates=True)
    found["K2 V4", 0, 0] = Rounding(scheme("c", 2, group), scheme("t", 4, group), page)
    found["K4 V2", 0, 0] = Rounding(scheme("c", 4, group), scheme("t", 2, group), page)
    return found


def in_parallel(bench: Bench, material: Material, sizes: Sizes) -> pd.DataFrame:
    """A row a cell: everything older than the residual is read rounded, the page that is being filled too."""
    window, rows = sizes.window, []
    tokens = material.tokens(window.start, window.seq_len + 1)[None]
    for (name, bits, residual), rounding in roundings(sizes).items():
        began = time.process_time()
        found = rounded(bench.blockwise, tokens, window.num_scored, rounding)
        rows.append(
            {
                "axes": name,
                "bits": bits,
                "residual": residual,
                "perplexity": found.perplexity,
                "key_error": found.key_errors.mean(),
                "value_error": found.value_errors.mean(),
                "found_before": FOUND_BEFORE.get((name, bits, residual)),
                "cpu_s": time.process_time() - began,
            }
        )
        print(f"{name}, {bits} bits, residual {residual}: perplexity {found.perplexity:.1f}", flush=True)
    return pd.DataFrame(rows)


def formats() -> dict[tuple[str, int], dict[str, Any]]:
    """Memories by format and residual. Those by token round a token when it is stored, and have no residual."""
    found: dict[tuple[str, int], dict[str, Any]] = {("model", 0): {}}
    for name, residual in THROUGH_PAGES:
        found[name, residual] = {"format": name, "residual": residual, "quantised_prefill": "chunks"}
    return found | {(name, 0): {"format": name} for name in BY_TOKEN}


def through_pages(bench: Bench) -> pd.DataFrame:
    """A row a format: pages are sealed behind the chunk that completes them, so that a chunk reads itself, and the page
    that is being filled, as they are. Every logit is compared with the parallel form under that schedule."""
    rows = []
    for (name, residual), memory in formats().items():
        found = bench.through(memory)
        rows.append(
            {
                "format": name,
                "residual": residual,
                "perplexity": found.value,
                "pool_bytes": found.pool_bytes,
                "logit_difference": found.worst,
                "cpu_s": found.cpu_s,
            }
        )
        print(f"pages of {name}, residual {residual}: perplexity {found.value:.1f}", flush=True)
    return pd.DataFrame(rows)


def claims(cells: pd.DataFrame, pages: pd.DataFrame, residual: int = 128) -> list[Claim]:
    """Every claim of this half."""
    of = cells.set_index(["axes", "bits", "residual"]).perplexity
    full = of["full", 0, 0]
    two = {name: of[name, 2, 0] for name in AXES}
    order = ["K channel, V token", "K channel, V channel", "K token, V token", "K token, V channel"]
    factors = [two[worse] / two[better] for better, worse in pairwise(order)]
    saved = 1 - (of["K channel, V token", 2, residual] - full) / (two["K channel, V token"] - full)
    keys_first = of["K4 V2", 0, 0], of["K2 V4", 0, 0]
    rotated = of[ROTATED, 4, 0], of["K token, V token", 4, 0]
    by_format = pages.set_index(["format", "residual"])
    worst, held = by_format.logit_difference.max(), by_format.perplexity
    recent = [held["kivi2", each] for each in (0, 32, 128)]
    rows = [
        Claim(
            "2 bits: K channel V token < V channel < K token V token < V channel, each",
            "x 1.3 or more",
            ", ".join(f"x {factor:.2f}" for factor in factors),
            all(factor >= 1.3 for factor in factors),
        ),
        Claim(f"2 bits: residual {residual} recovers of the loss", "> 75%", f"{saved:.0%}", bool(saved > 0.75)),
        Claim(
            "K4 V2 < K2 V4 (keys need the bits)",
            "<",
            "{:.1f} < {:.1f}".format(*keys_first),
            keys_first[0] < keys_first[1],
        ),
        Claim(
            "4 bits: rotation by token does not help here",
            ">= groups of 32 - 2%",
            "{:.1f} and {:.1f}".format(*rotated),
            bool(rotated[0] >= 0.98 * rotated[1]),
        ),
        Claim(
            "pages of kivi2: a longer residual is better",
            "0 > 32 > 128",
            " > ".join(f"{value:.1f}" for value in recent),
            recent[0] > recent[1] > recent[2],
        ),
        Claim(
            "pages of kivi4 / full",
            "<= 1.03",
            f"{held['kivi4', 32] / full:.3f}",
            bool(held["kivi4", 32] <= 1.03 * full),
        ),
        Claim("logits, pages against the parallel form", "<= 1e-4", f"{worst:.1e}", bool(worst <= 1e-4)),
    ]
    for place, before in FOUND_BEFORE.items():
        if place not in of.index:  # another residual was run
            continue
        name, bits, kept = place
        words = f"{name}, {bits} bits" if bits else name
        title = f"{words}{f', residual {kept}' if kept else ''}, as found before"
        rows.append(Claim.near(title, before, of[place], (0.01 if name == "full" else 0.1) * before))
    return rows


def draw(cells: pd.DataFrame, pages: pd.DataFrame, path: Path) -> None:
    """Dots in the parallel form on the left, pages by bytes on the right; perplexity on a log axis."""
    figure, (left, right) = sheet(1, 2, size=(13, 4.4), sharey=True)
    full = float(cells.perplexity.iloc[0])
    names = [*AXES, ROTATED]
    for offset, bits, colour in ((-0.12, 4, SKY), (0.12, 2, BLUE)):
        of = cells[(cells.bits == bits) & (cells.residual == 0)].set_index("axes").perplexity
        for place, value in enumerate(of.reindex(names)):
            label = f"{bits} bits" if place == 0 else None
            left.plot(place + offset, value, "o", ms=8, color=colour, label=label)
            left.annotate(f"{value:.0f}", (place + offset, value), (0, 7), textcoords="offset points", ha="center")
    left.axhline(full, color=INK, ls=":", label=f"not rounded: {full:.0f}")
    left.set_yscale("log")
    left.set_yticks((100, 200, 500, 1000), ("100", "200", "500", "1,000"))
    left.minorticks_off()
    left.margins(y=0.2)
    left.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
    left.set(ylabel="perplexity", title="All of the cache rounded, by axis")
    left.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, frameon=False)
    beside = {"kivi2": {0: (0, 9), 32: (4, 9), 128: (0, 9)}, "kivi4": {0: (-16, -15), 32: (18, -15), 128: (12, -15)}}
    for colour, (name, rows) in zip(PALETTE, pages.groupby("format", sort=False), strict=False):
        has_residual = str(name) in beside
        right.plot(rows.pool_bytes, rows.perplexity, "o-" if has_residual else "s", color=colour, label=str(name))
        for residual, held, value in zip(rows.residual, rows.pool_bytes, rows.perplexity, strict=True):
            if has_residual:
                style = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": colour}
                right.annotate(f"R={residual}", (held, value), beside[str(name)].get(residual, (0, 9)), **style)
    left.set_ylim(bottom=0.65 * full)
    byte_axis(right)
    right.grid(alpha=0.25)
    right.set(xlabel="the memory's arrays", title="Through pages, residual R")
    beside_legend(right)
    save(figure, [path])


def redraw(output: Path = HERE) -> None:
    """smollm2.png, of the tables beside this file."""
    draw(pd.read_csv(HERE / "smollm2_axes.csv"), pd.read_csv(HERE / "smollm2_pages.csv"), output / "smollm2.png")


def reproduce(material: Material, output: Path, sizes: Sizes | None = None) -> int:
    """Writes smollm2_axes.csv, smollm2_pages.csv and smollm2.png; returns 1 if a claim fails."""
    sizes, began = sizes or Sizes(), time.process_time()
    overrides = [f"memory.chunk_len={sizes.chunk_len}", f"memory.page_size={sizes.page_size}"]
    bench = Bench.of_text(material, sizes.window, overrides)
    cells = in_parallel(bench, material, sizes)
    cells.to_csv(output / "smollm2_axes.csv", index=False, float_format="%.5g")
    pages = through_pages(bench)
    pages.to_csv(output / "smollm2_pages.csv", index=False, float_format="%.5g")
    draw(cells, pages, output / "smollm2.png")
    print(f"{time.process_time() - began:.0f} CPU seconds")
    return verdict(claims(cells, pages, sizes.residual), "KIVI's axes, SmolLM2-135M (arXiv 2402.02750)")


def main(output: Path = HERE, results: Path | None = None) -> int:
    """As `reproduce`; 3, and a sentence, where the model or the text cannot be had."""
    return with_material(lambda material: reproduce(material, output))


if __name__ == "__main__":
    sys.exit(main())
