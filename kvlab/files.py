"""Files that are there wholly or not at all, and locks that die with their process."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where what can be had again is kept: `kvlab` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvlab"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there wholly or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    if isinstance(content, str):
        temporary.write_text(content)
    else:
        temporary.write_bytes(content)
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented, with a final newline; NaN and infinities are refused."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


class LockHeld(RuntimeError):
    """Another process holds a lock; `owner` is its process id, as far as it said so."""

    def __init__(self, path: Path, owner: str):
        super().__init__(f"{path}: held by another process (pid {owner})")
        self.owner = owner


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file against other processes; the kernel lets go when this one dies, however it dies.

    Raises `LockHeld` at once if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise LockHeld(path, lock.read().strip() or "unknown") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock file now."""
    if not path.exists():
        return False
    with path.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
