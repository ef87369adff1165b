"""The nodes of the prefix index, and what they hold."""

from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class CachedPage:
    """A page that the index holds, with what policies want to know of it. `segment`, `credit` are the policies' own."""

    node: "Node"
    state_class: int
    page: int
    num_bytes: int
    start: int
    """First token that this page saves computing: its own first, or for a recurrent state the sequence's."""
    end: int
    created: int = 0
    last_used: int = 0
    uses: int = 1
    segment: int = 0
    credit: float = 0.0
    loose: bool = False
    queued: int | None = None
    stamp: int = 0

    @property
    def key(self) -> bytes:
        """The chain's digest of the tokens up to the page's end."""
        return self.node.key


class Node:
    """One page of tokens behind its parent's; a root has no tokens."""

    __slots__ = ("children", "depth", "key", "locks", "pages", "parent", "resident_children", "tokens")

    def __init__(self, parent: "Node | None", tokens: bytes, key: bytes, depth: int, num_classes: int):
        self.parent, self.tokens, self.key, self.depth = parent, tokens, key, depth
        self.pages: list[CachedPage | None] = [None] * num_classes
        self.children = 0
        self.resident_children = [0] * num_classes
        """Per class: how many children hold a page of it."""
        self.locks = 0
        """Sequences and hits whose path ends here."""
