"""An item of the TPU kernel: the rows of one sequence's tile for one KV head, over the pages in which some of them sees
something."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats import SHARED, Scheme, unpacked
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention.sharing import WORD
from pallas_kernels.typing import Float, Int32
from pallas_kernels.visible import NOWHERE

LANES = 128
"""Of a register."""


class Sizes(NamedTuple):
    """What a kernel must know of the whole. Of `num_sides` 2, pools are keys and values, then scales of both, then
    zeros of both; of 1 values are the first columns of the keys."""

    num_items: int
    num_kv_heads: int
    num_tiles: int
    num_pools: int
    num_sides: int


@dataclass
class Item:
    """One item. `half` is the half of the buffers that holds, or will hold, its first block; `arrived` counts their
    copies."""

    counts: Any
    table: Any
    next_table: Any
    rows: Any
    ends_across: Any
    ends_down: Any
    pools: Sequence[Any]
    buffers: Sequence[Any]
    arrived: Any
    half: Any
    page_logs: Sequence[Any]
    sizes: Sizes
    schemes: tuple[Scheme, Scheme] | None
    scoring: Scoring

    def __post_init__(self) -> None:
        self.item = pl.program_id(0)
        _, self.block_pages, self.page_size, _ = self.buffers[0].shape
        self.count = self.counts[self.item]
        self.num_blocks = pl.cdiv(self.count, self.block_pages)
        self.num_slots = self.block_pages * self.page_size

    def run(self, outputs: Any, log_sum_exp: Any) -> None:
        """Attends over all blocks."""
        before = self.counts[jnp.maximum(self.item - 1, 0)]

        @pl.when(self.item == 0)
        def _():
            self.half[0] = 0

        @pl.when((self.count > 0) & ((self.item == 0) | (before == 0)))
        def _():
            self.fetch(self.item, self.table, self.count, 0, self.half[0])

        num_rows, value_dim = outputs.shape[1:]
        for page_log in self.page_logs:
            page_log[...] = jnp.full(page_log.shape, -jnp.inf)
        state = (
            jnp.full((num_rows, 1), -jnp.inf),
            jnp.zeros((num_rows, 1)),
            jnp.zeros((num_rows, value_dim)),
        )
        highest, total, sums = lax.fori_loop(0, self.num_blocks, self.attend, state)
        self.half[0] = (self.half[0] + self.num_blocks) % 2
        outputs[0] = (sums / jnp.where(total == 0, 1, total)).astype(outputs.dtype)
        log_sum_exp[0] = jnp.log(total) + jnp.where(highest == -jnp.inf, 0, highest)

    def attend(self, block: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """The state after a block, while the next is on its way."""
        highest, total, sums = state
        values = self.sizes.num_sides - 1
        here = (self.half[0] + block) % 2
        self.fetch_next(block, here)
        self.each_live(
            self.count,
            block,
            lambda entry: [copy.wait() for copy in self.copies(self.item, self.table, block, entry, here)],
        )
        starts, words = self.listed(block)
        seen = self.visible(1, starts, words, self.ends_down[0, :, 0:1], self.ends_down[0, :, 1:2])
        keys = self.numbers(0, here)
        scores = _dot(self.rows[0].astype(keys.dtype), keys, 1) * self.scoring.scale
        if self.has_token_scales(0):
            scores = scores * self.token_scales(0, here)
        scores = jnp.where(seen, self.scoring.capped(scores), -jnp.inf)
        new = jnp.maximum(highest, scores.max(axis=1, keepdims=True))
        shift = jnp.where(new == -jnp.inf, 0, new)
        keep, weights = jnp.exp(highest - shift), jnp.exp(scores - shift)
        total = total * keep + weights.sum(axis=1, keepdims=True)
        for page_log in self.page_logs:
            self.leave_page_logs(page_log, block, weights, shift)
        if self.has_token_scales(values):  # the scale of what nobody sees may be anything
            weights = jnp.where(weights > 0, weights * self.token_scales(values, here), 0)
        # A weight of zero does not silence a NaN: what no row sees is replaced.
        readable = self.visible(0, starts, words, self.ends_across[0, 0:1], self.ends_across[0, 1:2])
        readable = readable.astype(jnp.float32).max(axis=1, keepdims=True)
        block_values = jnp.where(readable > 0, self.numbers(values, here)[:, : sums.shape[1]], 0)
        part = _product(weights, block_values)
        return new, total, sums * keep + part

    def copies(self, of: Any, table: Any, block: Any, entry: Any, into: Any) -> list[Any]:
        """The copies of one page: keys, values, and their scales."""
        head, page = of // self.sizes.num_tiles % self.sizes.num_kv_heads, table[0, 0, block * self.block_pages + entry]
        return [
            pltpu.make_async_copy(pool.at[page, head], buffer.at[into, entry], self.arrived.at[which, into])
            for which, (pool, buffer) in enumerate(zip(self.pools, self.buffers, strict=True))
        ]

    def each_live(self, count: Any, block: Any, do: Callable[[Any], Any]) -> None:
        """For every entry of a block that lists a page."""

        def live_entry(entry, _):
            do(entry)

        lax.fori_loop(0, jnp.minimum(self.block_pages, count - block * self.block_pages), live_entry, None)

    def fetch(self, of: Any, table: Any, count: Any, block: Any, into: Any) -> None:
        """Asks for the pages of a block of an item."""
        self.each_live(
            count, block, lambda entry: [copy.start() for copy in self.copies(of, table, block, entry, into)]
        )

    def fetch_next(self, block: Any, here: Any) -> None:
        """Asks for the block that follows: of this item, or the first of the next."""
        following = jnp.minimum(self.item + 1, self.sizes.num_items - 1)

        @pl.when(block + 1 < self.num_blocks)
        def _():
            self.fetch(self.item, self.table, self.count, block + 1, 1 - here)

        @pl.when((block + 1 == self.num_blocks) & (self.item + 1 < self.sizes.num_items))
        def _():
            self.fetch(following, self.next_table, self.counts[following], 0, 1 - here)

    def listed(self, block: Any) -> tuple[list[Any], list[list[Any]]]:
        """Of a block's entries where each begins, and the words that say which of its slots count."""
        entries = [block * self.block_pages + entry for entry in range(self.block_pages)]

        def column(number, unused):
            return [
                jnp.where(entry < self.count, self.table[0, number, jnp.minimum(entry, self.count - 1)], unused)
                for entry in entries
            ]

        return column(1, NOWHERE), [column(number, 0) for number in range(2, self.table.shape[1])]

    def visible(self, axis: int, starts: list[Any], words: list[list[Any]], first: Array, last: Array) -> Array:
        """[rows, slots] with the slots along axis 1, or the other way round along axis 0."""
        shape = (self.page_size, 1) if axis == 0 else (1, self.page_size)
        offsets = lax.broadcasted_iota(jnp.int32, shape, axis)
        positions = jnp.concatenate([start + offsets for start in starts], axis=axis)
        seen = positions <= last
        if self.scoring.num_sinks is not None:
            seen = seen & ((positions >= first) | (positions < self.scoring.num_sinks))
        if words:
            bits = jnp.concatenate([_bits(offsets, of_page) for of_page in zip(*words, strict=True)], axis=axis)
            seen = seen & (bits > 0)
        return seen

    def numbers(self, which: int, here: Any) -> Array:
        """[slots, dims] of keys or values, in a type that products take; scales multiplied in, and zeros added, but for
        scales of whole tokens."""
        found = self.buffers[which][here]
        if self.schemes is None:
            return found.reshape(self.num_slots, -1)
        scheme, num_sides = self.schemes[which], self.sizes.num_sides
        shared = SHARED.get(scheme.format, 1)
        exact = found.astype(jnp.float32)
        if shared > 1:
            exact = unpacked(found, shared, is_signed=not scheme.has_zeros)
        if self.has_token_scales(which):  # without them they are exact in the queries' type
            return exact.astype(self.rows.dtype).reshape(self.num_slots, -1)
        exact = exact * self.spread(scheme.group, which + num_sides, here)
        if scheme.has_zeros:
            exact = exact + self.spread(scheme.group, which + 2 * num_sides, here)
        return exact.reshape(self.num_slots, -1)

    def has_token_scales(self, which: int) -> bool:
        """Whether keys or values have a scale for each token, which multiplies scores or weights."""
        return self.schemes is not None and self.schemes[which].per == "token" and self.schemes[which].group is None

    def spread(self, group: int | None, of: int, here: Any) -> Array:
        """[pages, slots or 1, dims]: scales or zeros, for every number."""
        kept = self.buffers[of][here].astype(jnp.float32)
        if group is None:
            return kept
        num_groups = kept.shape[1]
        groups = lax.broadcasted_iota(jnp.int32, (num_groups, num_groups * group), 0)
        channels = lax.broadcasted_iota(jnp.int32, groups.shape, 1)
        belongs = jnp.where(lax.div(channels, group) == groups, 1.0, 0.0)
        of_slots = jnp.concatenate([kept[entry] for entry in range(self.block_pages)], axis=1)
        contracted = (((0,), (0,)), ((), ()))
        precision = lax.Precision.HIGHEST
        found = lax.dot_general(of_slots, belongs, contracted, precision, jnp.float32)
        return found.reshape(self.block_pages, self.page_size, -1)

    def token_scales(self, which: int, here: Any) -> Array:
        """[1, slots]."""
        scales = self.buffers[which + self.sizes.num_sides]
        return jnp.concatenate([scales[here, entry] for entry in range(self.block_pages)], axis=1)

    def leave_page_logs(self, into: Any, block: Any, weights: Array, shift: Array) -> None:
        """The log-sum-exp of a block's pages, in lanes of their own."""
        per_tile = LANES // self.block_pages
        first = lax.rem(block, per_tile) * self.block_pages
        lanes = lax.broadcasted_iota(jnp.int32, (self.num_slots, LANES), 1)
        slots = lax.broadcasted_iota(jnp.int32, (self.num_slots, LANES), 0)
        begin = (lanes - first) * self.page_size
        places = jnp.where((slots >= begin) & (slots < begin + self.page_size), 1.0, 0.0)
        logs = jnp.log(_dot(weights, places, 0)) + shift
        mine = lax.broadcasted_iota(jnp.int32, logs.shape, 1)
        mine = (mine >= first) & (mine < first + self.block_pages)
        tile = lax.div(block, per_tile)
        into[0, tile] = jnp.where(mine, logs, into[0, tile])


def _bits(offsets: Int32[Array, "*shape"], words: Any) -> Int32[Array, "*shape"]:
    """The bit of each slot of a page."""
    word = jnp.full(offsets.shape, words[0])
    for number, later in enumerate(words[1:], 1):
        word = jnp.where(offsets >= number * WORD, later, word)
    return lax.shift_right_logical(word, offsets % WORD) & 1


def _dot(left: Array, right: Array, axis: int) -> Array:
    """The product over left's second axis and that axis of right, as exact as their type."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    contracted = (((1,), (axis,)), ((), ()))
    return lax.dot_general(left, right, contracted, precision=precision, preferred_element_type=jnp.float32)


def _product(weights: Float[Array, "R S"], values: Float[Array, "S Dv"]) -> Float[Array, "R Dv"]:
    """weights @ values in float32. Values of 16 bits meet the weights in two halves of 16 bits, so that these lose
    nothing: the time is in the copies, not here."""
    if values.dtype == jnp.float32:
        return _dot(weights, values, 0)
    high = weights.astype(values.dtype)
    low = (weights - high.astype(jnp.float32)).astype(values.dtype)
    return _dot(high, values, 0) + _dot(low, values, 0)
