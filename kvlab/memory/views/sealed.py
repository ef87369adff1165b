"""Open pages in the model's type beside sealed ones, which are quantised whole (KIVI, arXiv 2402.02750). A step writes
open pages only; attention reads both, and joins the two by their log-sum-exps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

from kvlab.ledger.memory_states import SealedState
from kvlab.ledger.states import State
from kvlab.memory.pools import Pool, stored
from kvlab.memory.views.base import OverTokens, Planned
from kvlab.memory.views.dealt import merged
from kvlab.memory.views.paged import attended, beside_sinks, lists_of
from kvlab.typing import HeadOutputs, Positions, Queries, SinkLogits
from pallas_kernels.formats import Quantised, Scheme, kivi
from pallas_kernels.paged_attention import Pages, chunk_positions
from pallas_kernels.sealing import allocated, seal_into
from pallas_kernels.visible import CAUSAL


def schemes(state: SealedState) -> tuple[Scheme, Scheme]:
    """How keys and values are sealed."""
    return kivi(f"int{state.key_bits}", f"int{state.value_bits}", state.group)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SealedPages(Planned):
    """Sealed pages: read, never written by a step."""

    @classmethod
    def check(cls, state: State) -> None:
        pass

    @classmethod
    def allocate(cls, state: Any, num_pages: int, page_size: int) -> Pool:
        of_keys, of_values = schemes(state)
        keys = allocated((num_pages, state.num_kv_heads, page_size, state.key_dim), of_keys)
        values = allocated((num_pages, state.num_kv_heads, page_size, state.value_dim), of_values)
        return _as_pool(Pages(keys, values))


def pages_of(state: SealedState, pool: Pool) -> Pages:
    """A pool of sealed pages as kernels take it."""
    of_keys, of_values = schemes(state)
    return Pages(_quantised(pool, "keys", of_keys), _quantised(pool, "values", of_values))


_NAMES = ("keys", "values")


def _quantised(pool: Pool, name: str, scheme: Scheme) -> Quantised:
    scales, zeros = pool[f"{name}_scale"], pool[f"{name}_zero"]
    return Quantised(pool[name], scales, scheme.format, scheme.per, scheme.group, zeros)


def _as_pool(pages: Pages) -> Pool:
    """The arrays of sealed pages by the names that their state gives them."""
    pool = dict[str, Any]()
    for name, held in zip(_NAMES, pages.pools, strict=True):
        assert isinstance(held, Quantised)
        pool |= {name: held.payload, f"{name}_scale": held.scales, f"{name}_zero": held.zeros}
    return pool


def seal(state: SealedState, pool: Pool, open_state: Any, open_pool: Pool, moves: Array) -> Pool:
    """A pool of sealed pages with the open ones of moves [n, 2] (open page, sealed page) in it; a sealed page out of
    range drops the move."""
    full = Pages(stored(open_state, open_pool, "keys"), stored(open_state, open_pool, "values"))
    return _as_pool(seal_into(pages_of(state, pool), full, moves[:, 0], moves[:, 1]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SealedTokens(OverTokens):
    """One state of a mixer in two parts: `tokens`, the open pages, and `sealed`."""

    tokens: Any
    sealed: Any

    @classmethod
    def of_parts(cls, parts: Mapping[str, Any]) -> Self:
        """From the views of the parts."""
        return cls(parts[""], parts["sealed"])

    def parts(self) -> dict[str, Any]:
        """The views of the parts, by name."""
        return {"": self.tokens, "sealed": self.sealed}

    def append(self, **tokens: Array) -> Self:
        return replace(self, tokens=self.tokens.append(**tokens))

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        tokens, sealed = self.tokens, self.sealed
        open_pages = Pages(stored(tokens.state, tokens.pool, "keys"), stored(tokens.state, tokens.pool, "values"))
        newer = _attend(queries, open_pages, tokens)
        older = _attend(queries, pages_of(sealed.state, sealed.pool), sealed)
        outputs, log_sums = merged(newer, older)
        return beside_sinks(outputs.astype(queries.dtype), log_sums, sink_logits), self


def _attend(queries: Queries, pages: Pages, view: Any) -> tuple[Array, Array]:
    """Outputs and log-sum-exps of a step's queries over one part; of what is sealed a query sees everything."""
    num_tokens = queries.shape[1]
    if num_tokens > 1:
        places = chunk_positions(view.starts, view.counts, num_tokens)
    else:
        places = view.starts[:, None] + jnp.zeros((1, 1), jnp.int32), view.starts + view.counts
    return attended(view.state, queries, pages, lists_of(view.plan), *places, visible=CAUSAL)
