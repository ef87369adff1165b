"""A retrieval memory: a step reads a small index of every token, and then only the tokens that it selects.

Each query takes the `num_selected` visible tokens whose index entries have the largest product with its own, the
earlier one where two are equal. So what a query selects depends on neither pages nor chunks; what it reads are the
pages they lie in.
"""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kvlab.memory.pools import stored
from kvlab.memory.views.base import PlannedTokens
from kvlab.memory.views.paged import attend_pages, lists_of
from kvlab.typing import HeadOutputs, IndexQueries, Positions, Queries, SinkLogits
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
        sink_logits: SinkLogits | None = None,
    ) -> tuple[HeadOutputs, Self]:
        """As `TokenView.attend`, over what `index_queries` [B, T, index_dim] select."""
        batch, num_tokens, num_heads, dim = queries.shape
        lists = lists_of(self.plan)
        index = self.pool["index"][lists.table][:, :, 0]  # [B, num_pages, page, index_dim]
        slots = lists.starts[:, :, None] + jnp.arange(index.shape[2], dtype=jnp.int32)[None, None, :]
        slots = slots.reshape(batch, 1, -1)
        seen = self.state.visible.sees(self.query_slots(num_tokens)[:, :, None], slots)
        seen = seen & (slots < self.slot_lens[:, None, None])
        if lists.valid is not None:
            seen = seen & lists.valid.reshape(batch, 1, -1)
        selected = select(index_queries, index.reshape(batch, -1, index.shape[3]), seen, self.state.num_selected)

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
        narrow = _narrowed(by_query(lists.table), by_query(lists.starts), chosen, self.state.num_selected)
        pages = Pages(stored(self.state, self.pool, "keys"), stored(self.state, self.pool, "values"))
        rows = queries.reshape(-1, 1, num_heads, dim)
        outputs = attend_pages(alone, rows, pages, narrow, sink_logits)
        return outputs.reshape(batch, num_tokens, num_heads, -1), self


def select(
    index_queries: IndexQueries,
    index: Float[Array, "B S I"],
    seen: Bool[Array, "B T S"],
    num_selected: int,
) -> Bool[Array, "B T S"]:
    """Which tokens each query selects: of those that it sees, the `num_selected` with the largest products of index
    entries, the first ones where products are equal. Entries that a query does not see may hold NaN."""
    scores = jnp.einsum("bti,bsi->bts", index_queries, index, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores, -jnp.inf)
    num_tokens = scores.shape[2]
    if num_selected >= num_tokens:
        return seen
    _, places = jax.lax.top_k(scores, num_selected)
    rows = jnp.arange(scores.shape[0] * scores.shape[1], dtype=jnp.int32)[:, None]
    flat = jnp.zeros((len(rows), num_tokens), bool).at[rows, places.reshape(-1, num_selected)].set(True)
    return flat.reshape(scores.shape) & seen


def _narrowed(table: Array, starts: Array, chosen: Array, num_selected: int) -> Lists:
    """Lists [R, n] of the pages that hold a chosen slot [R, num_pages, page], in their order; no more than
    `num_selected` do."""
    is_used = chosen.any(axis=2)
    order = jnp.argsort(~is_used, axis=1, stable=True)[:, :num_selected]
    used = jnp.take_along_axis(is_used, order, axis=1)
    table = jnp.where(used, jnp.take_along_axis(table, order, axis=1), 0)
    starts = jnp.where(used, jnp.take_along_axis(starts, order, axis=1), NOWHERE)
    return Lists(table, starts, jnp.take_along_axis(chosen, order[:, :, None], axis=1))
