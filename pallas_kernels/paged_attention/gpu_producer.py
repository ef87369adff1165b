"""The warpgroup that asks for pages, as far ahead as the ring is deep, and turns quantised ones into 16 bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_ring import Part, Side
from pallas_kernels.paged_attention.plan import BLOCK_LEN

HEADROOM = 6
"""Keys scaled by channel are brought to at most 2 ** (this + 1) times their format's largest number, which float16
still holds."""


class Producer:
    """Of one piece."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def run(self) -> None:
        """All of the piece's pages."""
        self.produce() if self.part.per is None else self.produce_and_convert()

    def fetch(self, number: Any) -> None:
        """Asks for a block's pages."""
        stage = lax.rem(number, self.part.num_stages)
        for entry in range(self.part.block_pages):

            @pl.when(number * self.part.block_pages + entry < self.part.count)
            def _(entry=entry):
                place = self.part.begin + number * self.part.block_pages + entry
                page = self.part.listed_pages.pages[self.part.item, place]
                arrived = stage * self.part.block_pages + entry
                num_parts = self.part.keys.pages[0].shape[2] // self.part.page_size
                slots = pl.ds(lax.rem(page, num_parts) * self.part.page_size, self.part.page_size)
                page = lax.div(page, num_parts)
                target = pl.ds(entry * self.part.page_size, self.part.page_size)
                for side in (self.part.keys, self.part.values):
                    (payload, *scales), ring = side.pages, side.ring
                    barrier = side.arrived.at[arrived]
                    source = payload.at[page, self.part.head, slots]
                    if ring.shape[2] < payload.shape[3]:  # values are the first columns of the keys
                        source = payload.at[page, self.part.head, slots, pl.ds(0, ring.shape[2])]
                    plgpu.copy_gmem_to_smem(source, ring.at[stage, target], barrier)
                    for pool in scales:
                        kept = side.scales.at[self.part.place_of_scales(number)]
                        if self.part.per == "token":
                            mine, into = pool.at[page, self.part.head, slots], kept.at[target]
                        else:
                            mine, into = pool.at[page, self.part.head, pl.ds(0, kept.shape[1])], kept.at[entry]
                        plgpu.copy_gmem_to_smem(mine, into, barrier)

    def drain(self, num_slots: int) -> None:
        """A barrier must not end with a phase that its waiter has not seen."""
        done = lambda slot, _: plgpu.barrier_wait(self.part.free.at[slot])  # noqa: E731
        lax.fori_loop(0, jnp.minimum(self.part.num_blocks, num_slots), done, None)

    def produce(self) -> None:
        """Asks for pages, as soon as a stage of the ring is free."""

        def block(number, _):
            pl.when(number >= self.part.num_stages)(
                lambda: plgpu.barrier_wait(self.part.free.at[lax.rem(number, self.part.num_stages)])
            )
            self.fetch(number)

        lax.fori_loop(0, self.part.num_blocks, block, None)
        self.drain(self.part.num_stages)

    def produce_and_convert(self) -> None:
        """Asks for quantised pages a ring ahead, and turns what has arrived into 16 bits."""

        def block(number, _):
            stage, slot = lax.rem(number, self.part.num_stages), lax.rem(number, self.part.num_staged)
            pl.when(number >= self.part.num_staged)(lambda: plgpu.barrier_wait(self.part.free.at[slot]))
            for side in (self.part.keys, self.part.values):
                self.part.wait_for(side.arrived, number)
                self.convert(side, stage, slot)
                plgpu.commit_smem()  # all have read the ring and written what products take
                plgpu.barrier_arrive(side.staged.at[slot])
            pl.when(number + self.part.num_stages < self.part.num_blocks)(
                lambda: self.fetch(number + self.part.num_stages)
            )

        fill = lambda number, _: self.fetch(number)  # noqa: E731
        lax.fori_loop(0, jnp.minimum(self.part.num_blocks, self.part.num_stages), fill, None)
        lax.fori_loop(0, self.part.num_blocks, block, None)
        self.drain(self.part.num_staged)

    def convert(self, side: Side, stage: Any, slot: Any) -> None:
        """A block's numbers of 8 or 4 bits in 16."""
        into = side.blocks
        for columns, numbers in self.unpacked(side, stage):
            is_direct = numbers.dtype == jnp.int8 or (numbers.dtype != jnp.int32 and into.dtype == jnp.float16)
            wide = numbers if is_direct else numbers.astype(jnp.float32)
            into[slot, :, columns] = wide.astype(into.dtype)

    def unpacked(self, side: Side, stage: Any) -> Iterator[tuple[Any, Array]]:
        """The columns of a stage, some at a time, and what they hold in registers: two halves of them where a byte
        holds two."""
        ring = side.ring
        width, step = ring.shape[2], side.step
        for at in range(0, width, step):
            raw = plgpu.load(ring.at[stage, :, pl.ds(at, step)], layout=plgpu.Layout.WGMMA)
            if ring.dtype != jnp.uint8:
                yield pl.ds(at, step), raw
                continue
            whole = raw.astype(jnp.int32)
            for begin, place in ((at, 28), (at + width, 24)):
                yield pl.ds(begin, step), lax.shift_right_arithmetic(lax.shift_left(whole, place), 28)


