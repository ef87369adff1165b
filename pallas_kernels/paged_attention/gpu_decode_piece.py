"""Decoding on GPUs: the warpgroup that attends to one piece of a list of pages, with queries in columns."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import gpu_scales
from pallas_kernels.paged_attention.gpu_decode_tiles import PARTS, ROW_BLOCK
from pallas_kernels.paged_attention.gpu_producer import Producer
from pallas_kernels.paged_attention.gpu_ring import LOG2_E, Part, Side, filled, halves
from pallas_kernels.paged_attention.gpu_tiles import stripes_of
from pallas_kernels.paged_attention.plan import BLOCK_LEN
from pallas_kernels.tensor_cores import product


@dataclass(frozen=True)
class Queries:
    """The columns of an item: queries times heads of the group, and where what they come to leaves."""

    rows: Any
    queries: Any
    queries_arrived: Any
    weights: Any
    sums_out: Any
    lse_out: Any
    outputs: Any
    log_sum_exp: Any
    group: int
    num_columns: int
    first_column: Any
    """Of the item's: a thread block may attend with some of them."""
    column_factors: Any = None
    scaled: Any = None
    """Queries times the scales of channels, in `PARTS`."""
    pages_out: Any = None
    page_log_sum_exp: Any = None
    product_done: Any = None
    product_0: Any = None
    product_1: Any = None
    product_2: Any = None
    """Of Blackwell: see `tensor_cores.accumulators`."""

    @property
    def memory(self) -> list[Any]:
        """Where Blackwell sums products; nothing on Hopper."""
        found = self.product_done, self.product_0, self.product_1, self.product_2
        return [ref for ref in found if ref is not None]

    @property
    def mine(self) -> Any:
        """The columns of this thread block among the item's."""
        return pl.ds(self.first_column, self.num_columns)


