"""Which way to quantise keys (KIVI, arXiv 2402.02750): attention error by axis, against outlier channels.

kvlab reproduce kivi_axes

Synthetic keys here, sealed as pages and read by paged attention; published weights in smollm2.py beside it.
"""

import importlib.util
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd

from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import beside_legend, save, sheet
from kvlab.lab.styles import BLUE, GREEN, ORANGE, PINK, RED, SKY
from pallas_kernels.formats import Quantised, Scheme
from pallas_kernels.paged_attention import Lists, Pages, paged_attention
from pallas_kernels.sealing import seal_pages

HERE = Path(__file__).resolve().parent
NUM_TOKENS, DIM, NUM_QUERIES, NUM_DRAWS = 256, 64, 64, 16
RATIOS = (1, 4, 10, 30)
BITS = (4, 2)
OUTLIERS = (3, 35)
"""The channels that are shifted, a rotary pair."""


@dataclass(frozen=True)
class Axis:
    """A way to quantise keys: what has a scale, in pages of `page_size` tokens, after a rotation or not. `found_before`
    are an earlier study's errors by bits and ratio: one draw, exact scales, dense numpy (methods B.5)."""

    name: str
    per: str
    page_size: int
    group: int | None
    is_rotated: bool
    colour: str
    style: str
    found_before: dict[int, tuple[float, ...]]

    def scheme(self, bits: int, scale_dtype: str = "bfloat16") -> Scheme:
        """With zero points, as KIVI has them."""
        format: Any = f"int{bits}"
        return Scheme(format, self.per, self.group, has_zeros=True, scale_dtype=scale_dtype)

    def bits_held(self, bits: int) -> float:
        """Bits a number, scales and zero points included."""
        return 8 * self.scheme(bits).tile_bytes(self.page_size, DIM) / (self.page_size * DIM)


AXES = (
    Axis(
        "channel, page 16", "channel", 16, None, False, BLUE, "-",
        {4: (0.025, 0.026, 0.025, 0.025), 2: (0.127, 0.131, 0.127, 0.129)},
    ),
    Axis(
        "channel, page 32", "channel", 32, None, False, SKY, "-",
        {4: (0.030, 0.031, 0.030, 0.030), 2: (0.153, 0.158, 0.153, 0.153)},
    ),
    Axis(
        "channel, page 256", "channel", 256, None, False, GREEN, "-",
        {4: (0.041, 0.045, 0.042, 0.043), 2: (0.210, 0.219, 0.210, 0.212)},
    ),
    Axis(
        "token, groups of 32", "token", 32, 32, False, ORANGE, "--",
        {4: (0.031, 0.047, 0.088, 0.233), 2: (0.153, 0.224, 0.462, 0.432)},
    ),
    Axis(
        "token", "token", 32, None, False, RED, "--",
        {4: (0.035, 0.053, 0.097, 0.242), 2: (0.174, 0.258, 0.508, 0.435)},
    ),
    Axis(
        "token, rotated", "token", 32, None, True, PINK, ":",
        {4: (0.035, 0.043, 0.063, 0.139), 2: (0.173, 0.218, 0.315, 0.628)},
    ),
)  # fmt: skip
NAMED = {axis.name: axis for axis in AXES}


def hadamard(dim: int) -> np.ndarray:
    """Sylvester's orthogonal matrix [dim, dim]; dim must be a power of two."""
    found = np.ones((1, 1))
    while len(found) < dim:
        found = np.block([[found, found], [found, -found]])
    return found / np.sqrt(dim)


