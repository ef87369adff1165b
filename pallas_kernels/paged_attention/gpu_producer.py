"""The warpgroup that asks for pages, as far ahead as the ring is deep, and turns quantised ones into 16 bits. Where
registers allow it there are two: one for keys, one for values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import INVERSE_STEPS, SHARED
from pallas_kernels.paged_attention import gpu_scales
from pallas_kernels.paged_attention.gpu_ring import Part, Side
from pallas_kernels.paged_attention.plan import BLOCK_LEN
from pallas_kernels.rounding import part_of

HEADROOM = 6
"""Keys scaled by channel are brought to at most 2 ** (this + 1) times their format's largest number, which float16
still holds."""


class Producer:
    """Of one piece: of keys and values, or of one of the two."""

    def __init__(self, part: Part, sides: Sequence[Side] | None = None) -> None:
        """Without `sides` of both, but for values that are columns of the keys' ring."""
        both = (part.keys,) if part.values.arrived is None else (part.keys, part.values)
        self.part, self.sides = part, sides or both

    def run(self) -> None:
        """All of the piece's pages."""
        self.produce_and_convert() if self.part.is_quantised else self.produce()

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
                for side in self.sides:
                    (payload, *pools), ring = side.pages, side.ring
                    barrier = side.arrived.at[arrived]
                    source = payload.at[page, self.part.head, slots]
                    if ring.shape[2] < payload.shape[3]:  # values are the first columns of the keys
                        source = payload.at[page, self.part.head, slots, pl.ds(0, ring.shape[2])]
                    plgpu.copy_gmem_to_smem(source, ring.at[stage, target], barrier)
                    for pool, kept in zip(pools, (side.scales, side.zeros), strict=False):
                        here = kept.at[self.part.place_of_scales(number)]
                        gpu_scales.copy(side.scheme, pool, here, page, self.part.head, slots, entry, barrier)

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
            for side in self.sides:
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
        """A block's numbers of 8 bits or fewer in 16."""
        into = side.blocks
        for columns, numbers in list(self.unpacked(side, stage, into.dtype)):  # all, before any write waits for others
            into[slot, :, columns] = numbers

    def unpacked(self, side: Side, stage: Any, dtype: Any) -> Iterator[tuple[Any, Array]]:
        """The columns of a stage, some at a time, and what they hold in registers, in 16 bits: several parts of them
        where a byte holds as many."""
        ring, shared = side.ring, SHARED.get(side.scheme.format, 1)
        width, step = ring.shape[2], side.step
        for at in range(0, width, step):
            raw = plgpu.load(ring.at[stage, :, pl.ds(at, step)], layout=plgpu.Layout.WGMMA)
            if shared == 1:
                is_direct = raw.dtype == jnp.int8 or dtype == jnp.float16
                yield pl.ds(at, step), (raw if is_direct else raw.astype(jnp.float32)).astype(dtype)
                continue
            for number in range(shared):
                part = part_of(raw, number, shared, dtype, is_signed=side.zeros is None)
                yield pl.ds(at + number * width, step), part


@dataclass
class Scaled:
    """What a producer that multiplies scales of channels in works with: those of the queries' columns, and what keys
    were multiplied with to fit float16."""

    column_scales: Any
    columns: Any
    columns_arrived: Any
    key_factors: Any


class ScalingProducer(Producer):
    """Multiplies scales into keys and values, and adds zeros: they become two halves of 16 bits."""

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
        for columns, numbers in self.unpacked(side, stage, into.dtype):
            exact = numbers.astype(jnp.float32) * self.factors(side, side.scales, stage, columns)
            if side.zeros is not None:
                exact = exact + self.factors(side, side.zeros, stage, columns)
            if fitting is not None:
                exact = exact * lax.broadcast_in_dim(fitting, exact.shape, [0])
            high = exact.astype(into.dtype)
            into[slot * 2, :, columns] = high
            into[slot * 2 + 1, :, columns] = (exact - high.astype(jnp.float32)).astype(into.dtype)

    def fit_keys(self, stage: Any, slot: Any) -> Array:
        """[block]: what each token's keys are multiplied with to fit float16. What that is of scores is left to whoever
        multiplies."""
        largest, keys = None, self.part.keys
        for at in range(0, keys.blocks.shape[2], keys.step):
            scales = jnp.abs(self.factors(keys, keys.scales, stage, pl.ds(at, keys.step))).max(axis=1)
            largest = scales if largest is None else jnp.maximum(largest, scales)
            if keys.zeros is not None:
                zeros = jnp.abs(self.factors(keys, keys.zeros, stage, pl.ds(at, keys.step))).max(axis=1)
                largest = jnp.maximum(largest, zeros * INVERSE_STEPS[keys.scheme.format])
        assert largest is not None
        exponents = lax.shift_right_logical(lax.bitcast_convert_type(largest, jnp.int32), 23)
        exponents = jnp.minimum(jnp.maximum(exponents, 1 + HEADROOM), 253)

        def power_of_two(exponents):
            return lax.bitcast_convert_type(lax.shift_left(exponents, 23), jnp.float32)

        self.scaled.key_factors[slot] = power_of_two(exponents - HEADROOM)
        return power_of_two(254 + HEADROOM - exponents)

    def factors(self, side: Side, scales: Any, stage: Any, columns: Any) -> Array:
        """[block, columns]: scales, or zeros, of tokens and of channels of each token's page; for keys, with what the
        queries' columns were divided by."""
        shape, across = (BLOCK_LEN, columns.size), plgpu.Layout.WGMMA.reduce(0)
        if side.scheme.per == "token":
            group = columns.start // side.scheme.group if side.scheme.group else 0
            of_tokens = gpu_scales.of_tokens(side.scheme, scales.at[stage], group, plgpu.Layout.WGMMA.reduce(1))
            return lax.broadcast_in_dim(of_tokens, shape, [0])
        tokens = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        factors = None
        for entry in range(self.part.block_pages):
            of_page = plgpu.load(scales.at[stage, entry, columns], layout=across).astype(jnp.float32)
            if side is self.part.keys:
                of_page = of_page * plgpu.load(self.scaled.columns.at[columns], layout=across)
            of_page = lax.broadcast_in_dim(of_page, shape, [1])
            factors = of_page if factors is None else jnp.where(tokens >= entry * self.part.page_size, of_page, factors)
        assert factors is not None
        return factors
