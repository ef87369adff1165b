"""Files that are there wholly or not at all, and locks that die with their process."""

import fcntl
import json
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

PATIENCE_S = 0.2
"""Seconds for which a lock is tried."""


def shipped_folder(name: str) -> Path:
    """`configs` or `experiments`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def cache_folder() -> Path:
    """Where what can be had again is kept: `kvlab` in the user's cache folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvlab"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"kvlab-{os.getuid()}"


def home_expanded(path: str | Path) -> Path:
    """A path in which a leading ~ is the user's home; as it is where there is no home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def leads_somewhere(path: str | Path) -> bool:
    """Whether there is a file or folder at the user's path; none is where a name is longer than any can be."""
    return os.path.exists(home_expanded(path))


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there wholly or not at all, also where the machine stops: file and folder are
    synced. Several processes may write the same one; the last wins. A link in its place is replaced, not followed."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What was made, renamed or removed in a folder stays so where the machine stops."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems do not sync folders
        pass
    finally:
        os.close(descriptor)


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file. Raises OSError for what is no file, such as a pipe, which might never end, and ValueError
    for one of more than `max_bytes`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path}: is no regular file")
        if status.st_size > max_bytes:
            raise ValueError(f"{path}: of {status.st_size:,} bytes, where at most {max_bytes:,} are read")
        return file.read()


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

    Raises `LockHeld` if another process holds it, and still does after `PATIENCE_S`: `is_locked` may have looked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        until = time.monotonic() + PATIENCE_S
        while not _taken(lock, fcntl.LOCK_EX):
            if time.monotonic() > until:
                lock.seek(0)
                raise LockHeld(path, lock.read(40).strip() or "unknown")
            time.sleep(PATIENCE_S / 20)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock file now."""
    if not path.exists():
        return False
    with path.open() as lock:
        return not _taken(lock, fcntl.LOCK_SH)  # shared: those that look do not see each other


def _taken(lock: TextIO, how: int) -> bool:
    """Takes a lock, or says that another process holds it."""
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
