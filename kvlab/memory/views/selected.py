"""Tokens in pages of which a query reads only some: a view of the tokens, and of what is noted of their pages.

Each query has lists of its own, one for each KV head, so what it reads depends on neither the chunk nor the batch it
came with. Its own page is always among them; of the pages before it all slots are full, so nothing that is noted of
them depends on what comes later.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from kvlab.memory.page_index import noted_anew
from kvlab.memory.rotation import turned_back
from kvlab.memory.views.base import OverTokens
from kvlab.memory.views.paged import attend_pages, attended, beside_sinks, lists_of
from kvlab.memory.views.weights import paged_weights
from kvlab.selection import Candidates, choose
from kvlab.selection.choose import Chosen
from kvlab.typing import HeadOutputs, Positions, Queries, SinkLogits
from pallas_kernels.pages import Lists
from pallas_kernels.visible import NOWHERE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SelectedTokens(OverTokens):
    """`tokens` as they are without a method, and the number of their layer. `is_read` [B, T, K, N] says, of each layer
    that has attended to them in this step, which entries of its list of pages each query read."""

    method: Any = field(metadata={"static": True})
    layer: int = field(metadata={"static": True})
    tokens: Any
    is_read: tuple[Any, ...] = ()

    def append(self, **tokens: Array) -> Self:
        after = self.tokens.append(**tokens)
        num_tokens, page_size = tokens["keys"].shape[1], self.state.reading.page_size
        most = (num_tokens + page_size - 2) // page_size + 1
        numbers = after.starts[:, None] // page_size + jnp.arange(most, dtype=jnp.int32)[None, :]
        table = jnp.asarray(self.plan.pages)
        pages = jnp.take_along_axis(table, jnp.clip(numbers, 0, table.shape[1] - 1), axis=1)
        num_slots = jnp.clip(after.slot_lens[:, None] - numbers * page_size, 0, page_size)
        num_slots = jnp.where(after.counts[:, None] > 0, num_slots, 0)
        return replace(
            self, tokens=replace(after, pool=noted_anew(self.method, self.state, after.pool, pages, num_slots))
        )

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        prompts = self.plan.prompts

        def sparsely() -> HeadOutputs:
            entries = self._choose(queries, positions, sink_logits).entries
            return self._attend_each(queries, entries, sink_logits)

        def densely() -> HeadOutputs:
            return attend_pages(self.tokens, queries, self.tokens.pages, lists_of(self.plan), sink_logits)

        if prompts is None or queries.shape[1] == 1:
            outputs = sparsely()
        else:
            outputs = jax.lax.cond((self._selects(positions) & self._real(positions)).any(), sparsely, densely)
        # Computed a second time, and by the compiler not at all where nobody asks.
        is_read = self._choose(queries, positions, sink_logits).is_read
        return outputs, replace(self, is_read=(*self.is_read, is_read))

    def _real(self, positions: Positions) -> Array:
        """[B, T] which queries are tokens rather than padding."""
        return jnp.arange(positions.shape[1], dtype=jnp.int32)[None, :] < self.tokens.counts[:, None]

    def _selects(self, positions: Positions) -> Array:
        """[B, T] which queries do not read everything."""
        prompts = self.plan.prompts
        return jnp.ones(positions.shape, bool) if prompts is None else positions >= jnp.asarray(prompts)[:, None]

    def _choose(self, queries: Queries, positions: Positions, sink_logits: SinkLogits | None) -> Chosen:
        """What each query reads."""
        reading, lists = self.state.reading, lists_of(self.plan)
        num_tokens, num_entries, dim = queries.shape[1], lists.num_entries, queries.shape[3]
        slots = self.query_slots(num_tokens)
        newest = slots // reading.page_size
        numbers = lists.starts // reading.page_size
        scaled = queries.astype(jnp.float32) * self.state.scale(dim)
        grouped = scaled.reshape(*queries.shape[:2], self.state.arrays[0].shape[0], -1, dim)

        def weigh() -> Float[Array, "B T K G N"]:
            weights = paged_weights(self.tokens, scaled, slots, sink_logits)
            return weights.reshape(*grouped.shape[:4], num_entries, -1).sum(axis=-1)

        index = {array.name: self.pool[array.name][lists.table].astype(jnp.float32) for array in self.state.index}
        layer = self.layer + len(self.is_read)  # layers that read the same pages draw each for itself
        scores = self.method.score(Candidates(grouped, positions, index, numbers, layer, weigh))
        counts = jnp.asarray(np.array([reading.num_read(pages) for pages in range(num_entries + 1)], np.int32))
        num_pages = jnp.clip(newest + 1, 0, num_entries)
        counts = jnp.where(self._selects(positions), counts[num_pages], num_pages)
        return choose(scores, numbers, newest, counts, first=reading.first, last=reading.last)

    def _attend_each(self, queries: Queries, entries: Array, sink_logits: SinkLogits | None) -> HeadOutputs:
        """Attention of each query, as a sequence of its own, over these entries [B, T, K, N] of the list of pages."""
        batch, num_tokens, num_heads, dim = queries.shape
        lists, reading = lists_of(self.plan), self.state.reading
        num_entries = lists.num_entries
        most = num_entries if self.plan.prompts is not None else reading.num_read(num_entries)
        entries = entries[..., :most].reshape(batch, -1, most)  # [B, T * K, most]
        is_one = entries < num_entries
        places = jnp.where(is_one, entries, 0)

        def listed(array: Array, filler: int) -> Array:
            taken = jnp.take_along_axis(array[:, None, :], places, axis=2)
            return jnp.where(is_one, taken, filler).reshape(batch * num_tokens, -1, most)

        valid = lists.valid
        if valid is not None:
            valid = jnp.take_along_axis(valid[:, None], places[..., None], axis=2)
            valid = valid.reshape(batch * num_tokens, -1, most, valid.shape[-1])
        narrow = Lists(listed(lists.table, 0), listed(lists.starts, NOWHERE), valid)
        is_real = jnp.arange(num_tokens, dtype=jnp.int32)[None, :] < self.tokens.counts[:, None]
        slots = jnp.where(is_real, self.query_slots(num_tokens), -1).reshape(-1, 1)
        rows, lens = queries.reshape(-1, 1, num_heads, dim), jnp.repeat(self.slot_lens, num_tokens)
        outputs, log_sums = attended(self.state, rows, self.tokens.pages, narrow, slots, lens)
        outputs = beside_sinks(turned_back(self.state, outputs), log_sums, sink_logits)
        return outputs.reshape(batch, num_tokens, num_heads, -1)
