"""kvlab: how much quality a sequence model loses for each byte of memory it stops holding, and how fast
it then runs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes


def load(path: "str | Path") -> "pd.DataFrame":
    """A folder of results as a DataFrame, one row a run; see `kvlab.lab.results.load`."""
    from kvlab.lab import results  # kvlab itself imports nothing, so that its ledger needs no JAX

    return results.load(path)


def plot(frame: "pd.DataFrame", x: str, y: str, **options: Any) -> "list[Axes]":
    """Any column of `load` against any other; see `kvlab.lab.own_plots.plot`."""
    from kvlab.lab import own_plots

    return own_plots.plot(frame, x, y, **options)


__all__ = ["load", "plot"]
