"""Files that are there wholly or not at all."""

import json
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Writes a file so that it is there wholly or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented, with a final newline; NaN and infinities are refused."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
