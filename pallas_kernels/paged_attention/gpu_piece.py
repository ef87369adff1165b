"""The GPU kernel of paged attention: what the two warpgroups of a thread block do with one piece of a list of pages."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_ring import LOG2_E, Ring, filled
from pallas_kernels.paged_attention.gpu_tiles import stripes
from pallas_kernels.paged_attention.plan import BLOCK_LEN
from pallas_kernels.tensor_cores import ROWS, product

HEADROOM = 6
"""Keys scaled by channel are brought to at most 2 ** (this + 1) times their format's largest number, which float16 still holds."""


class Piece(Ring):
    """One piece of 64 rows."""

    def __init__(self, refs: dict[str, Any], **options: Any) -> None:
        super().__init__({"row_scales": None, **refs}, **options)
        self.num_stages, self.num_staged = self.tiles.num_stages, self.tiles.num_staged
        self.num_halves = self.tiles.num_halves

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        pl.when((warpgroup == 1) & (self.count > 0))(self.fetch_all)
        pl.when((warpgroup == 0) & (self.count > 0))(lambda: self.attend(0))

    # Pages: asked for, and turned into 16 bits.

    def fetch_all(self) -> None:
        """Queries, then pages."""
        rows = self.rows.at[self.item, self.head]
        plgpu.copy_gmem_to_smem(rows, self.queries.at[pl.ds(0, rows.shape[0])], self.queries_arrived)
        if self.per is None:
            self.produce()
            return
        if self.per == "channel":
            plgpu.copy_gmem_to_smem(self.column_scales.at[self.item, self.head], self.columns, self.columns_arrived)
            plgpu.barrier_wait(self.columns_arrived)
        self.produce_and_convert()

    def place_of_scales(self, number: Any) -> Any:
        return lax.rem(number, self.num_stages) if self.per == "channel" else super().place_of_scales(number)

    def convert(self, name: str, stage: Any, slot: Any) -> None:
        """A block of the ring, in the 16 bits of products. Scales of tokens are left to scores and weights, where they are fewer;
        those of channels are multiplied in, and what rounding loses is kept in a second half: of bfloat16 for values, of float16 for
        keys, which logits need more digits of, brought into its range by a power of two for each page."""
        if self.num_halves == 1:
            super().convert(name, stage, slot)
            return
        into, fitting = self.named[name], self.fit_keys(stage, slot) if name == "keys" else None
        for columns, numbers in self.unpacked(name, stage):
            exact = numbers.astype(jnp.float32) * self.channel_scales(name, stage, columns)
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
            place = lax.rem(number, self.num_stages if self.per is None else self.num_staged)
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
                pl.when(jnp.logical_not(self.is_whole(starts, bits)))(lambda: self.silence_block(place, starts, bits))
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

    def key_scales(self, number: Any, place: Any) -> Array:
        """[block]: what products with keys were left to be multiplied with."""
        if self.per == "token":
            return self.token_scales("keys", number)
        return plgpu.load(self.key_factors.at[place], layout=plgpu.Layout.WGMMA.reduce(0))

    def token_scales(self, name: str, number: Any) -> Array:
        """[block]."""
        scales = self.named[f"{name}_scales"]
        place = self.place_of_scales(number)
        return plgpu.load(scales.at[place], layout=plgpu.Layout.WGMMA.reduce(0))

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

    def silence_block(self, place: Any, starts: list[Any], bits: list[tuple[int, Any]]) -> None:
        """What nobody sees of the values in a place of the ring, or of the staged blocks."""
        # With the columns that products take at once, or fewer, as it spills less: of one half 32 bytes else, of two the other way.
        step = self.steps["values"] if self.num_halves == 1 else stripes(self.values.shape[2])[0].size
        blocks = [self.values.at[place * self.num_halves + part] for part in range(self.num_halves)]
        self.silence(blocks, step, starts, bits)

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
