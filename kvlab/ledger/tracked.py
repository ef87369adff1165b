"""What the ledger knows of one sequence."""

from dataclasses import dataclass, field

from kvlab.ledger.store import Holding
from kvlab.ledger.tokens import ITEM, TokenIds, encode
from kvlab.ledger.trie import CachedPage, Node
from kvlab.units import counted


@dataclass(eq=False, slots=True)
class Tracked:
    """One sequence: what it holds of each class. A hit is one without a name yet: the longest prefix of a prompt that
    can be read instead of computed, pinned until given to `Ledger.reserve` or `Ledger.unpin`."""

    holdings: list[Holding]
    path: list[Node] = field(default_factory=list)
    """In the index, from the root."""
    ids: bytearray | None = None
    """Of the tokens known so far; None: it publishes nothing, because it began without a lookup or was compacted."""
    prompt_len: int = 0
    junction: int = 0
    """Pages of the prompt that somebody computed, whether or not they are still resident."""
    length: int = 0
    num_new: int = 0
    """Tokens of the step in flight, and below the speculative ones among the slots that it reserved."""
    lookahead: int = 0
    compress_at: int | None = None
    """Tokens of the prompt, from which follows where it is to be compacted; None: nowhere."""
    room: int = 0
    """A step that ends here needs no page: `reserve` has nothing to do."""
    wake: int = 0
    """Below this length `commit` has nothing to free, copy or keep."""
    full: int = 0
    """Below this length it has nothing to publish."""
    rolling: list[CachedPage] = field(default_factory=list)
    """Recurrent states last published of the answer: the next replace them."""

    def learn(self, new_length: int, tokens: TokenIds) -> None:
        """Appends ids of accepted tokens. Raises ValueError unless every token's id is then known."""
        assert self.ids is not None
        known = len(self.ids) // ITEM + len(tokens)
        if known != max(self.prompt_len, new_length):
            stored = counted(new_length, "token")
            raise ValueError(f"tokens: {counted(known, 'id')} known, for {stored} stored: must be as many")
        self.ids += encode(tokens)
