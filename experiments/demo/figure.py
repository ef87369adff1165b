"""The README's picture from a finished demo: python experiments/demo/figure.py [results/demo]."""

import sys
from pathlib import Path

from kvlab.lab.plots import draw_frontier
from kvlab.lab.results import points, read_records

if __name__ == "__main__":
    results = sys.argv[1] if len(sys.argv) > 1 else "results/demo"
    picture = Path(__file__).resolve().parents[2] / "docs" / "demo.png"
    draw_frontier(points(read_records(results)), "Quality against the bytes a sequence holds", [picture])
    print(picture)