class Columns:
    """One piece, for all columns: one or two producers, and what attends."""

    def __init__(self, part: Part, queries: Queries, num_producers: int = 1) -> None:
        self.part, self.tile, self.scoring, self.num_producers = part, queries, part.scoring, num_producers
        self.num_groups = 0
        """Groups of the values' channels that have weights of their own."""
        if queries.weights.shape[0] > 2 * queries.num_columns or part.values.zeros is not None:
            self.num_groups = queries.weights.shape[0] // (2 * queries.num_columns)

    def run(self) -> None:
        """What each warpgroup does."""
        warpgroup = lax.axis_index("warpgroup")
        producers = [(self.part.keys,), (self.part.values,)] if self.num_producers > 1 else [None]
        for number, sides in enumerate(producers, 1):
            pl.when((warpgroup == number) & (self.part.count > 0))(partial(self.produce, sides))
        pl.when((warpgroup == 0) & (self.part.count > 0))(self.attend)

    def produce(self, sides: tuple[Side, ...] | None) -> None:
        """Queries, where keys are fetched; then pages: of keys and values (None), or of one of them."""
        if sides is None or sides[0] is self.part.keys:
            self.fetch_queries()
        Producer(self.part, sides).run()

    def fetch_queries(self) -> None:
        """Asks for the columns."""
        rows, mine = self.tile.rows.at[self.part.item, self.part.head], self.tile.mine
        rows = rows.at[:, mine] if self.part.keys.per == "channel" else rows.at[mine]
        into = self.tile.queries
        if into.shape[0] > self.tile.num_columns and self.part.keys.per != "channel":
            into = into.at[pl.ds(0, self.tile.num_columns)]
        plgpu.copy_gmem_to_smem(rows, into, self.tile.queries_arrived)

    def attend(self) -> None:
        """Of all columns over the piece's pages."""
        bounds = self.column_bounds()
        factors: Any = float(self.scoring.scale) * (1 if self.scoring.soft_cap is not None else LOG2_E)
        if self.tile.column_factors is not None:
            theirs = self.tile.column_factors.at[self.part.item, self.part.head, self.tile.mine]
            factors = factors * plgpu.load(theirs, layout=self.part.across, optimized=False)
        plgpu.barrier_wait(self.tile.queries_arrived)
        queries = None
        if self.part.keys.per == "channel":
            held = (self.tile.queries.at[channels] for channels in self.key_stripes())
            queries = [plgpu.load(mine, layout=plgpu.Layout.WGMMA).astype(jnp.float32) for mine in held]

        value_dim, stripe = self.tile.outputs.shape[2], self.tile.sums_out.shape[0]
        stripes = stripes_of(value_dim, stripe)
        state = (
            tuple(filled((stripe, self.tile.num_columns), 0, plgpu.Layout.WGMMA) for _ in stripes),
            filled((self.tile.num_columns,), -jnp.inf, self.part.across),
            filled((BLOCK_LEN, self.tile.num_columns), 0, plgpu.Layout.WGMMA),
            tuple(
                filled((BLOCK_LEN, self.tile.num_columns), 0, plgpu.Layout.WGMMA)
                for _ in range(self.num_groups if self.part.values.zeros is not None else 0)
            ),
        )
        block = partial(self.attend_block, bounds=bounds, factors=factors, queries=queries, stripes=stripes)
        sums, highest, total, zeros = lax.fori_loop(0, self.part.num_blocks, block, state)
        total, zeros = total.sum(axis=0), [share.sum(axis=0) for share in zeros]
        divisor = jnp.where(total == 0, 1.0, total)
        self.tile.lse_out[...] = jnp.where(total == 0, -jnp.inf, (highest + jnp.log2(divisor)) / LOG2_E)
        for columns, stripe_sums in zip(stripes, sums, strict=True):
            if zeros:
                shares = [lax.broadcast_in_dim(share, stripe_sums.shape, [1]) for share in zeros]
                stripe_sums = stripe_sums + self.by_group(columns, lambda group, shares=shares: shares[group])
            plgpu.wait_smem_to_gmem(0)
            self.tile.sums_out[...] = stripe_sums / lax.broadcast_in_dim(divisor, stripe_sums.shape, [1])
            plgpu.commit_smem()
            there = self.tile.outputs.at[self.part.piece, self.part.head, columns, self.tile.mine]
            plgpu.copy_smem_to_gmem(self.tile.sums_out, there)
        there = self.tile.log_sum_exp.at[self.part.piece, self.part.head, self.tile.mine]
        plgpu.copy_smem_to_gmem(self.tile.lse_out, there)
        plgpu.wait_smem_to_gmem(0)

    def attend_block(self, number, state, *, bounds, factors, queries, stripes):
        """The state after one more block: sums of each stripe of dims, the highest score of each column, sums of
        weights, and of weights times the zeros of each group."""
        sums, highest, total, zeros = state
        place = lax.rem(number, self.part.num_staged or self.part.num_stages)
        starts, bits = self.part.listed(number)
        scores = self.scores(number, place, queries)
        shape = scores.shape
        scores = scores * (factors if isinstance(factors, float) else lax.broadcast_in_dim(factors, shape, [1]))
        if self.part.keys.per == "token":
            scores = scores * lax.broadcast_in_dim(self.token_scales(self.part.keys, number), shape, [0])
        if self.scoring.soft_cap is not None:
            scores = self.scoring.soft_cap * LOG2_E * jnp.tanh(scores / self.scoring.soft_cap)
        scores = jnp.where(self.seen(starts, bits, bounds), scores, -jnp.inf)
        new = jnp.maximum(highest, scores.max(axis=0))
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        keep = jnp.exp2(highest - shift)
        exact = jnp.exp2(scores - lax.broadcast_in_dim(shift, shape, [1]))
        total = total * lax.broadcast_in_dim(keep, shape, [1]) + exact
        if self.tile.pages_out is not None:
            self.leave_page_sums(number, exact, shift)
        if self.part.is_quantised:
            self.part.wait_to_multiply(self.part.values, number, place)
        zeros = self.store_weights(number, exact, keep, zeros)
        if not self.part.is_quantised:
            self.part.wait_to_multiply(self.part.values, number, place)
        values = self.part.values.blocks.at[place]
        if self.part.values.may_be_nan:
            pl.when(jnp.logical_not(self.part.is_whole(starts, bits)))(
                lambda: self.part.silence([values], self.part.values.step, starts, bits)
            )
        plgpu.commit_smem()
        scaled = []
        for columns, stripe_sums in zip(stripes, sums, strict=True):
            part = self.weighed(values.at[:, columns], columns, number)
            scaled.append(stripe_sums * lax.broadcast_in_dim(keep, stripe_sums.shape, [1]) + part)
        plgpu.barrier_arrive(self.part.free.at[place])
        return tuple(scaled), new, total, zeros

    def store_weights(self, number: Any, exact: Array, keep: Array, zeros: tuple[Array, ...]) -> tuple[Array, ...]:
        """Leaves a block's weights for the products of values, times the scales of tokens, those of each group of their
        channels apart. Returns the sums of weights times zeros."""
        size, values = self.tile.num_columns, self.part.values

        def of_tokens(scales: Any, group: int) -> Array:
            """Weights times what tokens have: what nobody sees may have anything."""
            kept = scales.at[self.part.place_of_scales(number)]
            found = gpu_scales.of_tokens(values.scheme, kept, group, self.part.down)
            return jnp.where(exact > 0, exact * lax.broadcast_in_dim(found, exact.shape, [0]), 0.0)

        for group in range(max(1, self.num_groups)):
            weights = of_tokens(values.scales, group) if values.per == "token" else exact
            for half, share in enumerate(halves(weights, self.tile.weights.dtype)):
                self.store_across(self.tile.weights.at[pl.ds((2 * group + half) * size, size)], share)
        keep = lax.broadcast_in_dim(keep, exact.shape, [1])
        return tuple(share * keep + of_tokens(values.zeros, group) for group, share in enumerate(zeros))

    def groups_in(self, channels: Any) -> range:
        """The groups that some channels are of."""
        size = self.tile.outputs.shape[2] // self.num_groups
        return range(channels.start // size, (channels.start + channels.size - 1) // size + 1)

    def by_group(self, channels: Any, of: Callable[[int], Array]) -> Array:
        """[channels, columns]: of every channel what `of` says of its group."""
        size, found = self.tile.outputs.shape[2] // self.num_groups, None
        for group in self.groups_in(channels):
            mine = of(group)
            if found is None:
                found = mine
            else:
                rows = plgpu.broadcasted_iota(jnp.int32, mine.shape, 0, layout=plgpu.Layout.WGMMA)
                found = jnp.where(rows >= group * size - channels.start, mine, found)
        assert found is not None
        return found

    def store_across(self, into: Any, value: Array) -> None:
        """Columns as rows: numbers of 16 bits."""
        into.transpose((1, 0))[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)

    def column_bounds(self) -> tuple[Any, Any]:
        """First and last position that each column sees: numbers where there is one query, else arrays [columns]."""
        if self.part.listed_pages.last.shape[1] == 1:
            return self.part.listed_pages.first[self.part.item, 0], self.part.listed_pages.last[self.part.item, 0]
        numbers = plgpu.broadcasted_iota(jnp.int32, (self.tile.num_columns,), 0, layout=self.part.across)
        numbers = numbers + self.tile.first_column

        def of_query(query, bounds):
            mine = numbers >= query * self.tile.group
            mine = mine & (numbers < (query + 1) * self.tile.group)
            return tuple(
                jnp.where(mine, ref[self.part.item, query], bound)
                for ref, bound in zip((self.part.listed_pages.first, self.part.listed_pages.last), bounds, strict=True)
            )

        nothing = tuple(
            plgpu.layout_cast(jnp.full((self.tile.num_columns,), value, jnp.int32), self.part.across)
            for value in (0, -1)
        )
        return lax.fori_loop(0, self.part.listed_pages.last.shape[1], of_query, nothing)

    def seen(self, starts: list[Any], bits: list[tuple[int, Any]], bounds: tuple[Any, Any]) -> Array:
        """[block, columns]."""
        shape = (BLOCK_LEN, self.tile.num_columns)
        slots = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        positions = self.part.positions_of(slots, starts)
        low, high = (lax.broadcast_in_dim(bound, shape, [1]) if bound.shape else bound for bound in bounds)
        seen = self.part.only_valid(positions <= high, slots, bits)
        if self.scoring.num_sinks is None:
            return seen
        return seen & ((positions >= low) | (positions < self.scoring.num_sinks))

    def token_scales(self, side: Side, number: Any) -> Array:
        """[block]."""
        kept = side.scales.at[self.part.place_of_scales(number)]
        return gpu_scales.of_tokens(side.scheme, kept, 0, self.part.down)

    def of_channels(self, scales: Any, number: Any, entry: int, channels: Any) -> Array:
        """[channels] of the scales, or zeros, of one of a block's pages; 0 for a page that is none."""
        kept = scales.at[self.part.place_of_scales(number), entry, channels]
        found = plgpu.load(kept, layout=self.part.down).astype(jnp.float32)
        numbers = plgpu.broadcasted_iota(jnp.int32, found.shape, 0, layout=self.part.down)
        is_there = number * self.part.block_pages + entry < self.part.count
        return jnp.where(numbers < jnp.where(is_there, found.size, 0), found, 0.0)

    def key_stripes(self) -> list[Any]:
        """The channels of keys as registers hold them: all, or where they are no multiple of 64 stripes that
        overlap."""
        dim = self.tile.queries.shape[0]
        return stripes_of(dim, ROW_BLOCK if dim % ROW_BLOCK else dim)

    def scores(self, number: Any, place: Any, queries: Any) -> Array:
        """[block, columns]: products of keys and queries, without the scales of tokens."""
        if self.part.keys.per != "channel":
            self.part.wait_to_multiply(self.part.keys, number, place)
            found = self.product(self.part.keys.blocks.at[place], self.tile.queries)
            return found[:, : self.tile.num_columns] if found.shape[1] > self.tile.num_columns else found
        # Their scales multiply the queries, which are fewer, and in float32: the sum of three numbers of 16 bits.
        self.part.wait_to_multiply(self.part.keys, number, place)
        size, width = self.tile.num_columns, PARTS * self.tile.num_columns
        stripes = list(zip(self.key_stripes(), queries, strict=True))
        for entry, (channels, mine) in itertools.product(range(self.part.block_pages), stripes):
            scales = self.of_channels(self.part.keys.scales, number, entry, channels)
            rest = mine * lax.broadcast_in_dim(scales, mine.shape, [0])
            for part in range(PARTS):
                rounded = rest.astype(self.tile.scaled.dtype)
                rows = pl.ds(entry * width + part * size, size)
                self.store_across(self.tile.scaled.at[rows, channels], rounded)
                rest = rest - rounded.astype(jnp.float32)
        plgpu.commit_smem()
        found = self.product(self.part.keys.blocks.at[place], self.tile.scaled)
        slots = plgpu.broadcasted_iota(jnp.int32, (BLOCK_LEN, size), 0, layout=plgpu.Layout.WGMMA)
        scores = None
        for entry in range(self.part.block_pages):
            at = entry * width
            parts = [found[:, at + part * size : at + (part + 1) * size] for part in range(PARTS)]
            mine = sum(parts[1:], parts[0])
            if self.part.keys.zeros is not None:  # of a page they are the same for all tokens
                mine = mine + lax.broadcast_in_dim(self.zero_dots(number, entry, stripes), mine.shape, [1])
            scores = mine if scores is None else jnp.where(slots >= entry * self.part.page_size, mine, scores)
        assert scores is not None
        return scores

    def zero_dots(self, number: Any, entry: int, stripes: list[tuple[Any, Array]]) -> Array:
        """[columns]: products of queries and the zeros of one of a block's pages."""
        total, end = None, 0
        for channels, mine in stripes:
            zeros = self.of_channels(self.part.keys.zeros, number, entry, channels)
            terms = mine * lax.broadcast_in_dim(zeros, mine.shape, [0])
            if channels.start < end:  # what two stripes have counts once
                rows = plgpu.broadcasted_iota(jnp.int32, terms.shape, 0, layout=plgpu.Layout.WGMMA)
                terms = jnp.where(rows >= end - channels.start, terms, 0.0)
            dots, end = terms.sum(axis=0), channels.start + channels.size
            total = dots if total is None else total + dots
        assert total is not None
        return total

    def weighed(self, values: Any, channels: Any, number: Any) -> Array:
        """[dims, columns]: the sum of a block's values times their weights."""
        size, shape = self.tile.num_columns, (values.shape[1], self.tile.num_columns)
        if self.num_groups:
            groups = self.groups_in(channels)
            weights = self.tile.weights.at[pl.ds(2 * groups.start * size, 2 * len(groups) * size)]
            all_groups = self.product(values.transpose((1, 0)), weights)

            def of_group(group: int) -> Array:
                at = 2 * (group - groups.start) * size
                return all_groups[:, at : at + size] + all_groups[:, at + size : at + 2 * size]

            return self.by_group(channels, of_group)
        if self.part.values.per != "channel":
            both = self.product(values.transpose((1, 0)), self.tile.weights)
            return both[:, :size] + both[:, size:]
        total = None
        for entry in range(self.part.block_pages):
            tokens = pl.ds(entry * self.part.page_size, self.part.page_size)
            both = self.product(values.at[tokens].transpose((1, 0)), self.tile.weights.at[:, tokens])
            scales = self.of_channels(self.part.values.scales, number, entry, channels)
            part = both[:, :size] + both[:, size:]
            # Of a page of which nothing is seen the scale may be anything.
            part = jnp.where(part == 0, 0.0, part * lax.broadcast_in_dim(scales, shape, [0]))
            total = part if total is None else total + part
        assert total is not None
        return total

    def product(self, left: Any, right: Any) -> Array:
        """left [rows, k] @ right [columns, k]^T in float32, waited for."""
        rows, width = left.shape[0], right.shape[0]
        return product(self.tile.memory, width, lambda add: add(left, right.transpose((1, 0)), first=True), rows)

    def leave_page_sums(self, number: Any, exact: Array, shift: Array) -> None:
        """The log-sum-exp of each of a block's pages."""
        slots = plgpu.broadcasted_iota(jnp.int32, exact.shape, 0, layout=plgpu.Layout.WGMMA)
        plgpu.wait_smem_to_gmem(0)
        for entry in range(self.part.block_pages):
            begin, mine = entry * self.part.page_size, exact
            if self.part.block_pages > 1:
                mine = jnp.where((slots >= begin) & (slots < begin + self.part.page_size), exact, 0.0)
            total = mine.sum(axis=0)
            logs = jnp.where(total == 0, -jnp.inf, (jnp.log2(jnp.where(total == 0, 1.0, total)) + shift) / LOG2_E)
            self.tile.pages_out[entry, pl.ds(0, self.tile.num_columns)] = logs
        plgpu.commit_smem()

        def leave(entry):
            place = self.part.begin + number * self.part.block_pages + entry
            there = self.tile.page_log_sum_exp.at[self.part.item, self.part.head, place, self.tile.mine]
            plgpu.copy_smem_to_gmem(self.tile.pages_out.at[entry, pl.ds(0, self.tile.num_columns)], there)

        self.part.each_page(number, leave)
