"""Pages whose tiles were dealt to the heads: after a compaction by head (AdaKV, arXiv 2407.11550) each head holds as
many tiles as it was given, of the pages that the sequence holds as a whole.

A tile is what a page has of one head. The first M pages of a compacted sequence are M * K tiles, K the KV heads: tile t
lies in page t // K, in the place of head t % K. Head h holds the tiles [sum of those before it, + its own). All later
pages are ordinary ones. Which is which follows from `kept`, the slots of each head, which a compaction leaves as
statistics: the host knows how many pages there are and nothing else. Before it is compacted a sequence has kept 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from kvlab.memory.pools import stored
from kvlab.memory.rotation import turned_back
from kvlab.memory.views.base import OverTokens
from kvlab.memory.views.paged import attended, beside_sinks, lists_of
from kvlab.typing import HeadOutputs, Positions, Queries, SinkLogits
from pallas_kernels.paged_attention import Lists, Pages, chunk_positions
from pallas_kernels.visible import CAUSAL, NOWHERE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DealtTokens(OverTokens):
    """`tokens` are the pages; `dealt` is how many slots each head kept of those that were dealt."""

    tokens: Any
    dealt: Any

    @classmethod
    def of_parts(cls, parts: Mapping[str, Any]) -> Self:
        """From the views of the parts."""
        return cls(parts[""], parts["dealt"])

    def parts(self) -> dict[str, Any]:
        """The views of the parts, by the names that a compression gives them."""
        return {"": self.tokens, "dealt": self.dealt}

    def append(self, **tokens: Array) -> Self:
        return replace(self, tokens=self.tokens.append(**tokens))

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        tokens, noted = self.tokens, self.dealt.read()
        pages = Pages(stored(tokens.state, tokens.pool, "keys"), stored(tokens.state, tokens.pool, "values"))
        whole, tiles = parted(lists_of(tokens.plan), noted["kept"], pages.page_size)
        num_tokens = queries.shape[1]
        if num_tokens > 1:
            places = chunk_positions(tokens.starts, tokens.counts, num_tokens)
        else:
            places = tokens.query_slots(1), tokens.slot_lens
        newer = attended(tokens.state, queries, pages, whole, *places, visible=CAUSAL)
        older = attend_tiles(tokens.state, queries, pages, tiles, noted["kept"], tokens.counts)
        outputs, log_sums = merged(newer, older)
        outputs = turned_back(tokens.state, outputs).astype(queries.dtype)
        return beside_sinks(outputs, log_sums, sink_logits), replace(self, dealt=self.dealt.write(noted))


def parted(lists: Lists, kept: Int32[Array, "B K"], page_size: int) -> tuple[Lists, Lists]:
    """The lists [B, N] of pages that are whole, and lists [B * K, N] of the tiles that each head holds of the others,
    in `Pages.by_head`."""
    num_kv_heads, num_entries = kept.shape[1], lists.num_entries
    tiles = tiles_of(kept, page_size)
    entries = jnp.arange(num_entries, dtype=jnp.int32)[None, None, :]
    num_dealt = tiles.sum(axis=1, keepdims=True) // num_kv_heads
    whole = replace(lists, starts=jnp.where(entries[0] < num_dealt, NOWHERE, lists.starts))
    numbers = first_tiles(tiles)[:, :, None] + entries  # [B, K, N]
    places = jnp.clip(numbers // num_kv_heads, 0, num_entries - 1).reshape(len(kept), -1)
    pages = jnp.take_along_axis(lists.table, places, axis=1).reshape(numbers.shape)
    is_mine = entries < tiles[:, :, None]
    table = jnp.where(is_mine, pages * num_kv_heads + numbers % num_kv_heads, 0)
    starts = jnp.where(is_mine, entries * page_size, NOWHERE)
    return whole, Lists(table.reshape(-1, num_entries), starts.reshape(-1, num_entries))


def tiles_of(kept: Int32[Array, "B K"], page_size: int) -> Int32[Array, "B K"]:
    """Tiles that hold as many slots."""
    return (kept + page_size - 1) // page_size


def first_tiles(tiles: Int32[Array, "B K"]) -> Int32[Array, "B K"]:
    """The number of each head's first tile."""
    return jnp.cumsum(tiles, axis=1, dtype=jnp.int32) - tiles


def attend_tiles(
    state: Any, queries: Queries, pages: Pages, tiles: Lists, kept: Int32[Array, "B K"], counts: Array
) -> tuple[Array, Array]:
    """Attention [B, T, H, Dv] of every query over the tiles of its head, all of which lie before it, and the
    log-sum-exp [B, T, H]."""
    batch, num_tokens, num_heads, dim = queries.shape
    num_kv_heads = kept.shape[1]
    asked = queries.reshape(batch, num_tokens, num_kv_heads, -1, dim).swapaxes(1, 2)
    asked = asked.reshape(batch * num_kv_heads, num_tokens, -1, dim)
    lens = kept.reshape(-1)
    if num_tokens > 1:
        positions, _ = chunk_positions(lens, jnp.repeat(counts, num_kv_heads), num_tokens)
    else:
        positions = lens[:, None]
    outputs, log_sums = attended(state, asked, pages.by_head(), tiles, positions, lens, visible=CAUSAL)

    def by_query_head(array: Array) -> Array:
        shape = (batch, num_kv_heads, num_tokens, num_heads // num_kv_heads, *array.shape[3:])
        return array.reshape(shape).swapaxes(1, 2).reshape(batch, num_tokens, num_heads, *array.shape[3:])

    return by_query_head(outputs), by_query_head(log_sums)


def merged(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Float[Array, "B T H Dv"], Array]:
    """Attention over two disjoint sets of keys and its log-sum-exp [B, T, H], from those over each. Seeing nothing is 0
    and -inf."""
    highest = jnp.maximum(first[1], second[1])
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = [jnp.exp(each[1] - highest)[..., None] for each in (first, second)]
    total = weights[0] + weights[1]
    summed = sum(weight * each[0].astype(jnp.float32) for weight, each in zip(weights, (first, second), strict=True))
    return summed / jnp.where(total == 0, 1, total), (jnp.log(total) + highest[..., None])[..., 0]
