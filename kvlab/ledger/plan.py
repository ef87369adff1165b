"""The only channel from host to device: what one step reads, writes and copies, as a pytree of int32 arrays.

A saved list of plans replays a run: the device needs nothing else of the host.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

NOWHERE = 2**30
"""First position of an unused table entry: later than any query, so nothing of it is ever visible."""

type Ints = npt.NDArray[np.int32]


class ClassPlan(NamedTuple):
    """One state class of a step, for B sequences of up to T new tokens."""

    pages: Ints
    """[B, table_len] physical pages a step reads; unused entries are 0 (token states) or out of range (recurrent)."""
    page_starts: Ints
    """[B, table_len] token position of each page's first slot; `NOWHERE` where unused."""
    write_slots: Ints
    """[B, T] flat slot (page * page_size + offset) of each new token, or [B, 1] the slot a recurrent state is written to;
    out of range for padding, so that the write is dropped."""
    copies: Ints
    """[C, 2] (source, destination) pages to copy before the step reads or writes; C is 0 in most steps."""


class Plan(NamedTuple):
    """What the host decided for one step."""

    starts: Ints
    """[B] tokens already stored of each sequence."""
    counts: Ints
    """[B] new tokens of each sequence in this step, at most T; the rest of a row is padding."""
    classes: tuple[ClassPlan, ...]

    @property
    def has_copies(self) -> bool:
        """Whether pages must be copied before the step."""
        return any(len(one.copies) for one in self.classes)

    def without_copies(self) -> "Plan":
        """The plan of the step alone, once its copies are done: its shapes do not depend on them."""
        none = np.zeros((0, 2), np.int32)
        return self._replace(classes=tuple(one._replace(copies=none) for one in self.classes))


class Swap(NamedTuple):
    """Pages to move between device and host, [n, 2] (device page, host page) for every class; done before the next step."""

    classes: tuple[Ints, ...]


def save_plans(path: Path, plans: Sequence[Plan]) -> None:
    """Writes plans as one compressed npz file of int32 arrays."""
    if not plans:
        raise ValueError("plans = []: there is nothing to save")
    arrays: dict[str, Ints] = {}
    for step, plan in enumerate(plans):
        arrays[f"{step}/starts"], arrays[f"{step}/counts"] = plan.starts, plan.counts
        for index, one in enumerate(plan.classes):
            arrays |= {f"{step}/{index}/{name}": array for name, array in one._asdict().items()}
    with path.open("wb") as file:
        np.savez_compressed(file, **cast(dict[str, Any], arrays))


def load_plans(path: Path) -> list[Plan]:
    """Reads what `save_plans` wrote. Raises ValueError for a file that holds anything else."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (zipfile.BadZipFile, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a file of plans ({type(error).__name__})") from None
    if wrong := [name for name, array in arrays.items() if array.dtype != np.int32]:
        raise ValueError(f"{path}: {wrong[0]} is {arrays[wrong[0]].dtype}, not int32: not a file of plans")
    plans = []
    while f"{len(plans)}/starts" in arrays:
        step, classes = len(plans), []
        while f"{step}/{len(classes)}/pages" in arrays:
            fields = {name: arrays.pop(f"{step}/{len(classes)}/{name}", None) for name in ClassPlan._fields}
            if missing := [name for name, array in fields.items() if array is None]:
                raise ValueError(f"{path}: step {step} lacks {missing[0]}: not a file of plans")
            classes.append(ClassPlan(**fields))
        starts, counts = arrays.pop(f"{step}/starts"), arrays.pop(f"{step}/counts", None)
        if counts is None:
            raise ValueError(f"{path}: step {step} lacks counts: not a file of plans")
        if not classes:
            raise ValueError(f"{path}: step {step} has no class: not a file of plans")
        plans.append(Plan(starts, counts, tuple(classes)))
    if arrays or not plans:
        raise ValueError(f"{path}: {next(iter(arrays), 'nothing')} in it: not a file of plans")
    return plans
