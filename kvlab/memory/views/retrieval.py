"""A retrieval memory: a step reads a small index of every token, and then only the tokens that it selects.

Each query takes the `num_selected` visible tokens whose index keys have the highest score for it
(`kvlab.memory.lightning`), the newer one where two are equal, or as many tokens in whole blocks. So what a query
selects depends on neither pages nor chunks; what it reads are the pages they lie in.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kvlab.memory.lightning import IndexQueries, WarmUp, index_scores, select, select_blocks
from kvlab.memory.pools import stored
from kvlab.memory.views.base import PlannedTokens
from kvlab.memory.views.paged import attend_pages, lists_of
from kvlab.typing import HeadOutputs, Positions, Queries, SinkLogits
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.visible import NOWHERE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedRetrieval(PlannedTokens):
    """Pages of keys, values, and an index [P, 1, page, index_dim]: `append(keys=..., values=..., index=...)`."""

    def attend(
        self,
        queries: Queries,
        positions: Positions,
        *,
        index_queries: IndexQueries,
        warm_up: WarmUp | None = None,
        sink_logits: SinkLogits | None = None,
    ) -> tuple[HeadOutputs, Self]:
        """As `TokenView.attend`, over what `index_queries` select. Nothing is trained through pages, so there is no
        `warm_up`."""
        batch, num_tokens, num_heads, dim = queries.shape
        lists = lists_of(self.plan)
        index = self.pool["index"][lists.table][:, :, 0]  # [B, num_pages, page, index_dim]
        slots = lists.starts[:, :, None] + jnp.arange(index.shape[2], dtype=jnp.int32)[None, None, :]
        slots = slots.reshape(batch, 1, -1)
        seen = self.state.visible.sees(self.query_slots(num_tokens)[:, :, None], slots)
        seen = seen & (slots < self.slot_lens[:, None, None])
        if lists.valid is not None:
            seen = seen & lists.valid.reshape(batch, 1, -1)
        scores = index_scores(index_queries, index.reshape(batch, -1, index.shape[3]))
        selected = selected_by(self.state, scores, seen)

        def by_query(x: Array) -> Array:
            return jnp.broadcast_to(x[:, None], (batch, num_tokens, *x.shape[1:])).reshape(-1, *x.shape[1:])

        # Every query has lists of its own: one of the step's tokens is a sequence of one.
        alone = replace(
            self,
            starts=self.query_slots(num_tokens).reshape(-1),
            counts=(jnp.arange(num_tokens, dtype=jnp.int32)[None, :] < self.counts[:, None])
            .reshape(-1)
            .astype(jnp.int32),
        )
        chosen = selected.reshape(batch * num_tokens, *self.plan.pages.shape[1:], -1)
        narrow = _narrowed(self.state, by_query(lists.table), by_query(lists.starts), chosen)
        pages = Pages(stored(self.state, self.pool, "keys"), stored(self.state, self.pool, "values"))
        rows = queries.reshape(-1, 1, num_heads, dim)
        outputs = attend_pages(alone, rows, pages, narrow, sink_logits)
        return outputs.reshape(batch, num_tokens, num_heads, -1), self


def selected_by(state: Any, scores: Float[Array, "B T S"], seen: Bool[Array, "B T S"]) -> Bool[Array, "B T S"]:
    """Which tokens each query selects of a `RetrievalState`."""
    if state.index_block:
        return select_blocks(scores, seen, state.num_selected, state.index_block)
    return select(scores, seen, state.num_selected)


def _narrowed(state: Any, table: Array, starts: Array, chosen: Array) -> Lists:
    """Lists [R, n] of the pages that hold a chosen slot [R, num_pages, page], in their order: at most one for each
    selected token. Where blocks are whole pages they are at most num_selected // page, and no slot is masked."""
    page_size = chosen.shape[2]
    are_whole = state.index_block > 0 and state.index_block % page_size == 0
    most = state.num_selected // page_size if are_whole else state.num_selected
    is_used = chosen.any(axis=2)
    order = jnp.argsort(~is_used, axis=1, stable=True)[:, :most]
    used = jnp.take_along_axis(is_used, order, axis=1)
    table = jnp.where(used, jnp.take_along_axis(table, order, axis=1), 0)
    starts = jnp.where(used, jnp.take_along_axis(starts, order, axis=1), NOWHERE)
    return Lists(table, starts, None if are_whole else jnp.take_along_axis(chosen, order[:, :, None], axis=1))
