"""Decoding on GPUs: what the two warpgroups of a thread block do with one piece of a list of pages."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_decode_tiles import PARTS
from pallas_kernels.paged_attention.gpu_ring import LOG2_E, Ring, filled
from pallas_kernels.paged_attention.plan import BLOCK_LEN


class Columns(Ring):
    """One piece, for all columns: queries times heads of the group."""

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        pl.when((warpgroup == 1) & (self.count > 0))(self.fetch_all)
        pl.when((warpgroup == 0) & (self.count > 0))(self.attend)

    def fetch_all(self) -> None:
        plgpu.copy_gmem_to_smem(self.rows.at[self.item, self.head], self.queries, self.queries_arrived)
        self.produce() if self.per is None else self.produce_and_convert()

    def attend(self) -> None:
        """Of all columns over the piece's pages."""
        bounds = self.column_bounds()
        factors: Any = float(self.scale) * (1 if self.soft_cap is not None else LOG2_E)
        if "column_factors" in self.named:
            theirs = self.column_factors.at[self.item, self.head]
            factors = factors * plgpu.load(theirs, layout=self.across, optimized=False)
        plgpu.barrier_wait(self.queries_arrived)
        queries = None
        if self.per == "channel":
            queries = plgpu.load(self.queries, layout=plgpu.Layout.WGMMA).astype(jnp.float32)

        value_dim, stripe = self.outputs.shape[2], self.sums_out.shape[0]
        stripes = [pl.ds(at, stripe) for at in range(0, value_dim, stripe)]
        state = (
            tuple(filled((stripe, self.num_columns), 0, plgpu.Layout.WGMMA) for _ in stripes),
            filled((self.num_columns,), -jnp.inf, self.across),
            filled((BLOCK_LEN, self.num_columns), 0, plgpu.Layout.WGMMA),
        )
        block = partial(self.attend_block, bounds=bounds, factors=factors, queries=queries, stripes=stripes)
        sums, highest, total = lax.fori_loop(0, self.num_blocks, block, state)
        total = total.sum(axis=0)
        divisor = jnp.where(total == 0, 1.0, total)
        self.lse_out[...] = jnp.where(total == 0, -jnp.inf, (highest + jnp.log2(divisor)) / LOG2_E)
        for columns, one in zip(stripes, sums, strict=True):
            plgpu.wait_smem_to_gmem(0)
            self.sums_out[...] = one / lax.broadcast_in_dim(divisor, one.shape, [1])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.sums_out, self.outputs.at[self.piece, self.head, columns])
        plgpu.copy_smem_to_gmem(self.lse_out, self.log_sum_exp.at[self.piece, self.head])
        plgpu.wait_smem_to_gmem(0)

    def attend_block(self, number, state, *, bounds, factors, queries, stripes):
        """The state after one more block: sums of each stripe of dims, the highest score of each column, and sums of weights."""
        sums, highest, total = state
        place = lax.rem(number, self.num_staged or self.num_stages)
        starts, bits = self.listed(number)
        scores = self.scores(number, place, queries)
        shape = scores.shape
        scores = scores * (factors if isinstance(factors, float) else lax.broadcast_in_dim(factors, shape, [1]))
        if self.per == "token":
            scores = scores * lax.broadcast_in_dim(self.token_scales("keys", number), shape, [0])
        if self.soft_cap is not None:
            scores = self.soft_cap * LOG2_E * jnp.tanh(scores / self.soft_cap)
        scores = jnp.where(self.seen(starts, bits, bounds), scores, -jnp.inf)
        new = jnp.maximum(highest, scores.max(axis=0))
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        keep = jnp.exp2(highest - shift)
        exact = jnp.exp2(scores - lax.broadcast_in_dim(shift, shape, [1]))
        total = total * lax.broadcast_in_dim(keep, shape, [1]) + exact
        if "pages_out" in self.named:
            self.leave_page_sums(number, exact, shift)
        if self.per is not None:
            self.wait_to_multiply("values", number, place)
        if self.per == "token":
            weighed = exact * lax.broadcast_in_dim(self.token_scales("values", number), shape, [0])
            exact = jnp.where(exact > 0, weighed, 0.0)  # the scale of what nobody sees may be anything
        for half, one in enumerate(self.halves(exact)):
            self.store_across(self.weights.at[pl.ds(half * self.num_columns, self.num_columns)], one)
        if self.per is None:
            self.wait_to_multiply("values", number, place)
        values = self.values.at[place]
        if not (self.per is not None and self.values_ring.dtype != jnp.float8_e4m3fn):  # whole numbers are never NaN
            pl.when(jnp.logical_not(self.is_whole(starts, bits)))(
                lambda: self.silence([values], self.steps["values"], starts, bits)
            )
        plgpu.commit_smem()
        scaled = []
        for columns, one in zip(stripes, sums, strict=True):
            part = self.weighed(values.at[:, columns], columns, number)
            scaled.append(one * lax.broadcast_in_dim(keep, one.shape, [1]) + part)
        plgpu.barrier_arrive(self.free.at[place])
        return tuple(scaled), new, total

    def store_across(self, into: Any, value: Array) -> None:
        """Columns as rows: numbers of 16 bits."""
        into.transpose((1, 0))[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)

    def column_bounds(self) -> tuple[Any, Any]:
        """First and last position that each column sees: numbers where there is one query, else arrays [columns]."""
        if self.last.shape[1] == 1:
            return self.first[self.item, 0], self.last[self.item, 0]
        numbers = plgpu.broadcasted_iota(jnp.int32, (self.num_columns,), 0, layout=self.across)

        def of_query(query, bounds):
            mine = numbers >= query * self.group
            mine = mine & (numbers < (query + 1) * self.group)
            return tuple(
                jnp.where(mine, ref[self.item, query], one)
                for ref, one in zip((self.first, self.last), bounds, strict=True)
            )

        nothing = tuple(
            plgpu.layout_cast(jnp.full((self.num_columns,), value, jnp.int32), self.across) for value in (0, -1)
        )
        return lax.fori_loop(0, self.last.shape[1], of_query, nothing)

    def seen(self, starts: list[Any], bits: list[tuple[int, Any]], bounds: tuple[Any, Any]) -> Array:
        """[block, columns]."""
        shape = (BLOCK_LEN, self.num_columns)
        slots = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        positions = self.positions_of(slots, starts)
        low, high = (lax.broadcast_in_dim(one, shape, [1]) if one.shape else one for one in bounds)
        seen = self.only_valid(positions <= high, slots, bits)
        if self.num_sinks is None:
            return seen
        return seen & ((positions >= low) | (positions < self.num_sinks))

    def token_scales(self, name: str, number: Any) -> Array:
        """[block]."""
        scales = self.named[f"{name}_scales"].at[self.place_of_scales(number)]
        return plgpu.load(scales, layout=self.down)

    def channel_scales(self, name: str, number: Any, entry: int, channels: Any) -> Array:
        """[channels] of one of a block's pages; 0 for a page that is none."""
        scales = self.named[f"{name}_scales"].at[self.place_of_scales(number), entry, channels]
        found = plgpu.load(scales, layout=self.down)
        numbers = plgpu.broadcasted_iota(jnp.int32, found.shape, 0, layout=self.down)
        is_there = number * self.block_pages + entry < self.count
        return jnp.where(numbers < jnp.where(is_there, found.size, 0), found, 0.0)

    def scores(self, number: Any, place: Any, queries: Any) -> Array:
        """[block, columns]: products of keys and queries, without the scales of tokens."""
        if self.per != "channel":
            self.wait_to_multiply("keys", number, place)
            return self.product(self.keys.at[place], self.queries)
        # Their scales multiply the queries, which are fewer, and in float32: the sum of three numbers of 16 bits.
        self.wait_to_multiply("keys", number, place)
        size, width = self.num_columns, PARTS * self.num_columns
        for entry in range(self.block_pages):
            scales = self.channel_scales("keys", number, entry, pl.ds(0, queries.shape[0]))
            rest = queries * lax.broadcast_in_dim(scales, queries.shape, [0])
            for part in range(PARTS):
                rounded = rest.astype(self.scaled.dtype)
                self.store_across(self.scaled.at[pl.ds(entry * width + part * size, size)], rounded)
                rest = rest - rounded.astype(jnp.float32)
        plgpu.commit_smem()
        found = self.product(self.keys.at[place], self.scaled)
        slots = plgpu.broadcasted_iota(jnp.int32, (BLOCK_LEN, size), 0, layout=plgpu.Layout.WGMMA)
        scores = None
        for entry in range(self.block_pages):
            at = entry * width
            mine = sum((found[:, at + part * size : at + (part + 1) * size] for part in range(1, PARTS)), found[:, at : at + size])  # fmt: skip
            scores = mine if scores is None else jnp.where(slots >= entry * self.page_size, mine, scores)
        assert scores is not None
        return scores

    def weighed(self, values: Any, channels: Any, number: Any) -> Array:
        """[dims, columns]: the sum of a block's values times their weights."""
        size, shape = self.num_columns, (values.shape[1], self.num_columns)
        if self.per != "channel":
            both = self.product(values.transpose((1, 0)), self.weights)
            return both[:, :size] + both[:, size:]
        total = None
        for entry in range(self.block_pages):
            tokens = pl.ds(entry * self.page_size, self.page_size)
            both = self.product(values.at[tokens].transpose((1, 0)), self.weights.at[:, tokens])
            scales = self.channel_scales("values", number, entry, channels)
            part = both[:, :size] + both[:, size:]
            # Of a page of which nothing is seen the scale may be anything.
            part = jnp.where(part == 0, 0.0, part * lax.broadcast_in_dim(scales, shape, [0]))
            total = part if total is None else total + part
        assert total is not None
        return total

    def product(self, left: Any, right: Any) -> Array:
        """left [rows, k] @ right [columns, k]^T in float32, waited for."""

        def multiplied(sums):
            plgpu.wgmma(sums, left, right.transpose((1, 0)))
            return sums[...]

        shape = (left.shape[0], right.shape[0])
        return pl.run_scoped(multiplied, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

    def leave_page_sums(self, number: Any, exact: Array, shift: Array) -> None:
        """The log-sum-exp of each of a block's pages."""
        slots = plgpu.broadcasted_iota(jnp.int32, exact.shape, 0, layout=plgpu.Layout.WGMMA)
        plgpu.wait_smem_to_gmem(0)
        for entry in range(self.block_pages):
            begin, mine = entry * self.page_size, exact
            if self.block_pages > 1:
                mine = jnp.where((slots >= begin) & (slots < begin + self.page_size), exact, 0.0)
            total = mine.sum(axis=0)
            logs = jnp.where(total == 0, -jnp.inf, (jnp.log2(jnp.where(total == 0, 1.0, total)) + shift) / LOG2_E)
            self.pages_out[entry, pl.ds(0, self.num_columns)] = logs
        plgpu.commit_smem()

        def leave(entry):
            place = self.begin + number * self.block_pages + entry
            there = self.page_log_sum_exp.at[self.item, self.head, place]
            plgpu.copy_smem_to_gmem(self.pages_out.at[entry, pl.ds(0, self.num_columns)], there)

        self.each_page(number, leave)
