"""Checkpoints behind one small class: orbax, atomic, the last n kept, always restored into an abstract tree."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kvlab.files import write_atomic
from kvlab.placement import Placement
from kvlab.typing import PyTree
from kvlab.units import counted


class CheckpointError(RuntimeError):
    """No checkpoint of a directory could be read; names each and what was wrong with it."""


class Checkpoints:
    """Numbered checkpoints of a pytree of arrays with a JSON note each. A save is visible only once it is complete."""

    def __init__(self, directory: Path, keep: int, placement: Placement | None = None):
        self.directory, self.placement = directory, placement or Placement()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

    def save(self, step: int, tree: PyTree, note: dict[str, Any]) -> None:
        """Writes checkpoint `step`; a process killed while writing leaves the earlier ones as they were."""
        if step not in self._manager.all_steps():
            items = ocp.args.Composite(tree=ocp.args.StandardSave(tree), note=ocp.args.JsonSave(note))
            self._manager.save(step, args=items)

    def restore(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Step, tree and note of the newest readable checkpoint; None when there is none at all.

        `like` gives structure, shapes and dtypes; every array lies whole where the placement says. A damaged checkpoint
        is named in a warning, removed, and the previous one used; raises `CheckpointError` when none of those present
        is readable.
        """
        whole = self.placement.sharding("")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), like)
        problems = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            items = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract), note=ocp.args.JsonRestore())
            try:
                restored = self._manager.restore(step, args=items)
            except Exception as error:  # orbax raises whatever its storage layers raise on damaged files
                problems.append(f"{self.directory / str(step)}: {type(error).__name__}: {str(error).splitlines()[0]}")
                warnings.warn(f"damaged checkpoint skipped: {problems[-1]}", RuntimeWarning, stacklevel=2)
                continue
            for damaged in [other for other in self._manager.all_steps() if other > step]:
                shutil.rmtree(self.directory / str(damaged), ignore_errors=True)
            if problems:
                self._manager.reload()
            return step, restored["tree"], restored["note"]
        if problems:
            raise CheckpointError("no readable checkpoint; " + "; ".join(problems))
        return None

    def close(self) -> None:
        """Releases orbax's resources."""
        self._manager.close()


def truncate_jsonl(path: Path, keep: int) -> None:
    """Keeps the first `keep` lines of a JSONL file, by atomic rename: rows after a checkpoint are written again."""
    lines = path.read_text().splitlines(keepends=True)[:keep] if path.exists() else []
    if len(lines) < keep:
        raise CheckpointError(f"{path}: {counted(len(lines), 'row')}, but the checkpoint was taken after {keep}")
    write_atomic(path, "".join(lines))
