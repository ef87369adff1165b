"""kvlab: how much quality a sequence model loses for each byte of memory it stops holding, and how fast
it then runs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd


def load(path: "str | Path") -> "pd.DataFrame":
    """A folder of results as a DataFrame, one row a run; see `kvlab.lab.results.load`."""
    from kvlab.lab import results  # kvlab itself imports nothing, so that its ledger needs no JAX

    return results.load(path)


__all__ = ["load"]
