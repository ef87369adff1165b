"""The only channel from host to device: what one step reads, writes and copies, as a pytree of integer arrays.

A saved list of plans, and of the compactions and sealings between them, replays a run: the device needs
nothing else of the host.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

type Ints = npt.NDArray[np.int32]
type Bools = npt.NDArray[np.bool_]


class ClassPlan(NamedTuple):
    """One state class of a step, for B sequences of up to T new tokens.

    A class has a length of its own: the slots that it stores. It is that of the sequence, in tokens, unless compaction
    made it shorter. Rotary angles use tokens' positions; what a kernel masks by are slots.
    """

    pages: Ints
    """[B, table_len] physical pages a step reads; unused entries are 0 (token states) or out of range (recurrent)."""
    page_starts: Ints
    """[B, table_len] slot of the sequence that each page begins with; `NOWHERE` where unused."""
    write_slots: Ints
    """[B, T] flat slot (page * page_size + offset) of each new token, or [B, 1] the slot a recurrent state is written
    to; out of range for padding, so that the write is dropped."""
    copies: Ints
    """[C, 2] (source, destination) pages to copy before the step reads or writes; C is 0 in most steps."""
    starts: Ints
    """[B] slots already stored of each sequence in this class; `Plan.starts` where nothing was compacted."""
    valid: Bools | None = None
    """[B, table_len, page_size] which slots of the listed pages may be read; None: all that `starts` and masks
    allow."""
    prompts: Ints | None = None
    """[B] tokens of each sequence's prompt, whose queries read every page of a class that otherwise selects; 0 where
    nobody said. None: prompts are read as everything else is."""


class Plan(NamedTuple):
    """What the host decided for one step."""

    starts: Ints
    """[B] tokens already computed of each sequence: the position of its first new token."""
    counts: Ints
    """[B] new tokens of each sequence in this step, at most T; the rest of a row is padding."""
    classes: tuple[ClassPlan, ...]

    @property
    def has_copies(self) -> bool:
        """Whether pages must be copied before the step."""
        return any(len(plan.copies) for plan in self.classes)

    def with_prompts(self, prompt_len: int) -> "Plan":
        """The plan of sequences that all have a prompt of so many tokens, where it matters."""
        lens = np.full(len(self.starts), prompt_len, np.int32)
        classes = (mine if mine.prompts is None else mine._replace(prompts=lens) for mine in self.classes)
        return self._replace(classes=tuple(classes))

    def without_copies(self) -> "Plan":
        """The plan of the step alone, once its copies are done: its shapes do not depend on them."""
        none = np.zeros((0, 2), np.int32)
        return self._replace(classes=tuple(plan._replace(copies=none) for plan in self.classes))


class Swap(NamedTuple):
    """Pages to move between device and host, [n, 2] (device page, host page) for every class; done before the next
    step."""

    classes: tuple[Ints, ...]


class Seals(NamedTuple):
    """Full pages to seal before the next step: [n, 2] (open page, sealed page) for every class of open pages, none for
    the others. All are read before the open ones are written again."""

    classes: tuple[Any, ...]


def pairs(pages: Sequence[tuple[int, int]]) -> Ints:
    """Pairs of pages as an array [n, 2]."""
    return np.array(pages, np.int32).reshape(-1, 2)


class ClassCompaction(NamedTuple):
    """One state class of a compaction of B sequences: which of its slots stay is the device's choice, how many is not.

    All sources are read before a destination is written: a page may be both. Rows of a class that stays exact are
    empty. Of statistics, `pages` is the slot that a sequence's are read from and `destinations` where they are written,
    both [B, 1]; out of range for rows that are not compacted.
    """

    pages: Ints
    """[B, N] the pages that hold a sequence's slots, in their order; unused entries are 0."""
    destinations: Ints
    """[B, M] the pages that the kept slots fill from the first on; unused entries are out of range, so the write is
    dropped."""
    stored: Ints
    """[B] slots stored before."""
    keep: Ints
    """[B] slots stored from now on."""


class Compaction(NamedTuple):
    """Sequences to shorten before the next step, a row each."""

    classes: tuple[ClassCompaction, ...]
    seeds: Ints
    """[B] what random choices are drawn from: the same seed, length and layer draw the same."""
    lengths: Ints
    """[B] tokens of each sequence."""


type Saved = Plan | Compaction | Seals
"""What a replay needs, in the order in which the device did it."""


def save_plans(path: Path, plans: Sequence[Saved]) -> None:
    """Writes plans, compactions and sealings, in their order, as one compressed npz file of integer arrays."""
    if not plans:
        raise ValueError("plans = []: there is nothing to save")
    arrays: dict[str, Any] = {}
    for step, plan in enumerate(plans):
        for name in plan._fields:
            if name != "classes":
                arrays[f"{step}/{name}"] = getattr(plan, name)
        for index, of_class in enumerate(plan.classes):
            fields: dict[str, Any] = {"moves": of_class} if isinstance(of_class, np.ndarray) else of_class._asdict()
            arrays |= {f"{step}/{index}/{name}": array for name, array in fields.items() if array is not None}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_plans(path: Path) -> list[Saved]:
    """Reads what `save_plans` wrote. Raises ValueError for a file that holds anything else."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (zipfile.BadZipFile, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a file of plans ({type(error).__name__})") from None
    for name, array in arrays.items():
        wanted = np.bool_ if name.endswith("/valid") else np.int32
        if array.dtype != wanted:
            raise ValueError(f"{path}: {name} is {array.dtype}, not {np.dtype(wanted).name}: not a file of plans")
    plans = list[Saved]()
    while any(name.startswith(f"{len(plans)}/") for name in arrays):
        plans.append(_taken_out(path, arrays, len(plans)))
    if arrays or not plans:
        raise ValueError(f"{path}: {next(iter(arrays), 'nothing')} in it: not a file of plans")
    return plans


def _taken_out(path: Path, arrays: dict[str, Any], step: int) -> Saved:
    """One plan, compaction or sealing, whose arrays are taken out of `arrays`."""
    if f"{step}/0/moves" in arrays:
        numbers = range(sum(name.startswith(f"{step}/") for name in arrays))
        return Seals(tuple(arrays.pop(f"{step}/{number}/moves", pairs([])) for number in numbers))

    def fields(prefix: str, names: Sequence[str], optional: Sequence[str] = ()) -> list[Any]:
        if missing := [name for name in names if f"{prefix}/{name}" not in arrays and name not in optional]:
            raise ValueError(f"{path}: step {step} lacks {missing[0]}: not a file of plans")
        return [arrays.pop(f"{prefix}/{name}", None) for name in names]

    is_compaction = f"{step}/seeds" in arrays
    of_class = ClassCompaction if is_compaction else ClassPlan
    of_rows = fields(str(step), ("seeds", "lengths") if is_compaction else ("starts", "counts"))
    classes = list[Any]()
    while f"{step}/{len(classes)}/pages" in arrays:
        classes.append(of_class(*fields(f"{step}/{len(classes)}", of_class._fields, ("valid", "prompts"))))
    if not classes:
        raise ValueError(f"{path}: step {step} has no class: not a file of plans")
    first, second = of_rows
    return Compaction(tuple(classes), first, second) if is_compaction else Plan(first, second, tuple(classes))
