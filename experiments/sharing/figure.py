"""What sharing saves: parallel sampling and beam search with copy-on-write (arXiv 2309.06180, section 6.3).

kvlab reproduce sharing

One request at a time through the ledger. Its prompt is computed once and forked; every step each branch writes one
token.
Saved is the share of pages that would be held without sharing: (references - pages) / references, summed over steps.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from kvlab.capacity.traces import Request
from kvlab.capacity.workload import WorkloadConfig, requests
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import beside_legend, save, sheet
from kvlab.lab.styles import BLUE, RED
from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.states import TokenState

HERE = Path(__file__).resolve().parent
OPT_13B = TokenState(40, 128, 128, "float16")
PAGE, MAX_LEN = 16, 2048
WIDTHS = (2, 4, 6)
ALPACA = WorkloadConfig(
    num_requests=120, prompt_mean=19.31, prompt_cv=0.5, output_mean=58.45, output_cv=1.0, output_shape="lognormal"
)
PUBLISHED = {"parallel": (6.1, 9.8), "beam": (37.6, 55.2)}
"""Percent at the narrowest and widest: 2 and 6 branches."""
UNCERTAIN, SPREAD = 0.12, 2.0
"""The random language model: this share of tokens is uncertain, with normal logits of this deviation. The others are
as good as given. That decides how long beams stay apart. Set by hand so that two beams come near the published 37.6%;
the six are then a prediction. With every token uncertain beams merge within a few steps and share too much: 41% and
68%."""


def make_ledger() -> Ledger:
    """Room for six branches of the longest request."""
    num_pages = 1 + 8 * MAX_LEN // PAGE
    return Ledger([StateClass("kv", OPT_13B, PAGE, num_pages, MAX_LEN // PAGE, 40)], MAX_LEN, MAX_LEN)


class Tally:
    """Pages and references to them, summed over steps."""

    def __init__(self, ledger: Ledger):
        self.ledger, self.pages, self.references = ledger, 0, 0

    def add(self) -> None:
        """Counts the current step."""
        (store,) = self.ledger.stores
        held = [count for count in store.refs if count]
        self.pages, self.references = self.pages + len(held), self.references + sum(held)

    @property
    def saved(self) -> float:
        """Percent."""
        return 100 * (1 - self.pages / self.references)


def write_one(ledger: Ledger, names: list[int]) -> None:
    """Every branch writes a token."""
    for name in names:
        assert ledger.reserve(name, 1).ready
        ledger.commit(name, 1)


def parallel(ledger: Ledger, request: Request, width: int, tally: Tally) -> None:
    """`width` samples of one prompt, all as long as the request's answer."""
    ledger.reserve(0, request.prompt_len)
    ledger.commit(0, request.prompt_len)
    for branch in range(1, width):
        ledger.fork(0, branch)
    for _ in range(request.output_len):
        write_one(ledger, list(range(width)))
        tally.add()
    for branch in range(width):
        ledger.release(branch)


def beam(ledger: Ledger, request: Request, width: int, tally: Tally, rng: np.random.Generator) -> None:
    """Beam search over the random language model, of 1,000 tokens."""
    ledger.reserve(0, request.prompt_len)
    ledger.commit(0, request.prompt_len)
    names, scores, next_name = [0], np.zeros(1), 1
    for _ in range(request.output_len):
        logits = rng.normal(0, SPREAD, (len(names), 1000))
        logits[rng.random(len(names)) >= UNCERTAIN, 0] += 7 * SPREAD
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        candidates = (scores[:, None] + log_probabilities).ravel()
        best = np.argpartition(-candidates, width)[:width]
        parents = [names[index // 1000] for index in best]
        children = list(range(next_name, next_name + width))
        next_name += width
        for parent, child in zip(parents, children, strict=True):
            ledger.fork(parent, child)
        for name in names:
            ledger.release(name)
        names, scores = children, candidates[best]
        write_one(ledger, names)
        tally.add()
    for name in names:
        ledger.release(name)


def redraw(output: Path = HERE) -> None:
    """sharing.png, of the table beside this file."""
    draw(pd.read_csv(HERE / "sharing.csv"), output / "sharing.png")


def main(output: Path = HERE, results: Path | None = None) -> int:
    """Writes sharing.csv and sharing.png; returns 1 if a claim fails."""
    asked, rows, claims = requests(ALPACA), [], []
    for method in PUBLISHED:
        for width in WIDTHS:
            ledger, rng = make_ledger(), np.random.default_rng(width)
            tally = Tally(ledger)
            for request in asked:
                if method == "parallel":
                    parallel(ledger, request, width, tally)
                else:
                    beam(ledger, request, width, tally, rng)
            ledger.check()
            copied = ledger.stores[0].copied
            rows.append({"method": method, "width": width, "saved_percent": tally.saved, "copied_pages": copied})
    frame = pd.DataFrame(rows)
    found = frame.set_index(["method", "width"]).saved_percent
    for method, (narrow, wide) in PUBLISHED.items():
        note = " (calibrated)" if method == "beam" else ""
        claims.append(Claim.near(f"Alpaca, {method}, 2 branches: saved{note}", narrow, found[method, 2], 3.0, "%"))
        claims.append(Claim.near(f"Alpaca, {method}, 6 branches: saved", wide, found[method, 6], 5.0, "%"))
        grows = found[method, 2] < found[method, 4] < found[method, 6]
        claims.append(
            Claim(
                f"{method}: wider saves more",
                "2 < 4 < 6",
                " < ".join(f"{found[method, w]:.1f}" for w in WIDTHS),
                bool(grows),
            )
        )
    most = [100 * (1 - 1 / width) for width in WIDTHS]
    below = all(found["beam", width] < limit for width, limit in zip(WIDTHS, most, strict=True))
    claims.append(
        Claim("nothing saves more than 1 - 1/width", "<", "below at every width" if below else "above", below)
    )
    frame.to_csv(output / "sharing.csv", index=False, float_format="%.4g")
    draw(frame, output / "sharing.png")
    return verdict(claims, "Memory saved by sharing pages (arXiv 2309.06180, Alpaca)")


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Lines ours, crosses published."""
    figure, axes = sheet(size=(7.6, 4))
    for method, colour in (("parallel", BLUE), ("beam", RED)):
        rows = frame[frame.method == method]
        axes.plot(rows.width, rows.saved_percent, "o-", color=colour, label=f"{method}, kvlab")
        axes.plot((2, 6), PUBLISHED[method], "x", ms=10, mew=2, color=colour, label=f"{method}, published")
    axes.set(
        xlabel="branches of one request", ylabel="percent of pages saved", title="What copy-on-write saves, Alpaca"
    )
    axes.set_xticks(WIDTHS)
    axes.set_ylim(0, 80)
    axes.grid(alpha=0.25)
    beside_legend(axes)
    save(figure, [path])


if __name__ == "__main__":
    sys.exit(main())
