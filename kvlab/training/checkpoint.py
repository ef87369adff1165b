"""Checkpoints behind one small class: orbax, atomic, the last n kept, always restored into an abstract tree.

Each carries the SHA-256 of its arrays and of its note: what comes back is what was saved, to the bit, or is named.
"""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvlab.files import write_atomic
from kvlab.placement import Placement
from kvlab.typing import PyTree
from kvlab.units import counted

FORMAT = 2
"""The version of what a checkpoint holds. Those of version 1 said neither it nor a digest."""
MAX_REASON = 300
"""Characters of what storage layers say of a damaged file that are passed on."""


class CheckpointError(RuntimeError):
    """No checkpoint of a directory could be read; names each and what was wrong with it."""


def _orbax() -> Any:
    """Imported where checkpoints are read or written: whoever only reads results does without."""
    import orbax.checkpoint

    return orbax.checkpoint


def tree_sha256(tree: PyTree) -> str:
    """SHA-256 over names and bytes of every leaf: two trees of arrays are equal iff their digests are."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


class Checkpoints:
    """Numbered checkpoints of a pytree of arrays with a JSON note each. A save is visible only once it is complete."""

    def __init__(self, directory: Path, keep: int, placement: Placement | None = None):
        self.directory, self.placement = directory, placement or Placement()
        ocp = _orbax()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

    def save(self, step: int, tree: PyTree, note: dict[str, Any]) -> None:
        """Writes checkpoint `step`; a process killed while writing leaves the earlier ones as they were."""
        if step not in self._manager.all_steps():
            stated = {"format": FORMAT, "sha256": _digest(tree, note), "note": note}
            ocp = _orbax()
            items = ocp.args.Composite(tree=ocp.args.StandardSave(tree), note=ocp.args.JsonSave(stated))
            self._manager.save(step, args=items)

    def restore(self, like: PyTree, sha256: str | None = None) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Step, tree and note of the newest checkpoint that is whole; None when there is none at all.

        `like` gives structure, shapes and dtypes; every array lies whole where the placement says. Whole is what has
        the digest that the checkpoint states, or the tree's own, `sha256`, where the caller knows it: then a checkpoint
        of any version is taken. One that is not is removed, and a warning names it and the previous one, which is used.
        Raises `CheckpointError` when none of those present is whole.
        """
        whole = self.placement.sharding("")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), like)
        problems = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                tree, note = self._read(step, abstract, sha256)
            except CheckpointError as error:
                problems.append(f"{self.directory / str(step)}: {error}")
                continue
            if problems:
                warnings.warn(self._skipped(problems, step), RuntimeWarning, stacklevel=2)
                for damaged in [other for other in self._manager.all_steps() if other > step]:
                    shutil.rmtree(self.directory / str(damaged), ignore_errors=True)
                self._manager.reload()
            return step, tree, note
        if problems:
            raise CheckpointError("no readable checkpoint; " + "; ".join(problems))
        return None

    def _skipped(self, problems: list[str], step: int) -> str:
        return f"damaged checkpoint skipped: {'; '.join(problems)}; {self.directory / str(step)} is used"

    def _read(self, step: int, abstract: PyTree, sha256: str | None) -> tuple[PyTree, dict[str, Any]]:
        """A checkpoint's tree and note. Raises `CheckpointError` with what is wrong with it."""
        ocp = _orbax()
        items = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract), note=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
            tree, stated = restored["tree"], restored["note"]
        except Exception as error:  # orbax raises whatever its storage layers raise on damaged files
            first = str(error).partition("\n")[0][:MAX_REASON]
            raise CheckpointError(f"{type(error).__name__}: {first}") from error
        if sha256 is not None:
            if tree_sha256(tree) != sha256:
                raise CheckpointError("its arrays are not those that were saved")
            return tree, {}
        if not isinstance(stated, dict) or stated.get("format") != FORMAT:
            version = stated.get("format", 1) if isinstance(stated, dict) else 1
            raise CheckpointError(f"is of version {version!r:.40} of the format; this kvlab reads version {FORMAT}")
        note = stated.get("note")
        if not isinstance(note, dict) or _digest(tree, note) != stated.get("sha256"):
            raise CheckpointError("arrays or note are not those that were saved: their SHA-256 differs")
        return tree, note

    def close(self) -> None:
        """Releases orbax's resources."""
        self._manager.close()


def _digest(tree: PyTree, note: dict[str, Any]) -> str:
    """SHA-256 of a whole checkpoint."""
    return hashlib.sha256(f"{tree_sha256(tree)} {json.dumps(note, sort_keys=True)}".encode()).hexdigest()


def truncate_jsonl(path: Path, keep: int) -> None:
    """Keeps the first `keep` lines of a JSONL file, by atomic rename: rows after a checkpoint are written again. Raises
    `CheckpointError` when there are fewer, or one of them is damaged."""
    lines = path.read_bytes().splitlines(keepends=True)[:keep] if path.exists() else []
    if len(lines) < keep:
        raise CheckpointError(f"{path}: {counted(len(lines), 'row')}, but the checkpoint was taken after {keep}")
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError:
            raise CheckpointError(f"{path}: row {number} is damaged") from None
    write_atomic(path, b"".join(lines))
