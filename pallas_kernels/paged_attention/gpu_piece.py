"""The warpgroup that attends to one piece of a list of pages, with queries in rows."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import gpu_scales
from pallas_kernels.paged_attention.gpu_producer import Producer
from pallas_kernels.paged_attention.gpu_ring import LOG2_E, Part, Side, filled, halves
from pallas_kernels.paged_attention.gpu_tiles import stripes, value_stripes
from pallas_kernels.paged_attention.plan import BLOCK_LEN
from pallas_kernels.tensor_cores import ROWS, product


@dataclass(frozen=True)
class Rows:
    """The rows of a tile: queries and what is known of them, and where what they come to leaves."""

    rows: Any
    row_first: Any
    row_last: Any
    queries: Any
    queries_arrived: Any
    weights: Any
    sums_out: Any
    lse_out: Any
    outputs: Any
    log_sum_exp: Any
    memory: Any
    """What came of `tensor_cores.accumulators`."""
    num_halves: int
    """Numbers of 16 bits that one of keys or values is."""
    num_consumers: int
    padded_rows: int
    is_simulated: bool
    row_scales: Any = None
    key_factors: Any = None
    pages_out: Any = None
    page_log_sum_exp: Any = None
    turns: Any = None


class Piece:
    """One piece of 64 rows: a producer and what attends."""

    def __init__(self, part: Part, rows: Rows, producer: Producer) -> None:
        self.part, self.tile, self.producer, self.scoring = part, rows, producer, part.scoring
        chip = "blackwell" if rows.memory else "hopper"
        self.value_stripes = value_stripes(part.values.blocks.shape[2], chip)

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        pl.when((warpgroup == 1) & (self.part.count > 0))(self.fetch_all)
        pl.when((warpgroup == 0) & (self.part.count > 0))(lambda: self.attend(0))

    def fetch_all(self) -> None:
        """Queries, then pages."""
        rows = self.tile.rows.at[self.part.item, self.part.head]
        plgpu.copy_gmem_to_smem(rows, self.tile.queries.at[pl.ds(0, rows.shape[0])], self.tile.queries_arrived)
        self.producer.run()

    def attend(self, consumer: Any) -> None:
        """Of 64 rows over the piece's pages."""
        mine = pl.ds(consumer * ROWS, ROWS)
        lows, highs = self.bounds_of(mine)
        self.begin_rows(mine)

        def block(number, state):
            sums, highest, total = state
            place = lax.rem(number, self.part.num_staged if self.part.is_quantised else self.part.num_stages)
            starts, bits = self.part.listed(number)
            self.part.wait_to_multiply(self.part.keys, number, place)
            scores = self.scored(mine, place)
            if self.part.is_quantised:
                scores = scores * lax.broadcast_in_dim(self.key_scales(number, place), scores.shape, [1])
            scores = self.scoring.capped(scores)
            seen = self.seen(starts, bits, lows, highs)
            scores = jnp.where(seen, scores * LOG2_E, -jnp.inf)
            new = jnp.maximum(highest, scores.max(axis=1))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            keep = jnp.exp2(highest - shift)
            exact = jnp.exp2(scores - lax.broadcast_in_dim(shift, scores.shape, [0]))
            total = total * keep + exact.sum(axis=1)
            if self.tile.pages_out is not None:
                self.leave_page_sums(number, consumer, exact, shift)
            if self.part.is_quantised:
                self.part.wait_to_multiply(self.part.values, number, place)
            if self.part.is_quantised and self.tile.num_halves == 1:
                weighed = exact * lax.broadcast_in_dim(self.token_scales(self.part.values, number), scores.shape, [1])
                exact = jnp.where(exact > 0, weighed, 0.0)  # the scale of what nobody sees may be anything
            self.tile.weights[0, mine], self.tile.weights[1, mine] = halves(exact, self.tile.weights.dtype)
            if not self.part.is_quantised:
                self.part.wait_to_multiply(self.part.values, number, place)
            if self.part.values.may_be_nan or self.tile.num_halves == 2:  # scales may be, which they have in them
                pl.when(jnp.logical_not(self.part.is_whole(starts, bits)))(
                    lambda: self.silence_block(place, starts, bits)
                )
            plgpu.commit_smem()
            scaled = []
            for columns, stripe_sums in zip(self.value_stripes, sums, strict=True):
                part = self.weighed(mine, place, columns)
                scaled.append(stripe_sums * lax.broadcast_in_dim(keep, stripe_sums.shape, [0]) + part)
            plgpu.barrier_arrive(self.part.free.at[place])
            return tuple(scaled), new, total

        state = (
            tuple(filled((ROWS, stripe.size), 0, plgpu.Layout.WGMMA) for stripe in self.value_stripes),
            filled((ROWS,), -jnp.inf, self.part.down),
            filled((ROWS,), 0, self.part.down),
        )
        self.leave(consumer, *lax.fori_loop(0, self.part.num_blocks, block, state))

    def weighed(self, mine: Any, place: Any, columns: Any) -> Array:
        """A stripe of a block's values, times the weights of rows."""

        def terms(add):
            def of_halves(number, _):
                half, part = number // self.tile.num_halves, number % self.tile.num_halves
                values = self.part.values.blocks.at[place * self.tile.num_halves + part, :, columns]
                add(self.tile.weights.at[half, mine], values, first=number == 0)

            if self.tile.num_halves == 2:  # unrolled they spill, as do two in a loop
                lax.fori_loop(0, 4, of_halves, None)
            else:
                of_halves(0, None)
                of_halves(1, None)

        return product(self.tile.memory, columns.size, terms)

    def of_rows(self, numbers: Any) -> Array:
        """Of 64 rows. jax 0.11 takes loads of global memory only if they may be slow."""
        return plgpu.load(numbers, layout=self.part.down, optimized=False)

    def bounds_of(self, mine: Any) -> tuple[Array, Array]:
        """First and last position that each row sees."""
        return self.of_rows(self.tile.row_first.at[self.part.item, mine]), self.of_rows(
            self.tile.row_last.at[self.part.item, mine]
        )

    def begin_rows(self, mine: Any) -> None:
        """Waits for the queries."""
        if self.tile.row_scales is not None:  # kept where log-sum-exps will be: registers are scarce
            self.tile.lse_out[mine] = (
                self.of_rows(self.tile.row_scales.at[self.part.item, self.part.head, mine]) * self.scoring.scale
            )
            plgpu.commit_smem()
        plgpu.barrier_wait(self.tile.queries_arrived)

    def leave(self, consumer: Any, sums: tuple[Array, ...], highest: Array, total: Array) -> None:
        """What a piece comes to: normalised outputs, and their log-sum-exp."""
        mine, out = pl.ds(consumer * ROWS, ROWS), pl.ds(consumer * ROWS, self.tile.padded_rows)
        divisor = jnp.where(total == 0, 1.0, total)
        inverse = 1 / divisor
        self.tile.lse_out[mine] = jnp.where(total == 0, -jnp.inf, (highest + jnp.log2(divisor)) / LOG2_E)
        step = self.tile.sums_out.shape[1]
        for columns, stripe_sums in zip(self.value_stripes, sums, strict=True):
            shares = stripe_sums * lax.broadcast_in_dim(inverse, stripe_sums.shape, [0])
            for at in range(0, columns.size, step):
                plgpu.wait_smem_to_gmem(0)
                self.tile.sums_out[mine] = shares[:, at : at + step].astype(self.tile.sums_out.dtype)
                plgpu.commit_smem()
                into = self.tile.outputs.at[self.part.piece, self.part.head, out, pl.ds(columns.start + at, step)]
                plgpu.copy_smem_to_gmem(self.tile.sums_out.at[out], into)
        plgpu.copy_smem_to_gmem(
            self.tile.lse_out.at[out], self.tile.log_sum_exp.at[self.part.piece, self.part.head, out]
        )
        plgpu.wait_smem_to_gmem(0)

    def key_scales(self, number: Any, place: Any) -> Array:
        """[block]: what products with keys were left to be multiplied with."""
        if self.tile.num_halves == 1:
            return self.token_scales(self.part.keys, number)
        return plgpu.load(self.tile.key_factors.at[place], layout=plgpu.Layout.WGMMA.reduce(0))

    def token_scales(self, side: Side, number: Any) -> Array:
        """[block]."""
        kept = side.scales.at[self.part.place_of_scales(number)]
        return gpu_scales.of_tokens(side.scheme, kept, 0, plgpu.Layout.WGMMA.reduce(0))

    def scored(self, mine: Any, place: Any) -> Array:
        """Scaled products of rows with a block's keys."""

        def terms(add):
            width, num_halves = stripes(self.tile.queries.shape[1])[0].size, self.tile.num_halves

            def stripe(number, _):  # a loop: unrolled over 256 dims it spills
                columns, part = pl.ds(lax.div(number, num_halves) * width, width), lax.rem(number, num_halves)
                keys = self.part.keys.blocks.at[place * num_halves + part, :, columns].transpose((1, 0))
                add(self.tile.queries.at[mine, columns], keys, first=number == 0)

            lax.fori_loop(0, self.tile.queries.shape[1] // width * num_halves, stripe, None)

        scores = product(self.tile.memory, BLOCK_LEN, terms)
        if self.tile.row_scales is None:
            return scores * self.scoring.scale
        factors = plgpu.load(self.tile.lse_out.at[mine], layout=self.part.down)
        return scores * lax.broadcast_in_dim(factors, scores.shape, [0])

    def seen(self, starts: list[Any], bits: list[tuple[int, Any]], lows: Array, highs: Array) -> Array:
        """[rows, block]."""
        shape = (ROWS, BLOCK_LEN)
        slots = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        positions = self.part.positions_of(slots, starts)
        seen = self.part.only_valid(positions <= lax.broadcast_in_dim(highs, shape, [0]), slots, bits)
        if self.scoring.num_sinks is None:
            return seen
        inside = positions >= lax.broadcast_in_dim(lows, shape, [0])
        return seen & (inside | (positions < self.scoring.num_sinks))

    def silence_block(self, place: Any, starts: list[Any], bits: list[tuple[int, Any]]) -> None:
        """What nobody sees of the values in a place of the ring, or of the staged blocks."""
        # With the columns that products take at once, or fewer, as it spills less: 32 bytes else, of one half or two.
        step = self.part.values.step if self.tile.num_halves == 1 else stripes(self.part.values.blocks.shape[2])[0].size
        blocks = [
            self.part.values.blocks.at[place * self.tile.num_halves + part] for part in range(self.tile.num_halves)
        ]
        self.part.silence(blocks, step, starts, bits)

    def leave_page_sums(self, number: Any, consumer: Any, exact: Array, shift: Array) -> None:
        """The log-sum-exp of each of a block's pages."""
        slots = plgpu.broadcasted_iota(jnp.int32, exact.shape, 1, layout=plgpu.Layout.WGMMA)
        plgpu.wait_smem_to_gmem(0)
        for entry in range(self.part.block_pages):
            begin, mine = entry * self.part.page_size, exact
            if self.part.block_pages > 1:
                mine = jnp.where((slots >= begin) & (slots < begin + self.part.page_size), exact, 0.0)
            total = mine.sum(axis=1)
            logs = jnp.where(total == 0, -jnp.inf, (jnp.log2(jnp.where(total == 0, 1.0, total)) + shift) / LOG2_E)
            self.tile.pages_out[consumer * self.part.block_pages + entry] = logs
        plgpu.commit_smem()

        def leave(entry):
            place = self.part.begin + number * self.part.block_pages + entry
            rows = pl.ds(consumer * ROWS, self.tile.padded_rows)
            source = self.tile.pages_out.at[consumer * self.part.block_pages + entry, pl.ds(0, self.tile.padded_rows)]
            plgpu.copy_smem_to_gmem(source, self.tile.page_log_sum_exp.at[self.part.item, self.part.head, place, rows])

        self.part.each_page(number, leave)
