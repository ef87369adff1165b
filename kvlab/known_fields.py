"""The names of fields by the choices that were made, as they were composed before: completing another is then no matter
of seconds. Standard library alone; `kvlab.lab.completion` fills it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvlab.files import cache_folder, shipped_folder, write_atomic
from kvlab.outside import source_files

_PACKAGE = Path(__file__).resolve().parent


def names_below(command: str, finished: Sequence[str], typed: str) -> list[str] | None:
    """What completes the dotted name that is being typed; None: these choices were not composed before, by this
    version, or it is no field of a section."""
    place, dot, last = typed.rpartition(".")
    if not dot or "=" in typed or not typed[0].isalpha():
        return None
    try:
        node: Any = json.loads(_path(command, finished).read_text())
        for part in place.split("."):
            node = node[part]
        return sorted(f"{place}.{name}{'.' if node[name] else '='}" for name in node if name.startswith(last))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(command: str, finished: Sequence[str], composed: dict[str, Any]) -> None:
    """Keeps the names of a composed configuration; silently not where nothing can be written."""
    path = _path(command, finished)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(_names(composed)))
    except OSError:
        pass


def _names(node: dict[str, Any]) -> dict[str, Any]:
    return {str(name): _names(value) if isinstance(value, dict) else {} for name, value in node.items()}


def _path(command: str, finished: Sequence[str]) -> Path:
    """By the command, the words before, and when each file of the code and of the groups was changed: a package may
    be exchanged for one that is older than the newest of them."""
    files = [*_PACKAGE.rglob("*.py"), *shipped_folder("configs").rglob("*.yaml"), *source_files()]
    changed = sum(path.stat().st_mtime_ns for path in files)
    said = json.dumps([str(_PACKAGE), command, list(finished), changed, len(files)])
    return cache_folder() / "fields" / f"{hashlib.sha256(said.encode()).hexdigest()[:24]}.json"
