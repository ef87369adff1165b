"""A piece of a chunk, on Hopper: two warpgroups attend to the same pages, 64 rows each, and a third copies them.

Products and softmax run at once. Every warpgroup asks for the scores of a block and, behind them, for what the weights
of the block before come to; the second runs while it exponentiates the first. The two take turns at asking, so that
tensor cores get the work of one while the other has none."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_piece import Piece
from pallas_kernels.paged_attention.gpu_ring import LOG2_E, filled, halves
from pallas_kernels.paged_attention.gpu_tiles import stripes
from pallas_kernels.paged_attention.plan import BLOCK_LEN
from pallas_kernels.tensor_cores import ROWS

COPYING, ATTENDING = 40, 232
"""Registers of a thread that copies, and of one that attends: of three warpgroups each would have 168 else."""
LOWEST = float(jnp.finfo(jnp.float32).min)
"""Where the highest score begins: not at -inf, from which -inf cannot be taken."""


class Chunk(Piece):
    """One piece of 128 rows, of pages that are not quantised."""

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when((warpgroup == self.tile.num_consumers) & (self.part.count > 0))
        def _():
            plgpu.set_max_registers(COPYING, action="decrease")
            self.fetch_all()

        @pl.when((warpgroup < self.tile.num_consumers) & (self.part.count > 0))
        def _():
            plgpu.set_max_registers(ATTENDING, action="increase")
            self.attend(warpgroup)

    def attend(self, consumer: Any) -> None:
        """Of 64 rows over the piece's pages."""
        mine = pl.ds(consumer * ROWS, ROWS)
        value_stripes = stripes(self.part.values.blocks.shape[2])
        self.begin_rows(mine)
        pl.when(consumer == 1)(lambda: plgpu.barrier_arrive(self.tile.turns.at[0]))

        def first(scores):
            self.part.wait_for(self.part.keys.arrived, 0)
            self.in_turn(consumer, lambda: self.multiply_keys(scores, mine, 0))
            scores = plgpu.wgmma_accumulator_load(scores)
            return self.softmax(consumer, mine, 0, scores, filled((ROWS,), LOWEST, self.part.down))

        def block(number, state):
            sums, highest, total = state

            def multiplied(scores, *parts):
                self.start_sums(parts, sums)
                self.part.wait_for(self.part.keys.arrived, number)

                def multiply():
                    self.multiply_keys(scores, mine, number)
                    self.multiply_values(parts, mine, number - 1)

                self.in_turn(consumer, multiply)
                scores = plgpu.wgmma_accumulator_load(scores, wait_n=2 * len(parts))
                return self.softmax(consumer, mine, number, scores, highest), self.summed(parts, sums)

            (added, new, keep), sums = pl.run_scoped(multiplied, accumulator(BLOCK_LEN), *map(accumulator, widths))
            plgpu.barrier_arrive(self.part.free.at[lax.rem(number - 1, self.part.num_stages)])
            self.ready(consumer, number)
            sums = tuple(stripe_sums * lax.broadcast_in_dim(keep, stripe_sums.shape, [0]) for stripe_sums in sums)
            return sums, new, total * keep + added

        def last(*parts):
            self.start_sums(parts, sums)
            self.in_turn(consumer, lambda: self.multiply_values(parts, mine, self.part.num_blocks - 1))
            return self.summed(parts, sums)

        widths = [stripe.size for stripe in value_stripes]
        total, highest, _ = pl.run_scoped(first, accumulator(BLOCK_LEN))
        self.ready(consumer, 0)
        sums = tuple(filled((ROWS, width), 0, plgpu.Layout.WGMMA) for width in widths)
        sums, highest, total = lax.fori_loop(1, self.part.num_blocks, block, (sums, highest, total))
        sums = pl.run_scoped(last, *map(accumulator, widths))
        plgpu.barrier_arrive(self.part.free.at[lax.rem(self.part.num_blocks - 1, self.part.num_stages)])
        pl.when(consumer == 0)(lambda: plgpu.barrier_wait(self.tile.turns.at[0]))
        self.leave(consumer, sums, highest, total)

    def softmax(
        self, consumer: Any, mine: Any, number: Any, scores: Array, highest: Array
    ) -> tuple[Array, Array, Array]:
        """Leaves the weights of a block, while the values of the block before are multiplied; returns their sums, the
        new highest score, and what the old sums are worth."""
        starts, bits = self.part.listed(number)
        scores, factor = self.capped(mine, scores)
        scores = self.masked(mine, scores, starts, bits)
        new = jnp.maximum(highest, scores.max(axis=1) * factor)
        exact = jnp.exp2(scores * factor - lax.broadcast_in_dim(new, scores.shape, [0]))
        if self.tile.pages_out is not None:
            self.leave_page_sums(number, consumer, exact, new)
        total = exact.sum(axis=1)
        for half, weights in enumerate(halves(exact, self.tile.weights.dtype)):
            self.tile.weights[(number & 1) * 2 + half, mine] = weights
        return total, new, jnp.exp2(highest - new)

    def ready(self, consumer: Any, number: Any) -> None:
        """What weights are multiplied with, without what nobody may read: the first of the two sees to that in its
        turn."""
        starts, bits = self.part.listed(number)
        self.part.wait_for(self.part.values.arrived, number)
        pl.when((consumer == 0) & jnp.logical_not(self.part.is_whole(starts, bits)))(
            lambda: self.silence_block(lax.rem(number, self.part.num_stages), starts, bits)
        )
        plgpu.commit_smem()

    def in_turn(self, consumer: Any, multiply: Any) -> None:
        """Asks for products, once the other has asked for its own."""
        plgpu.barrier_wait(self.tile.turns.at[consumer])
        multiply()
        plgpu.barrier_arrive(self.tile.turns.at[1 - consumer])

    def multiply_keys(self, scores: Any, mine: Any, number: Any) -> None:
        place = lax.rem(number, self.part.num_stages)
        for columns in stripes(self.tile.queries.shape[1]):
            plgpu.wgmma(
                scores,
                self.tile.queries.at[mine, columns],
                self.part.keys.blocks.at[place, :, columns].transpose((1, 0)),
            )

    def multiply_values(self, parts: Any, mine: Any, number: Any) -> None:
        place = lax.rem(number, self.part.num_stages)
        for columns, part in zip(stripes(self.part.values.blocks.shape[2]), parts, strict=True):
            for half in range(2):
                plgpu.wgmma(
                    part,
                    self.tile.weights.at[(number & 1) * 2 + half, mine],
                    self.part.values.blocks.at[place, :, columns],
                )

    def start_sums(self, parts: Any, sums: tuple[Array, ...]) -> None:
        """Products are added to sums where those lie; the simulator cannot, so there they are added to zero, and
        `summed` adds both."""
        for part, start in zip(parts, () if self.tile.is_simulated else sums, strict=not self.tile.is_simulated):
            part[...] = start

    def summed(self, parts: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        found = tuple(map(plgpu.wgmma_accumulator_load, parts))
        return tuple(map(jnp.add, found, sums)) if self.tile.is_simulated else found

    def capped(self, mine: Any, scores: Array) -> tuple[Array, float]:
        """Scores, and what to multiply them with so that two to their power is their exponential."""
        if self.tile.row_scales is not None:
            factors = plgpu.load(self.tile.lse_out.at[mine], layout=self.part.down)
            scores = scores * lax.broadcast_in_dim(factors, scores.shape, [0])
        elif self.scoring.soft_cap is None and self.scoring.scale > 0:
            return scores, self.scoring.scale * LOG2_E
        else:
            scores = scores * self.scoring.scale
        return self.scoring.capped(scores), LOG2_E

    def masked(self, mine: Any, scores: Array, starts: list[Any], bits: list[Any]) -> Array:
        """Only what is seen; a block that every row sees all of, as it is, if no row is there to see nothing."""

        def seen():
            return jnp.where(self.seen(starts, bits, *self.bounds_of(mine)), scores, -jnp.inf)

        return lax.cond(
            self.part.is_whole(starts, bits) & (self.part.listed_pages.whole[self.part.item, 3] > 0),
            lambda: scores,
            seen,
        )


def accumulator(width: int) -> Any:
    """Sums of 64 rows, for a product."""
    return plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32)
