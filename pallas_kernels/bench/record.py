"""A file of JSON lines that loses nothing: each is on the disk before the next piece of work ends.

The first line is the header. It tells on what everything was measured, and nothing measured on anything else is added.
Every other line is a dict with `kind` and `name`. What became of a piece of work is its `outcome`:

    done          it answered, and ended with status 0
    failed        it ended by itself without an answer, or with another status
    timeout       it was killed at its own limit
    cut           it was killed as the run's time was up
    skipped       it was not begun, as too little time was left
    interrupted   it was killed as the run was interrupted
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]
SETTLED = ("done", "failed")
"""Outcomes after which a piece is not run again."""


class Record:
    """The file at `path`, open for more lines.

    `identity` is what all lines have in common: device, versions, code, size. `about` is told in the header besides. A
    new file must not exist yet. To `resume` is to read what is there and to append to it. Raises ValueError for a file
    that exists where none should, has no header, has a line that is no JSON (but for a last one that was torn), or has
    another identity."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], about: Mapping[str, Any] | None = None, *, resume: bool = False
    ):
        self.path, self.lines = path, list[Line]()
        path.parent.mkdir(parents=True, exist_ok=True)
        begins = not path.exists() or not path.stat().st_size
        if not resume and not begins:
            raise ValueError(f"path = {path}: exists already; resume it, or name a new file")
        if not begins:
            self.lines = read(path)
            _check_identity(path, self.lines[0], identity)
            _mend(path)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if begins:
            self.keep({"kind": "header", "name": "", **identity, **(about or {})})
        else:
            self.keep({"kind": "resumed", "name": "", **(about or {})})

    @property
    def header(self) -> Line:
        """The first line."""
        return self.lines[0]

    def keep(self, line: Mapping[str, Any]) -> None:
        """Appends a line. It is on the disk when this returns."""
        self.lines.append(finite(dict(line)))
        left = (json.dumps(self.lines[-1], allow_nan=False) + "\n").encode()
        while left:  # a full disk takes a part, and then raises
            left = left[os.write(self._file, left) :]
        os.fsync(self._file)

    def close(self) -> None:
        """No line can be kept any more."""
        os.close(self._file)


def read(path: Path) -> list[Line]:
    """All lines of a record, the header first; a last one that was torn is left out. Raises ValueError naming a line
    that is no JSON object, or where there is no header."""
    found = list[Line]()
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, 1):
        try:
            found.append(_line(text))
        except ValueError:
            if number < len(texts):
                raise ValueError(f"{path}: line {number} is no JSON object: {text[:60]!r}") from None
    if not found or found[0].get("kind") != "header":
        raise ValueError(f"{path}: the first line must be a header, of kind 'header'")
    return found


def latest(lines: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """The line that counts of every kind and name: the last one of those that know most. One that is done knows more
    than one that answered something before it ended, and that more than one without an answer."""
    found: dict[tuple[str, str], Line] = {}
    for line in lines:
        key = line["kind"], line["name"]
        if key not in found or _known(line) >= _known(found[key]):
            found[key] = line
    return found


def _known(line: Line) -> int:
    return 2 if line.get("outcome") == "done" else int("answer" in line)


def finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON has not: None in their place."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(text: bytes) -> Line:
    line = json.loads(text)
    if not isinstance(line, dict) or not {"kind", "name"} <= set(line):
        raise ValueError("no object with kind and name")
    return line


def _check_identity(path: Path, header: Line, identity: Mapping[str, Any]) -> None:
    """A record is of one device, one code, one set of versions."""
    for name, value in finite(dict(identity)).items():
        if header.get(name) != value:
            raise ValueError(
                f"{name} = {value!r}: {path} cannot be resumed, as it was begun with {header.get(name)!r}; "
                "name a new file"
            )


def _mend(path: Path) -> None:
    """A last line that was torn is cut off; one that only lacks its end gets it."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole == len(data):
        return
    try:
        _line(data[whole:])
    except ValueError:
        os.truncate(path, whole)
        return
    with path.open("ab") as file:
        file.write(b"\n")
