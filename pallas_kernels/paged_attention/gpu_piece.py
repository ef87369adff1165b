"""The GPU kernel of paged attention: what the two warpgroups of a thread block do with one piece of a list of pages."""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.masking import NOWHERE
from pallas_kernels.paged_attention.gpu_tiles import BLOCK_LEN, stripes
from pallas_kernels.paged_attention.pages import WORD
from pallas_kernels.tensor_cores import ROWS, Named, product

LOG2_E = math.log2(math.e)
HEADROOM = 6
"""Keys scaled by channel are brought to at most 2 ** (this + 1) times their format's largest number, which float16 still holds."""


def filled(shape: tuple[int, ...], value: Any, layout: Any) -> Array:
    """Float32 in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


class Piece(Named):
    """One piece, in the kernel: entries [begin, begin + count) of an item's list of pages, for one KV head."""

    def __init__(self, refs: dict[str, Any], **options: Any) -> None:
        super().__init__({"words": None, "row_scales": None, **refs, **options})
        piece, self.head = lax.axis_index("piece"), lax.axis_index("head")
        self.piece = piece
        self.item, self.begin, self.count = self.pieces[piece, 0], self.pieces[piece, 1], self.pieces[piece, 2]
        self.block_pages = BLOCK_LEN // self.page_size
        self.num_blocks = pl.cdiv(self.count, self.block_pages)
        self.num_stages, self.num_halves = self.tiles.num_stages, self.tiles.num_halves
        self.down = plgpu.Layout.WGMMA.reduce(1)

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        pl.when((warpgroup == 1) & (self.count > 0))(self.produce)
        pl.when((warpgroup == 0) & (self.count > 0))(lambda: self.attend(0))

    # Pages: asked for, and turned into 16 bits.

    def fetch_queries(self) -> None:
        rows = self.rows.at[self.item, self.head]
        plgpu.copy_gmem_to_smem(rows, self.queries.at[pl.ds(0, rows.shape[0])], self.queries_arrived)
        if self.per == "channel":
            plgpu.copy_gmem_to_smem(self.column_scales.at[self.item, self.head], self.columns, self.columns_arrived)

    def fetch(self, number: Any) -> None:
        """Asks for a block's pages."""
        stage = lax.rem(number, self.num_stages)
        for entry in range(self.block_pages):

            @pl.when(number * self.block_pages + entry < self.count)
            def _(entry=entry):
                page = self.pages[self.item, self.begin + number * self.block_pages + entry]
                place = stage * self.block_pages + entry
                size = self.page_size
                num_parts = self.key_pages[0].shape[2] // size
                part = pl.ds(lax.rem(page, num_parts) * size, size)
                page = lax.div(page, num_parts)
                target = pl.ds(entry * size, size)
                for name in ("keys", "values"):
                    payload, *scales = self.named["key_pages" if name == "keys" else "value_pages"]
                    arrived, ring = self.named[f"{name}_arrived"].at[place], self.named.get(f"{name}_ring")
                    ring = self.named[name] if ring is None else ring
                    plgpu.copy_gmem_to_smem(payload.at[page, self.head, part], ring.at[stage, target], arrived)
                    for one in scales:
                        kept, depth = self.named[f"{name}_scales"], self.num_stages + self.tiles.num_staged
                        if self.per == "token":
                            mine, into = one.at[page, self.head, part], kept.at[lax.rem(number, depth), target]
                        else:
                            mine, into = one.at[page, self.head], kept.at[stage, entry]
                        plgpu.copy_gmem_to_smem(mine, into, arrived)

    def each_page(self, number: Any, do: Any) -> None:
        for entry in range(self.block_pages):
            pl.when(number * self.block_pages + entry < self.count)(partial(do, entry))

    def wait_for(self, arrived: Any, number: Any) -> None:
        """Until a block's pages are there."""
        stage = lax.rem(number, self.num_stages)
        self.each_page(number, lambda entry: plgpu.barrier_wait(arrived.at[stage * self.block_pages + entry]))

    def drain(self, num_slots: int) -> None:
        """A barrier must not end with a phase that its waiter has not seen."""
        done = lambda slot, _: plgpu.barrier_wait(self.free.at[slot])  # noqa: E731
        lax.fori_loop(0, jnp.minimum(self.num_blocks, num_slots), done, None)

    def produce(self) -> None:
        """Asks for pages: as soon as a stage of the ring is free."""
        self.fetch_queries()
        if self.per is None:

            def block(number, _):
                pl.when(number >= self.num_stages)(
                    lambda: plgpu.barrier_wait(self.free.at[lax.rem(number, self.num_stages)])
                )
                self.fetch(number)

            lax.fori_loop(0, self.num_blocks, block, None)
            self.drain(self.num_stages)
            return

        def convert_block(number, _):
            stage, slot = lax.rem(number, self.num_stages), lax.rem(number, self.tiles.num_staged)
            pl.when(number >= self.tiles.num_staged)(lambda: plgpu.barrier_wait(self.free.at[slot]))
            for name in ("keys", "values"):
                self.wait_for(self.named[f"{name}_arrived"], number)
                self.convert(name, stage, slot)
                plgpu.commit_smem()  # all have read the ring and written what products take
                plgpu.barrier_arrive(self.named[f"{name}_staged"].at[slot])
            pl.when(number + self.num_stages < self.num_blocks)(lambda: self.fetch(number + self.num_stages))

        fill = lambda number, _: self.fetch(number)  # noqa: E731
        lax.fori_loop(0, jnp.minimum(self.num_blocks, self.num_stages), fill, None)
        if self.per == "channel":
            plgpu.barrier_wait(self.columns_arrived)
        lax.fori_loop(0, self.num_blocks, convert_block, None)
        self.drain(self.tiles.num_staged)

    def convert(self, name: str, stage: Any, slot: Any) -> None:
        """A block of the ring, in the 16 bits of products. Scales of tokens are left to scores and weights, where they are fewer;
        those of channels are multiplied in, and what rounding loses is kept in a second half: of bfloat16 for values, of float16 for
        keys, which logits need more digits of, brought into its range by a power of two for each page."""
        ring, into = self.named[f"{name}_ring"], self.named[name]
        is_packed = ring.dtype == jnp.uint8
        width = ring.shape[2]
        step = self.steps[name]
        fitting = self.fit_keys(stage, slot) if self.per == "channel" and name == "keys" else None
        for at in range(0, width, step):
            raw = plgpu.load(ring.at[stage, :, pl.ds(at, step)], layout=plgpu.Layout.WGMMA)
            numbers = [(at, raw)]
            if is_packed:
                whole = raw.astype(jnp.int32)
                numbers = [
                    (at, lax.shift_right_arithmetic(lax.shift_left(whole, 28), 28)),
                    (at + width, lax.shift_right_arithmetic(lax.shift_left(whole, 24), 28)),
                ]
            for begin, one in numbers:
                columns = pl.ds(begin, step)
                if self.num_halves == 1:
                    is_direct = one.dtype == jnp.int8 or (one.dtype != jnp.int32 and into.dtype == jnp.float16)
                    one = one if is_direct else one.astype(jnp.float32)
                    into[slot, :, columns] = one.astype(into.dtype)
                    continue
                exact = one.astype(jnp.float32) * self.channel_scales(name, stage, columns)
                if fitting is not None:
                    exact = exact * lax.broadcast_in_dim(fitting, exact.shape, [0])
                high = exact.astype(into.dtype)
                into[slot * 2, :, columns] = high
                into[slot * 2 + 1, :, columns] = (exact - high.astype(jnp.float32)).astype(into.dtype)

    def fit_keys(self, stage: Any, slot: Any) -> Array:
        """[block]: what each token's keys are multiplied with to fit float16. What that is of scores is left for `scored`."""
        largest, step = None, self.steps["keys"]
        for at in range(0, self.keys.shape[2], step):
            scales = jnp.abs(self.channel_scales("keys", stage, pl.ds(at, step))).max(axis=1)
            largest = scales if largest is None else jnp.maximum(largest, scales)
        assert largest is not None
        exponents = lax.shift_right_logical(lax.bitcast_convert_type(largest, jnp.int32), 23)
        exponents = jnp.minimum(jnp.maximum(exponents, 1 + HEADROOM), 253)

        def power_of_two(exponents):
            return lax.bitcast_convert_type(lax.shift_left(exponents, 23), jnp.float32)

        self.key_factors[slot] = power_of_two(exponents - HEADROOM)
        return power_of_two(254 + HEADROOM - exponents)

    def channel_scales(self, name: str, stage: Any, columns: Any) -> Array:
        """[block, columns]: those of each token's page; for keys, with what the queries' columns were divided by."""
        scales, shape = self.named[f"{name}_scales"], (BLOCK_LEN, columns.size)
        tokens = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        factors = None
        for entry in range(self.block_pages):
            of_page = plgpu.load(scales.at[stage, entry, columns], layout=plgpu.Layout.WGMMA.reduce(0))
            if name == "keys":
                of_page = of_page * plgpu.load(self.columns.at[columns], layout=plgpu.Layout.WGMMA.reduce(0))
            of_page = lax.broadcast_in_dim(of_page, shape, [1])
            factors = of_page if factors is None else jnp.where(tokens >= entry * self.page_size, of_page, factors)
        assert factors is not None
        return factors

    # Attention: block by block.

    def attend(self, consumer: Any) -> None:
        """Of 64 rows over the piece's pages."""
        mine = pl.ds(consumer * ROWS, ROWS)
        value_stripes = stripes(self.values.shape[2])
        lows, highs = self.bounds_of(mine)
        self.begin_rows(mine)

        def block(number, state):
            sums, highest, total = state
            place = lax.rem(number, self.num_stages if self.per is None else self.tiles.num_staged)
            starts, bits = self.listed(number)
            self.wait_to_multiply("keys", number, place)
            scores = self.scored(mine, place)
            if self.per is not None:
                scores = scores * lax.broadcast_in_dim(self.key_scales(number, place), scores.shape, [1])
            if self.soft_cap is not None:
                scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
            seen = self.seen(starts, bits, lows, highs)
            scores = jnp.where(seen, scores * LOG2_E, -jnp.inf)
            new = jnp.maximum(highest, scores.max(axis=1))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            keep = jnp.exp2(highest - shift)
            exact = jnp.exp2(scores - lax.broadcast_in_dim(shift, scores.shape, [0]))
            total = total * keep + exact.sum(axis=1)
            if "pages_out" in self.named:
                self.leave_page_sums(number, consumer, exact, shift)
            if self.per is not None:
                self.wait_to_multiply("values", number, place)
            if self.per == "token":
                weighed = exact * lax.broadcast_in_dim(self.token_scales("values", number), scores.shape, [1])
                exact = jnp.where(exact > 0, weighed, 0.0)  # the scale of what nobody sees may be anything
            self.weights[0, mine], self.weights[1, mine] = self.halves(exact)
            if self.per is None:
                self.wait_to_multiply("values", number, place)
            if not (self.per == "token" and self.values_ring.dtype != jnp.float8_e4m3fn):
                pl.when(jnp.logical_not(self.is_whole(starts, bits)))(lambda: self.silence(place, starts, bits))
            plgpu.commit_smem()

            scaled = []
            for columns, one in zip(value_stripes, sums, strict=True):

                def terms(add, columns=columns):
                    def of_halves(number, _):
                        half, part = number // self.num_halves, number % self.num_halves
                        values = self.values.at[place * self.num_halves + part, :, columns]
                        add(self.weights.at[half, mine], values, first=number == 0)

                    if self.num_halves == 2:  # unrolled they spill, as do two in a loop
                        lax.fori_loop(0, 4, of_halves, None)
                    else:
                        of_halves(0, None)
                        of_halves(1, None)

                part = product(self.memory, columns.size, terms)
                scaled.append(one * lax.broadcast_in_dim(keep, one.shape, [0]) + part)
            plgpu.barrier_arrive(self.free.at[place])
            return tuple(scaled), new, total

        state = (
            tuple(filled((ROWS, one.size), 0, plgpu.Layout.WGMMA) for one in value_stripes),
            filled((ROWS,), -jnp.inf, self.down),
            filled((ROWS,), 0, self.down),
        )
        self.leave(consumer, *lax.fori_loop(0, self.num_blocks, block, state))

    def of_rows(self, numbers: Any) -> Array:
        """Of 64 rows. jax 0.11 takes loads of global memory only if they may be slow."""
        return plgpu.load(numbers, layout=self.down, optimized=False)

    def bounds_of(self, mine: Any) -> tuple[Array, Array]:
        """First and last position that each row sees."""
        return self.of_rows(self.row_first.at[self.item, mine]), self.of_rows(self.row_last.at[self.item, mine])

    def begin_rows(self, mine: Any) -> None:
        """Waits for the queries."""
        if self.row_scales is not None:  # kept where log-sum-exps will be: registers are scarce
            self.lse_out[mine] = self.of_rows(self.row_scales.at[self.item, self.head, mine]) * self.scale
            plgpu.commit_smem()
        plgpu.barrier_wait(self.queries_arrived)

    def halves(self, exact: Array) -> tuple[Array, Array]:
        """Weights in two numbers of 16 bits, which lose nothing: one alone would take the error of what is returned to 1.3 or 1.5 times
        that of its own rounding. The first is cut, not rounded: that takes no conversion back."""
        dtype = self.weights.dtype
        bits = lax.bitcast_convert_type(exact, jnp.int32) & (-1 << (23 - jnp.finfo(dtype).nmant))
        high = lax.bitcast_convert_type(bits, jnp.float32)
        return high.astype(dtype), (exact - high).astype(dtype)

    def leave(self, consumer: Any, sums: tuple[Array, ...], highest: Array, total: Array) -> None:
        """What a piece comes to: normalised outputs, and their log-sum-exp."""
        mine, out = pl.ds(consumer * ROWS, ROWS), pl.ds(consumer * ROWS, self.padded_rows)
        divisor = jnp.where(total == 0, 1.0, total)
        inverse = 1 / divisor
        self.lse_out[mine] = jnp.where(total == 0, -jnp.inf, (highest + jnp.log2(divisor)) / LOG2_E)
        step = self.sums_out.shape[1]
        for columns, one in zip(stripes(self.values.shape[2]), sums, strict=True):
            shares = one * lax.broadcast_in_dim(inverse, one.shape, [0])
            for at in range(0, columns.size, step):
                plgpu.wait_smem_to_gmem(0)
                self.sums_out[mine] = shares[:, at : at + step].astype(self.sums_out.dtype)
                plgpu.commit_smem()
                into = self.outputs.at[self.piece, self.head, out, pl.ds(columns.start + at, step)]
                plgpu.copy_smem_to_gmem(self.sums_out.at[out], into)
        plgpu.copy_smem_to_gmem(self.lse_out.at[out], self.log_sum_exp.at[self.piece, self.head, out])
        plgpu.wait_smem_to_gmem(0)

    def wait_to_multiply(self, name: str, number: Any, place: Any) -> None:
        if self.per is None:
            self.wait_for(self.named[f"{name}_arrived"], number)
        else:
            plgpu.barrier_wait(self.named[f"{name}_staged"].at[place])

    def key_scales(self, number: Any, place: Any) -> Array:
        """[block]: what products with keys were left to be multiplied with."""
        if self.per == "token":
            return self.token_scales("keys", number)
        return plgpu.load(self.key_factors.at[place], layout=plgpu.Layout.WGMMA.reduce(0))

    def token_scales(self, name: str, number: Any) -> Array:
        """[block]."""
        scales = self.named[f"{name}_scales"]
        place = lax.rem(number, self.num_stages + self.tiles.num_staged)
        return plgpu.load(scales.at[place], layout=plgpu.Layout.WGMMA.reduce(0))

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

    def scored(self, mine: Any, place: Any) -> Array:
        """Scaled products of rows with a block's keys."""

        def terms(add):
            width, num_halves = stripes(self.queries.shape[1])[0].size, self.num_halves

            def stripe(number, _):  # a loop: unrolled over 256 dims it spills
                columns, part = pl.ds(lax.div(number, num_halves) * width, width), lax.rem(number, num_halves)
                keys = self.keys.at[place * num_halves + part, :, columns].transpose((1, 0))
                add(self.queries.at[mine, columns], keys, first=number == 0)

            lax.fori_loop(0, self.queries.shape[1] // width * num_halves, stripe, None)

        scores = product(self.memory, BLOCK_LEN, terms)
        if self.row_scales is None:
            return scores * self.scale
        factors = plgpu.load(self.lse_out.at[mine], layout=self.down)
        return scores * lax.broadcast_in_dim(factors, scores.shape, [0])

    def positions_of(self, slots: Array, starts: list[Any]) -> Array:
        positions = slots + starts[0]
        for entry, start in enumerate(starts[1:], 1):
            begin = entry * self.page_size
            positions = jnp.where(slots >= begin, slots + (start - begin), positions)
        return positions

    def only_valid(self, seen: Array, slots: Array, bits: list[tuple[int, Any]]) -> Array:
        if not bits:
            return seen
        of_slot = jnp.zeros_like(slots)
        for place, word in bits:
            of_slot = jnp.where(slots >= place, word, of_slot)
        span = min(self.page_size, WORD)
        return seen & (lax.shift_right_logical(of_slot, lax.rem(slots, span)) & 1 > 0)

    def seen(self, starts: list[Any], bits: list[tuple[int, Any]], lows: Array, highs: Array) -> Array:
        """[rows, block]."""
        shape = (ROWS, BLOCK_LEN)
        slots = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        positions = self.positions_of(slots, starts)
        seen = self.only_valid(positions <= lax.broadcast_in_dim(highs, shape, [0]), slots, bits)
        if self.num_sinks is None:
            return seen
        inside = positions >= lax.broadcast_in_dim(lows, shape, [0])
        return seen & (inside | (positions < self.num_sinks))

    def is_whole(self, starts: list[Any], bits: list[tuple[int, Any]]) -> Any:
        """Whether every row sees all of a block."""
        low, high = self.whole[self.item, 0], self.whole[self.item, 1]
        is_whole = True
        for start in starts:
            is_whole = is_whole & (start >= low) & (start + self.page_size - 1 <= high)
        span = min(self.page_size, WORD)
        for _, word in bits:
            is_whole = is_whole & (word == ((1 << span) - 1 if span < WORD else -1))
        return is_whole

    def silence(self, place: Any, starts: list[Any], bits: list[tuple[int, Any]]) -> None:
        """A weight of zero does not silence a NaN: what no row sees is replaced."""
        slots = plgpu.broadcasted_iota(jnp.int32, (BLOCK_LEN,), 0, layout=self.down)
        places = self.positions_of(slots, starts)

        def of_token(token, readable):
            seen = places <= self.last[self.item, token]
            seen = seen & ((places >= self.first[self.item, token]) | (places < self.num_sinks))
            return jnp.where(seen, 1, readable)

        if self.num_sinks is None:
            readable = jnp.where(places <= self.whole[self.item, 2], 1, 0)
        else:
            nothing = plgpu.layout_cast(jnp.zeros((BLOCK_LEN,), jnp.int32), self.down)
            readable = lax.fori_loop(0, self.last.shape[1], of_token, nothing)
        readable = jnp.where(self.only_valid(readable > 0, slots, bits), 1, 0)
        # With the columns that products take at once, or fewer, as it spills less: of one half 32 bytes else, of two the other way.
        step = self.steps["values"] if self.num_halves == 1 else stripes(self.values.shape[2])[0].size
        for at in range(0, self.values.shape[2], step):
            for part in range(self.num_halves):
                values = self.values.at[place * self.num_halves + part, :, pl.ds(at, step)]
                kept = plgpu.load(values, layout=plgpu.Layout.WGMMA)
                keeps = lax.broadcast_in_dim(readable, kept.shape, [0]) > 0
                values[...] = jnp.where(keeps, kept, jnp.zeros((), kept.dtype))

    def leave_page_sums(self, number: Any, consumer: Any, exact: Array, shift: Array) -> None:
        """The log-sum-exp of each of a block's pages."""
        slots = plgpu.broadcasted_iota(jnp.int32, exact.shape, 1, layout=plgpu.Layout.WGMMA)
        plgpu.wait_smem_to_gmem(0)
        for entry in range(self.block_pages):
            begin, mine = entry * self.page_size, exact
            if self.block_pages > 1:
                mine = jnp.where((slots >= begin) & (slots < begin + self.page_size), exact, 0.0)
            total = mine.sum(axis=1)
            logs = jnp.where(total == 0, -jnp.inf, (jnp.log2(jnp.where(total == 0, 1.0, total)) + shift) / LOG2_E)
            self.pages_out[consumer * self.block_pages + entry] = logs
        plgpu.commit_smem()

        def leave(entry):
            place = self.begin + number * self.block_pages + entry
            rows = pl.ds(consumer * ROWS, self.padded_rows)
            source = self.pages_out.at[consumer * self.block_pages + entry, pl.ds(0, self.padded_rows)]
            plgpu.copy_smem_to_gmem(source, self.page_log_sum_exp.at[self.item, self.head, place, rows])

        self.each_page(number, leave)
