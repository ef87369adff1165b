"""The nodes of the prefix index, and what they hold."""

from dataclasses import dataclass, field


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


@dataclass(eq=False, slots=True)
class Node:
    """One page of tokens behind its parent's; a root has no tokens."""

    parent: "Node | None"
    tokens: bytes
    key: bytes
    depth: int
    pages: list[CachedPage | None]
    children: int = 0
    resident_children: list[int] = field(default_factory=list)
    """Per class: how many children hold a page of it."""
    locks: int = 0
    """Sequences and hits whose path ends here."""
