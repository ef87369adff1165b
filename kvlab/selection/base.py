"""What a selection is: which stored pages a query reads. A method is a file of its own.

Every token stays. A method notes something of each page (its index), and scores pages by it for each query; the
framework keeps the index, chooses, and hands the kernel a list of pages for each head. So the bytes held grow by the
index, and the bytes read fall.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from jax import Array
from jaxtyping import Bool, Float, Int32

from kvlab.ledger.reading import Reading
from kvlab.ledger.states import ArraySpec, LatentState, State, TokenState
from kvlab.schema import ConfigError, Schema, choice, integer, real

PREFILL = ("dense", "sparse")


@dataclass(frozen=True)
class Candidates:
    """One step's queries of a layer, and the pages that they may read."""

    queries: Float[Array, "B T K G D"]
    """Scaled and rotated, in float32, in groups that share a KV head: the score of key k is queries @ k, soft cap
    apart."""
    positions: Int32[Array, "B T"]
    """Token positions."""
    index: dict[str, Float[Array, "B N K D"]]
    """What was noted of each page, in float32. Of a page that no query may read it may be anything."""
    numbers: Int32[Array, "B N"]
    """Which page of its sequence each is, from 0 on; beyond every sequence where there is none."""
    layer: int
    weigh: Callable[[], Array]
    """() -> [B, T, K, G, N] the share of each query's attention that every page has, if it reads all of them. Reads
    all keys."""


@dataclass(frozen=True)
class Selection(Schema, abc.ABC):
    """The base of every method. A query reads a `fraction` of its sequence's pages, rounded down, or `pages` of them
    where that is given. The first `first_pages` (sinks) and the last `last_pages` of them are always read, and count.

    The first `dense_layers` of the layers that could select read everything. `prefill` "dense" has a prompt's queries
    read everything too, so that only what is decoded selects; with "sparse" every query selects for itself, and what
    comes out depends on neither chunks nor steps.
    """

    name: ClassVar[str] = ""
    reads_keys: ClassVar[bool] = False
    """Whether choosing reads all keys, as only a control may."""

    pages: int | None = integer(None, 1, 1 << 20, optional=True)
    fraction: float = real(0.25, 0, 1, open_low=True)
    dense_layers: int = integer(2, 0, 1024)
    first_pages: int = integer(1, 0, 65536)
    last_pages: int = integer(1, 1, 65536)
    prefill: str = choice("dense", PREFILL)

    def cross_check(self) -> None:
        forced = self.first_pages + self.last_pages
        if self.pages is not None and self.pages < forced:
            said = f"first_pages = {self.first_pages} and last_pages = {self.last_pages}"
            raise ConfigError("pages", self.pages, f"must be at least {forced}, which {said} always read")

    @abc.abstractmethod
    def score(self, candidates: Candidates) -> Float[Array, "B T K N"]:
        """What each page is worth to each query; the highest are read, the newer one where two are equal. Traced."""

    def arrays(self, num_kv_heads: int, key_dim: int, dtype: str) -> tuple[ArraySpec, ...]:
        """What is noted of each page; nothing: scores need no index."""
        return ()

    def note(self, keys: Float[Array, "*pages K S D"], used: Bool[Array, "*pages S"], dtype: Any) -> dict[str, Array]:
        """The index [..., K, D] of pages of keys as they are stored, of which the `used` slots hold one. Slots that
        hold none are zero. Traced; called only where there is an index."""
        raise NotImplementedError

    def skips(self, state: State) -> str:
        """Why all of a state is read; empty: pages of it are selected."""
        if not state.per_token:
            return "one state a sequence has no pages"
        if state.span is not None:
            return "a window reads little by itself"
        if not isinstance(state, TokenState | LatentState):
            return "it selects by itself"
        return ""

    def reading(self, page_size: int) -> Reading:
        """How many pages are read of a sequence."""
        return Reading(
            page_size,
            pages=self.pages,
            fraction=None if self.pages is not None else self.fraction,
            first=self.first_pages,
            last=self.last_pages,
            reads_keys=self.reads_keys,
            dense_prompts=self.prefill == "dense",
        )

    def of_state(self, state: State, page_size: int) -> State:
        """A state whose pages are selected, with what is noted of them."""
        assert isinstance(state, TokenState | LatentState)
        heads, key_dim = state.arrays[0].shape
        index = self.arrays(heads, key_dim, state.dtype)
        return replace(state, reading=self.reading(page_size), index=index)

    def plain(self) -> dict[str, Any]:
        """As YAML has it."""
        return {"type": self.name, **{item.name: getattr(self, item.name) for item in fields(self)}}
