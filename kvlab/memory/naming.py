"""What a memory does to its tokens, in words: the part of a name that no label leaves out."""

from collections.abc import Mapping
from typing import Any

FULL: dict[str, tuple[str | None, ...]] = {
    "compression": (None, "none"),
    "format": (None, "model"),
    "selection": (None, "none", "all"),
}
"""What a memory says that stores all tokens, as they were computed, and reads all of them; null: it says nothing."""


def name_of(section: Mapping[str, Any]) -> str | None:
    """The `type` or `name` of a section, by which its choice is called; None where it has neither."""
    found = section.get("type", section.get("name"))
    return found if isinstance(found, str) else None


def choice_of(value: Any) -> Any:
    """The name of a choice, which may be a section of its own."""
    return name_of(value) or "unnamed" if isinstance(value, Mapping) else value


def words_of(memory: Mapping[str, Any]) -> list[str]:
    """What a memory, as plain data, drops, stores in fewer bits and reads in part: its compression with the budget, its
    format, its selection, as in "snapkv 0.5", "int8", "quest". None for a memory that holds and reads everything."""
    chosen = {kind: choice_of(memory.get(kind)) for kind in FULL}
    words = {kind: str(choice) for kind, choice in chosen.items() if choice not in FULL[kind]}
    if "compression" in words and memory.get("budget") is not None:
        words["compression"] += f" {memory['budget']}"
    return list(words.values())
