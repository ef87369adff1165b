"""What somebody may have meant by a name that no field has."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any


def elsewhere(name: str, config: Mapping[str, Any]) -> list[str]:
    """Fields of a config, by dotted names, that end like a name which is not there: the same word in another section or
    layer, the word whose initials it is (lr), or the closest ones. Those of the name's own section go first, and alone
    where there are some."""
    section, _, last = name.rpartition(".")
    fields = dict(_fields(config, ""))
    words = set(fields.values())
    close = difflib.get_close_matches(last, words, n=2, cutoff=0.8)
    initials = {word for word in words if "_" in word and last == "".join(part[:1] for part in word.split("_"))}
    for meant in ({last}, initials, set(close)):
        found = [field for field, word in fields.items() if word in meant]
        own = [field for field in found if section and field.startswith(f"{section.split('.')[0]}.")]
        if found:
            return own or found
    return []


def _fields(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Every field with its last word."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", str(name)
