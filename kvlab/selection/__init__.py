"""Selections by name. A new one is a file and its line here, or an entry point of another package; no mixer and
no kernel knows of it."""

from kvlab.registry import Registry
from kvlab.selection.base import Candidates, Selection
from kvlab.selection.choose import choose
from kvlab.selection.controls import Oracle, Random, Recency
from kvlab.selection.mean_key import MeanKey
from kvlab.selection.quest import Quest

OURS: dict[str, type[Selection]] = {
    method.name: method
    for method in (
        Quest,
        MeanKey,
        Recency,
        Random,
        Oracle,
    )
}
SELECTIONS = Registry[type[Selection]]("kvlab.selections", Selection, OURS, called="name")

__all__ = ["SELECTIONS", "Candidates", "Selection", "choose"]
