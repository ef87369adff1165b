"""Where text comes from: a file, a folder, works of the library, or the source of Python's own standard library, which
is present on every machine. Each is cut into splits that share nothing."""

import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlab.files import home_expanded, leads_somewhere
from kvlab.schema import ConfigError, text
from kvlab.tasks import library

type Bytes = npt.NDArray[np.uint8]

SPLITS = {"validation": (0, 8), "test": (8, 16), "train": (16, 256)}
"""Which files of a folder go where: the first byte of the SHA-256 of a file's relative name lies in this half-open
interval."""


def path_field() -> Any:
    """The field `path` of a task's config."""
    return text(
        None, legal="a file, a folder, shakespeare, or shakespeare:hamlet+lear for works by name", optional=True
    )


def check_path(path: str | None) -> None:
    """Raises ConfigError, field `path`, for what is neither there nor in the library. Nothing is read or fetched."""
    if path is None:
        return
    if library.is_named(path):
        library.names_of(path)
    elif not leads_somewhere(path):
        legal = "must be an existing file or folder, shakespeare for works of the library, or null for the standard"
        raise ConfigError("path", path, f"{legal} library")


def check_pattern(pattern: str) -> None:
    """Raises ConfigError, field `pattern`, for what does not match below a folder alone."""
    parts = PurePosixPath(pattern).parts
    is_below = bool(parts) and not pattern.startswith("/") and ".." not in parts and "\0" not in pattern
    if not is_below or any("**" in part and part != "**" for part in parts):
        legal = "must match names of files below the folder, such as *.txt or docs/**/*.md; no .. and no leading /"
        raise ConfigError("pattern", pattern, legal)


@lru_cache(maxsize=8)
def read_splits(path: str | None, pattern: str) -> tuple[dict[str, Bytes], str]:
    """The splits of a corpus and their SHA-256, read once a process. Raises ConfigError for works that cannot be
    had."""
    if path is not None and library.is_named(path):
        parts = _split_each(library.read_works(path))
    else:
        root = home_expanded(path) if path else Path(sysconfig.get_paths()["stdlib"])
        parts = _split_each([root.read_bytes()]) if root.is_file() else _split_folder(root, pattern)
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(parts[name].tobytes())
    return parts, digest.hexdigest()


@lru_cache(maxsize=8)
def read_whole(path: str | None, pattern: str) -> Bytes:
    """A corpus in one piece: works as they are named, one after the other; what else there is split after split."""
    if path is not None and library.is_named(path):
        return np.frombuffer(b"\n".join(library.read_works(path)), np.uint8)
    parts, _ = read_splits(path, pattern)
    return np.concatenate([parts[name] for name in ("train", "validation", "test")])


def _split_each(texts: list[bytes]) -> dict[str, Bytes]:
    """Each text by position: 90% train, then validation, then test."""
    parts: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    for data in texts:
        first, second = int(len(data) * 0.9), int(len(data) * 0.95)
        for name, part in (("train", data[:first]), ("validation", data[first:second]), ("test", data[second:])):
            parts[name].append(part)
    return {name: np.frombuffer(b"\n".join(pieces), np.uint8) for name, pieces in parts.items()}


def _split_folder(root: Path, pattern: str) -> dict[str, Bytes]:
    """Files in sorted order, each wholly in one split by the hash of its relative name; tests and installed packages
    are left out, so that the standard library means the library."""
    parts: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root).as_posix()
        if not path.is_file() or {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(
            name.split("/")
        ):
            continue
        place = hashlib.sha256(name.encode()).digest()[0]
        owner = next(split for split, (low, high) in SPLITS.items() if low <= place < high)
        parts[owner].append(path.read_bytes())
    return {name: np.frombuffer(b"\n".join(files), np.uint8) for name, files in parts.items()}
