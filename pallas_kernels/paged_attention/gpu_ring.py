"""Pages on their way through a GPU's shared memory: asked for, waited for, turned into 16 bits, and what may be seen of them.

A block is 64 tokens: one page, several, or a part of one. Its pages come by TMA into a stage of a ring; every page has a barrier of
its own. Pages of 16 bits are multiplied in the ring, `keys` and `values`. Quantised ones come into `keys_ring` and `values_ring`, and
are turned into numbers of 16 bits, exactly, in staged blocks: their scales are left to whoever multiplies.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.masking import NOWHERE
from pallas_kernels.paged_attention.plan import BLOCK_LEN
from pallas_kernels.paged_attention.sharing import WORD
from pallas_kernels.tensor_cores import Named

LOG2_E = math.log2(math.e)


def filled(shape: tuple[int, ...], value: Any, layout: Any) -> Array:
    """Float32 in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


class Ring(Named):
    """Entries [begin, begin + count) of an item's list of pages, for one KV head: refs and sizes by name, `piece` and `head` among
    them."""

    def __init__(self, refs: dict[str, Any], **options: Any) -> None:
        super().__init__({"words": None, **refs, **options})
        self.item, self.begin, self.count = (self.pieces[self.piece, place] for place in range(3))
        self.block_pages = BLOCK_LEN // self.page_size
        self.num_blocks = pl.cdiv(self.count, self.block_pages)
        self.down, self.across = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    # Pages: asked for, and turned into 16 bits.

    def fetch(self, number: Any) -> None:
        """Asks for a block's pages."""
        stage = lax.rem(number, self.num_stages)
        for entry in range(self.block_pages):

            @pl.when(number * self.block_pages + entry < self.count)
            def _(entry=entry):
                page = self.pages[self.item, self.begin + number * self.block_pages + entry]
                arrived = stage * self.block_pages + entry
                num_parts = self.key_pages[0].shape[2] // self.page_size
                part = pl.ds(lax.rem(page, num_parts) * self.page_size, self.page_size)
                page = lax.div(page, num_parts)
                target = pl.ds(entry * self.page_size, self.page_size)
                for name in ("keys", "values"):
                    payload, *scales = self.named["key_pages" if name == "keys" else "value_pages"]
                    barrier, ring = self.named[f"{name}_arrived"].at[arrived], self.ring_of(name)
                    source = payload.at[page, self.head, part]
                    if ring.shape[2] < payload.shape[3]:  # values are the first columns of the keys
                        source = payload.at[page, self.head, part, pl.ds(0, ring.shape[2])]
                    plgpu.copy_gmem_to_smem(source, ring.at[stage, target], barrier)
                    for one in scales:
                        kept = self.named[f"{name}_scales"].at[self.place_of_scales(number)]
                        if self.per == "token":
                            mine, into = one.at[page, self.head, part], kept.at[target]
                        else:
                            mine, into = one.at[page, self.head, pl.ds(0, kept.shape[1])], kept.at[entry]
                        plgpu.copy_gmem_to_smem(mine, into, barrier)

    def ring_of(self, name: str) -> Any:
        """What pages of keys or values are copied into."""
        return self.named[name if self.per is None else f"{name}_ring"]

    def place_of_scales(self, number: Any) -> Any:
        """They are needed for as long as the staged block is, which is longer than the stage."""
        return lax.rem(number, self.num_stages + self.num_staged)

    def each_page(self, number: Any, do: Any) -> None:
        """`do(entry)` for the pages of a block that there are."""
        for entry in range(self.block_pages):
            pl.when(number * self.block_pages + entry < self.count)(partial(do, entry))

    def wait_for(self, arrived: Any, number: Any) -> None:
        """Until a block's pages are there."""
        stage = lax.rem(number, self.num_stages)
        self.each_page(number, lambda entry: plgpu.barrier_wait(arrived.at[stage * self.block_pages + entry]))

    def wait_to_multiply(self, name: str, number: Any, place: Any) -> None:
        """Until a block of keys or values is in its place of the ring, or of the staged blocks."""
        if self.per is None:
            self.wait_for(self.named[f"{name}_arrived"], number)
        else:
            plgpu.barrier_wait(self.named[f"{name}_staged"].at[place])

    def drain(self, num_slots: int) -> None:
        """A barrier must not end with a phase that its waiter has not seen."""
        done = lambda slot, _: plgpu.barrier_wait(self.free.at[slot])  # noqa: E731
        lax.fori_loop(0, jnp.minimum(self.num_blocks, num_slots), done, None)

    def produce(self) -> None:
        """Asks for pages, as soon as a stage of the ring is free."""

        def block(number, _):
            pl.when(number >= self.num_stages)(
                lambda: plgpu.barrier_wait(self.free.at[lax.rem(number, self.num_stages)])
            )
            self.fetch(number)

        lax.fori_loop(0, self.num_blocks, block, None)
        self.drain(self.num_stages)

    def produce_and_convert(self) -> None:
        """Asks for quantised pages a ring ahead, and turns what has arrived into 16 bits."""

        def block(number, _):
            stage, slot = lax.rem(number, self.num_stages), lax.rem(number, self.num_staged)
            pl.when(number >= self.num_staged)(lambda: plgpu.barrier_wait(self.free.at[slot]))
            for name in ("keys", "values"):
                self.wait_for(self.named[f"{name}_arrived"], number)
                self.convert(name, stage, slot)
                plgpu.commit_smem()  # all have read the ring and written what products take
                plgpu.barrier_arrive(self.named[f"{name}_staged"].at[slot])
            pl.when(number + self.num_stages < self.num_blocks)(lambda: self.fetch(number + self.num_stages))

        fill = lambda number, _: self.fetch(number)  # noqa: E731
        lax.fori_loop(0, jnp.minimum(self.num_blocks, self.num_stages), fill, None)
        lax.fori_loop(0, self.num_blocks, block, None)
        self.drain(self.num_staged)

    def convert(self, name: str, stage: Any, slot: Any) -> None:
        """A block's numbers of 8 or 4 bits in 16."""
        into = self.named[name]
        for columns, numbers in self.unpacked(name, stage):
            is_direct = numbers.dtype == jnp.int8 or (numbers.dtype != jnp.int32 and into.dtype == jnp.float16)
            wide = numbers if is_direct else numbers.astype(jnp.float32)
            into[slot, :, columns] = wide.astype(into.dtype)

    def unpacked(self, name: str, stage: Any) -> Iterator[tuple[Any, Array]]:
        """The columns of a stage, some at a time, and what they hold in registers: two halves of them where a byte holds two."""
        ring = self.named[f"{name}_ring"]
        width, step = ring.shape[2], self.steps[name]
        for at in range(0, width, step):
            raw = plgpu.load(ring.at[stage, :, pl.ds(at, step)], layout=plgpu.Layout.WGMMA)
            if ring.dtype != jnp.uint8:
                yield pl.ds(at, step), raw
                continue
            whole = raw.astype(jnp.int32)
            for begin, place in ((at, 28), (at + width, 24)):
                yield pl.ds(begin, step), lax.shift_right_arithmetic(lax.shift_left(whole, place), 28)

    def halves(self, exact: Array) -> tuple[Array, Array]:
        """Weights in two numbers of 16 bits, which lose nothing: one alone would take the error of what is returned to 1.3 or 1.5 times
        that of its own rounding. The first is cut, not rounded: that takes no conversion back."""
        dtype = self.weights.dtype
        bits = lax.bitcast_convert_type(exact, jnp.int32) & (-1 << (23 - jnp.finfo(dtype).nmant))
        high = lax.bitcast_convert_type(bits, jnp.float32)
        return high.astype(dtype), (exact - high).astype(dtype)

    # What is seen of a block: tokens lie along `axis` of an array, or alone.

    def listed(self, number: Any) -> tuple[list[Any], list[tuple[int, Any]]]:
        """First positions of a block's pages; and of its slots' validity, where those of each word begin, and the word."""
        entries = [number * self.block_pages + entry for entry in range(self.block_pages)]
        last = self.begin + self.count - 1

        def of_entry(one, read, unused):
            return jnp.where(one < self.count, read(jnp.minimum(self.begin + one, last)), unused)

        starts = [of_entry(one, lambda at: self.starts[self.item, at], NOWHERE) for one in entries]
        bits, words = [], self.words
        if words is not None:
            span = min(self.page_size, WORD)
            for place in range(0, BLOCK_LEN, span):
                one, word = entries[place // self.page_size], place % self.page_size // span
                bits.append((place, of_entry(one, lambda at, word=word: words[self.item, at, word], 0)))
        return starts, bits

    def positions_of(self, slots: Array, starts: list[Any]) -> Array:
        """Of a block's slots."""
        positions = slots + starts[0]
        for entry, start in enumerate(starts[1:], 1):
            begin = entry * self.page_size
            positions = jnp.where(slots >= begin, slots + (start - begin), positions)
        return positions

    def only_valid(self, seen: Array, slots: Array, bits: list[tuple[int, Any]]) -> Array:
        """Those that `bits` allow."""
        if not bits:
            return seen
        of_slot = jnp.zeros_like(slots)
        for place, word in bits:
            of_slot = jnp.where(slots >= place, word, of_slot)
        span = min(self.page_size, WORD)
        return seen & (lax.shift_right_logical(of_slot, lax.rem(slots, span)) & 1 > 0)

    def is_whole(self, starts: list[Any], bits: list[tuple[int, Any]]) -> Any:
        """Whether every query sees all of a block."""
        low, high = self.whole[self.item, 0], self.whole[self.item, 1]
        is_whole = True
        for start in starts:
            is_whole = is_whole & (start >= low) & (start + self.page_size - 1 <= high)
        span = min(self.page_size, WORD)
        for _, word in bits:
            is_whole = is_whole & (word == ((1 << span) - 1 if span < WORD else -1))
        return is_whole

    def silence(self, blocks: list[Any], step: int, starts: list[Any], bits: list[tuple[int, Any]]) -> None:
        """A weight of zero does not silence a NaN: what no query sees of a block's values [64, Dv] is replaced, `step` columns at a
        time; several `blocks` hold them where their numbers have several parts."""
        slots = plgpu.broadcasted_iota(jnp.int32, (BLOCK_LEN,), 0, layout=self.down)
        places = self.positions_of(slots, starts)

        def of_query(query, readable):
            seen = places <= self.last[self.item, query]
            seen = seen & ((places >= self.first[self.item, query]) | (places < self.num_sinks))
            return jnp.where(seen, 1, readable)

        if self.num_sinks is None:
            readable = jnp.where(places <= self.whole[self.item, 2], 1, 0)
        else:
            nothing = plgpu.layout_cast(jnp.zeros((BLOCK_LEN,), jnp.int32), self.down)
            readable = lax.fori_loop(0, self.last.shape[1], of_query, nothing)
        readable = jnp.where(self.only_valid(readable > 0, slots, bits), 1, 0)
        for at in range(0, blocks[0].shape[1], step):
            for block in blocks:
                columns = block.at[:, pl.ds(at, step)]
                kept = plgpu.load(columns, layout=plgpu.Layout.WGMMA)
                keeps = lax.broadcast_in_dim(readable, kept.shape, [0]) > 0
                columns[...] = jnp.where(keeps, kept, jnp.zeros((), kept.dtype))