@dataclass
class Scaled:
    """What a producer that multiplies scales of channels in works with: those of the queries' columns, and what keys
    were multiplied with to fit float16."""

    column_scales: Any
    columns: Any
    columns_arrived: Any
    key_factors: Any


class ScalingProducer(Producer):
    """Multiplies the scales of channels into keys and values, which become two halves of 16 bits."""

    def __init__(self, part: Part, scaled: Scaled) -> None:
        super().__init__(part)
        self.scaled = scaled

    def run(self) -> None:
        mine = self.scaled.column_scales.at[self.part.item, self.part.head]
        plgpu.copy_gmem_to_smem(mine, self.scaled.columns, self.scaled.columns_arrived)
        plgpu.barrier_wait(self.scaled.columns_arrived)
        super().run()

    def convert(self, side: Side, stage: Any, slot: Any) -> None:
        """A block of the ring, in the 16 bits of products. What rounding loses is kept in a second half: of bfloat16
        for values, of float16 for keys, which logits need more digits of, brought into its range by a power of two for
        each page."""
        into, fitting = side.blocks, self.fit_keys(stage, slot) if side is self.part.keys else None
        for columns, numbers in self.unpacked(side, stage):
            exact = numbers.astype(jnp.float32) * self.channel_scales(side, stage, columns)
            if fitting is not None:
                exact = exact * lax.broadcast_in_dim(fitting, exact.shape, [0])
            high = exact.astype(into.dtype)
            into[slot * 2, :, columns] = high
            into[slot * 2 + 1, :, columns] = (exact - high.astype(jnp.float32)).astype(into.dtype)

    def fit_keys(self, stage: Any, slot: Any) -> Array:
        """[block]: what each token's keys are multiplied with to fit float16. What that is of scores is left to whoever
        multiplies."""
        largest, step = None, self.part.keys.step
        for at in range(0, self.part.keys.blocks.shape[2], step):
            scales = jnp.abs(self.channel_scales(self.part.keys, stage, pl.ds(at, step))).max(axis=1)
            largest = scales if largest is None else jnp.maximum(largest, scales)
        assert largest is not None
        exponents = lax.shift_right_logical(lax.bitcast_convert_type(largest, jnp.int32), 23)
        exponents = jnp.minimum(jnp.maximum(exponents, 1 + HEADROOM), 253)

        def power_of_two(exponents):
            return lax.bitcast_convert_type(lax.shift_left(exponents, 23), jnp.float32)

        self.scaled.key_factors[slot] = power_of_two(exponents - HEADROOM)
        return power_of_two(254 + HEADROOM - exponents)

    def channel_scales(self, side: Side, stage: Any, columns: Any) -> Array:
        """[block, columns]: those of each token's page; for keys, with what the queries' columns were divided by."""
        scales, shape = side.scales, (BLOCK_LEN, columns.size)
        tokens = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        factors = None
        for entry in range(self.part.block_pages):
            of_page = plgpu.load(scales.at[stage, entry, columns], layout=plgpu.Layout.WGMMA.reduce(0))
            if side is self.part.keys:
                of_page = of_page * plgpu.load(self.scaled.columns.at[columns], layout=plgpu.Layout.WGMMA.reduce(0))
            of_page = lax.broadcast_in_dim(of_page, shape, [1])
            factors = of_page if factors is None else jnp.where(tokens >= entry * self.part.page_size, of_page, factors)
        assert factors is not None
        return factors