def draw(ratio: int, num_draws: int = NUM_DRAWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [draws, 64, D], keys [draws, 256, D] whose two outlier channels are shifted by `ratio` deviations (1:
    none are), and a random rotation [draws, D, D]. The normal numbers are the same for every ratio."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(num_draws, NUM_TOKENS, DIM))
    queries = rng.normal(size=(num_draws, NUM_QUERIES, DIM))
    rotation = hadamard(DIM) * np.sign(rng.normal(size=(num_draws, 1, DIM)))
    shift = np.sign(rng.normal(size=(num_draws, 1, 1))) * (ratio if ratio > 1 else 0)
    keys[:, :, list(OUTLIERS)] += shift
    return queries, keys, rotation


def exact_rows(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Attention rows [draws, 64, 256] in float64."""
    scores = np.einsum("bqd,bkd->bqk", queries, keys) / np.sqrt(DIM)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def sealed_rows(queries: np.ndarray, keys: np.ndarray, rotation: np.ndarray, axis: Axis, scheme: Scheme) -> np.ndarray:
    """Attention rows over keys that were sealed: the outputs of paged attention whose values are the unit vectors."""
    if axis.is_rotated:
        queries, keys = (np.einsum("bnd,bed->bne", each, rotation) for each in (queries, keys))
    num_draws, num_pages = len(keys), NUM_TOKENS // axis.page_size
    tiles = jnp.asarray(keys.reshape(num_draws * num_pages, 1, axis.page_size, DIM), jnp.float32)
    units = np.tile(np.eye(NUM_TOKENS, dtype=np.float32), (num_draws, 1)).reshape(
        num_draws * num_pages, 1, axis.page_size, -1
    )
    values: Quantised = seal_pages(jnp.asarray(units), Scheme("int8"))  # 127 * (1 / 127): the units come back
    pages = Pages(seal_pages(tiles, scheme), values)
    entry = jnp.arange(num_pages, dtype=jnp.int32)[None, :]
    table = jnp.arange(num_draws, dtype=jnp.int32)[:, None] * num_pages + entry
    lists = Lists(table, jnp.broadcast_to(entry * axis.page_size, table.shape))
    last = jnp.full((num_draws, NUM_QUERIES), NUM_TOKENS - 1, jnp.int32)
    lengths = jnp.full((num_draws,), NUM_TOKENS, jnp.int32)
    asked = jnp.asarray(queries[:, :, None, :], jnp.float32)
    return np.asarray(paged_attention(asked, pages, lists, last, lengths)[0])[:, :, 0].astype(np.float64)


def errors(ratio: int, axis: Axis, bits: int, num_draws: int = NUM_DRAWS, scale_dtype: str = "bfloat16") -> np.ndarray:
    """Half the L1 distance between exact and sealed attention rows, mean over queries: [draws]."""
    queries, keys, rotation = draw(ratio, num_draws)
    rows = sealed_rows(queries, keys, rotation, axis, axis.scheme(bits, scale_dtype))
    return np.abs(rows - exact_rows(queries, keys)).sum(axis=2).mean(axis=1) / 2


def table(num_draws: int = NUM_DRAWS) -> pd.DataFrame:
    """A row for each axis, bits and ratio."""
    rows = []
    for axis in AXES:
        for bits in BITS:
            for index, ratio in enumerate(RATIOS):
                found = errors(ratio, axis, bits, num_draws)
                row = {"axis": axis.name, "bits": bits, "bits_held": axis.bits_held(bits), "ratio": ratio}
                row |= {"error": found.mean(), "deviation": found.std(ddof=1), "draws": num_draws}
                rows.append(row | {"found_before": axis.found_before[bits][index]})
    return pd.DataFrame(rows)


def claims(frame: pd.DataFrame) -> list[Claim]:
    """What must hold of the synthetic table."""
    found = frame.set_index(["axis", "bits", "ratio"]).error
    rows = []
    for bits in BITS:
        channel = [axis.name for axis in AXES if axis.per == "channel"]
        spread = max(abs(found[name, bits, r] / found[name, bits, 1] - 1) for name in channel for r in RATIOS)
        what = f"int{bits} by channel: error does not depend on outliers"
        rows.append(Claim(what, "within 10%", f"within {spread:.1%}", bool(spread <= 0.1)))
    for name in ("token, groups of 32", "token"):
        line = [found[name, 4, ratio] for ratio in RATIOS]
        rows.append(
            Claim(f"int4 by {name}: error grows with outliers", "1 < 4 < 10 < 30", _ordered(line), _rises(line))
        )
    for ratio in (10, 30):
        line = [found[name, 4, ratio] for name in ("channel, page 32", "token, rotated", "token")]
        rows.append(Claim(f"int4, ratio {ratio}: channel < rotated < token", "<", _ordered(line), _rises(line)))
    equal = found["token, groups of 32", 4, 1] / found["channel, page 32", 4, 1]
    rows.append(Claim.near("int4, no outliers: axes tie at equal groups of 32", 1.0, equal, 0.05))
    line = [found[name, 2, 30] for name in ("token", "token, rotated")]
    rows.append(Claim("int2, ratio 30: rotation makes it worse", "token < rotated", _ordered(line), _rises(line)))
    apart = (frame.error / frame.found_before - 1).abs()
    what = "median difference from the errors found before (one draw)"
    rows.append(Claim(what, "<= 5%", f"{apart.median():.1%}", bool(apart.median() <= 0.05)))
    return rows


def _ordered(line: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in line)


def _rises(line: Sequence[float]) -> bool:
    return all(low < high for low, high in itertools.pairwise(line))


def draw_figure(frame: pd.DataFrame, path: Path) -> None:
    """A panel for each number of bits: error against the outliers' ratio. Crosses: found before."""
    figure, panels = sheet(1, len(BITS), size=(15, 4.4))
    for panel, bits in zip(panels, BITS, strict=True):
        for axis in AXES:
            rows = frame[(frame.axis == axis.name) & (frame.bits == bits)]
            label = f"{axis.name}: {axis.bits_held(bits):.3g} bits"
            style = {"color": axis.colour, "ls": axis.style, "marker": "o", "ms": 4, "capsize": 3}
            panel.errorbar(rows.ratio, rows.error, yerr=rows.deviation, label=label, **style)
            panel.plot(rows.ratio, rows.found_before, "x", color=axis.colour, ms=7)
        panel.set(xscale="log", ylim=(0, None), title=f"keys of {bits} bits, {DIM} dims")
        panel.set_xlabel("shift of two channels, in standard deviations (1: none)")
        panel.set_ylabel("attention error (half L1 distance of rows)")
        panel.set_xticks(RATIOS, [str(ratio) for ratio in RATIOS])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        beside_legend(panel)
        panel.get_legend().set_title("one scale for each:\nbits held a number", {"size": 8})
    figure.suptitle(
        "Keys by channel do not mind outlier channels (dots: mean and deviation of 16 draws; crosses: an earlier study)"
    )
    save(figure, [path])


def published_weights(output: Path, results: Path | None) -> int:
    """The half with SmolLM2: `main(output, results) -> exit status` of smollm2.py in this folder, where it is."""
    path = HERE / "smollm2.py"
    if not path.exists():
        return 0
    spec = importlib.util.spec_from_file_location("experiments.kivi_axes.smollm2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(output, results)


def redraw(output: Path = HERE) -> None:
    """axes.png, of the table beside this file."""
    draw_figure(pd.read_csv(HERE / "axes.csv"), output / "axes.png")


def main(output: Path = HERE, results: Path | None = None) -> int:
    """Writes axes.csv and axes.png, then what smollm2.py writes; returns 1 if a claim fails."""
    frame = table()
    frame.to_csv(output / "axes.csv", index=False, float_format="%.4g")
    draw_figure(frame, output / "axes.png")
    status = verdict(claims(frame), "Quantisation axes of keys (KIVI, arXiv 2402.02750), synthetic")
    return max(status, published_weights(output, results))


if __name__ == "__main__":
    sys.exit(main())
