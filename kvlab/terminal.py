"""Consoles on which data are never markup: no bracket is a style, no colon begins an emoji."""

from rich.console import Console
from rich.text import Text


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that writes strings, in tables too, as they are; of `width` columns where nobody is watching."""
    found = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if width is None or found.is_terminal:
        return found
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def as_is(text: object) -> Text:
    """What any console writes as it is."""
    return Text(str(text))
