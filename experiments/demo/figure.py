"""The README's picture, from the demo's runs: kvlab reproduce demo."""

import sys
from pathlib import Path

from kvlab.lab.plots import draw_frontier
from kvlab.lab.results import points, read_records

RUNS = ((),)  # the sweep of the configuration of this name comes first


def main(output: Path, results: Path) -> int:
    """Writes demo.png."""
    draw_frontier(points(read_records(results)), "Quality against the bytes a sequence holds", [output / "demo.png"])
    print(output / "demo.png")
    return 0


if __name__ == "__main__":
    docs = Path(__file__).resolve().parents[2] / "docs"
    sys.exit(main(docs, Path(sys.argv[1] if len(sys.argv) > 1 else "results/demo")))
