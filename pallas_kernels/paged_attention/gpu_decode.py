"""Decoding on GPUs, with the factors swapped: tokens in the rows of products, queries in their columns.

Tensor cores multiply 64 rows at once, and a KV head has rarely as many queries. So keys are the left factor and queries the right
one, whose columns come in eights: scores [64 tokens, queries] = K Q^T, outputs [dims, queries] = V^T P^T. Nothing of a product is
padding but up to seven columns, and a thread holds few registers, so that two thread blocks share a multiprocessor: while one
begins or ends, or computes a softmax, the other's pages arrive.

A thread block takes a piece of an item's pages (`plan`) of one KV head. One warpgroup asks for pages, and turns quantised ones into
16 bits; the other attends. Outputs leave normalised, in float32, as columns; `gpu_merge` puts the pieces together.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import FORMATS, Pages, Quantised, Scaling, arrays_of, format_of
from pallas_kernels.paged_attention.gpu_ring import LOG2_E, Ring
from pallas_kernels.paged_attention.plan import BLOCK_LEN, Plan
from pallas_kernels.tensor_cores import Chip, shared
from pallas_kernels.typing import Float

MAX_COLUMNS = 64
"""Most queries of an item for one KV head: of one position or several."""
MAX_STAGES = 8
"""Most stages of the ring."""
MAX_BARRIERS = 32
"""Most barriers that lie together."""
HALF_BYTES, WHOLE_BYTES = (113 - 3) * 1024, (227 - 4) * 1024
"""Shared memory of a thread block that shares its multiprocessor, and of one that does not, but for what Mosaic takes."""
LEAST_STAGES = 2
"""Of a thread block that shares its multiprocessor: two rings together hide a copy's latency."""
PARTS = 3
"""Numbers of bfloat16 that a float32 is the sum of: queries times the scales of channels."""
OUT_SIZE = 4096
"""Most numbers of a product's outputs, or of its share of the outputs of both halves of the weights: 32 registers a thread."""


@dataclass(frozen=True)
class Tiles:
    """How a thread block's shared memory is laid out: stages of the ring, staged blocks of 16 bits (0: the ring itself is
    multiplied), and all bytes but those of barriers. No stages: it does not fit."""

    num_stages: int
    num_staged: int
    num_bytes: int


def columns_for(num_queries: int, group: int) -> int:
    """Columns of an item's products: its queries of one KV head, in eights."""
    return -(-num_queries * group // 8) * 8


def stripe_of(value_dim: int, num_columns: int) -> int:
    """Dims of values that are multiplied at once: a multiple of 64."""
    return next(
        one for one in range(value_dim, 0, -64) if value_dim % one == 0 and (one * num_columns <= OUT_SIZE or one == 64)
    )


def fit(
    dims: tuple[int, int],
    format: str,
    per: Scaling,
    num_columns: int,
    page_size: int,
    max_stages: int = MAX_STAGES,
    *,
    with_page_mass: bool = True,
) -> Tiles:
    """The deepest ring of at most `max_stages` with which two thread blocks fit on a multiprocessor, or else one."""
    block_pages = max(1, BLOCK_LEN // page_size)
    most = min(max_stages, MAX_BARRIERS // block_pages)  # a page has a barrier of its own
    for limit, least in ((HALF_BYTES, min(most, LEAST_STAGES)), (WHOLE_BYTES, 1)):
        for num_staged in (2, 1) if format in FORMATS else (0,):
            for num_stages in range(most, least - 1, -1):
                sizes = scratch_bytes(
                    dims, format, per, num_columns, block_pages, num_stages, num_staged, with_page_mass=with_page_mass
                )
                if sizes <= limit:
                    return Tiles(num_stages, num_staged, sizes)
    return Tiles(0, 0, 0)


def scratch_bytes(
    dims: tuple[int, int],
    format: str,
    per: Scaling,
    num_columns: int,
    block_pages: int,
    num_stages: int,
    num_staged: int,
    *,
    with_page_mass: bool,
) -> int:
    """Bytes of all that `scratch_for` asks for, each in whole KiB."""
    bits = {"int4": 4, "int8": 8, "fp8": 8}.get(format, 16)
    sizes = [num_stages * BLOCK_LEN * width * bits // 8 for width in dims]
    sizes += [2 * num_columns * BLOCK_LEN * 2, stripe_of(dims[1], num_columns) * num_columns * 4, num_columns * 4]
    if with_page_mass:
        sizes.append(block_pages * num_columns * 4)
    if format in FORMATS:
        sizes += [num_staged * BLOCK_LEN * width * 2 for width in dims]
    if format in FORMATS and per == "channel":
        sizes += [(num_stages + num_staged) * block_pages * width * 4 for width in dims]
        sizes += [dims[0] * num_columns * 2, block_pages * PARTS * num_columns * dims[0] * 2]
    else:
        sizes.append(num_columns * dims[0] * 2)
        if format in FORMATS:
            sizes += 2 * [(num_stages + num_staged) * BLOCK_LEN * 4]
    return sum(-(-size // 1024) * 1024 for size in sizes)


def scratch_for(
    tiles: Tiles,
    key_pages: Pages,
    value_pages: Pages,
    dtype: Any,
    of_rows: Any,
    num_columns: int,
    block_pages: int,
    *,
    with_page_mass: bool,
) -> dict[str, Any]:
    """What a thread block keeps in shared memory, by name. Products of keys are of type `dtype`, queries come in `of_rows`."""
    dims, depth, staged = (key_pages.shape[3], value_pages.shape[3]), tiles.num_stages, tiles.num_staged
    is_quantised, stripe = isinstance(key_pages, Quantised), stripe_of(value_pages.shape[3], num_columns)
    # Weights times scales may be of any size, which float16 could not hold; what is quantised is exact in both.
    of_weights = jnp.dtype(jnp.bfloat16) if is_quantised else dtype
    scratch = {
        "weights": shared((2 * num_columns, BLOCK_LEN), of_weights, step_of(dims[1], value_pages)),
        "sums_out": shared((stripe, num_columns), jnp.float32, num_columns),
        "lse_out": plgpu.SMEM((num_columns,), jnp.float32),
        "queries_arrived": plgpu.Barrier(),
    }
    num_arrivals = 2 if is_quantised else 1
    for name, pool, of in (("keys", key_pages, dtype), ("values", value_pages, of_weights)):
        payload, width = arrays_of(pool)[0], pool.shape[3]
        step = step_of(width, pool)
        scratch[f"{name}_ring"] = shared((depth, BLOCK_LEN, payload.shape[3]), payload.dtype, step)
        arrived = plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=depth * block_pages)
        scratch[f"{name}_arrived"] = arrived
        if isinstance(pool, Quantised):
            of_scales = (BLOCK_LEN,) if pool.per == "token" else (block_pages, width)
            scratch[f"{name}_scales"] = plgpu.SMEM((depth + staged, *of_scales), jnp.float32)
            scratch[f"{name}_staged"] = plgpu.Barrier(num_barriers=staged)
            scratch[name] = shared((staged, BLOCK_LEN, width), of, step)
    scratch["free"] = plgpu.Barrier(num_barriers=staged or depth)
    if isinstance(key_pages, Quantised) and key_pages.per == "channel":
        scratch["queries"] = plgpu.SMEM((dims[0], num_columns), of_rows)
        scratch["scaled"] = shared((block_pages * PARTS * num_columns, dims[0]), dtype, step_of(dims[0], key_pages))
    else:
        scratch["queries"] = shared((num_columns, dims[0]), dtype, step_of(dims[0], key_pages))
    if with_page_mass:
        scratch["pages_out"] = plgpu.SMEM((block_pages, num_columns), jnp.float32)
    return scratch


def step_of(width: int, pages: Pages) -> int:
    """Columns that are laid out together, in both factors of a product; of quantised pages, as many as are turned into 16 bits at
    once, and no more than a page has slots where each page is multiplied apart."""
    if not isinstance(pages, Quantised):
        return math.gcd(width, 64)
    most = min(pages.shape[2], 64) if pages.per == "channel" else 64
    return math.gcd(width // 2 if pages.format == "int4" else width, min(most, 32 if width > 128 else 64))


def refusal(
    dims: tuple[int, int], format: str, per: Scaling, num_columns: int, page_size: int, chip: Chip = "hopper"
) -> str | None:
    """Why this kernel cannot serve what `gpu.refusal` lets pass; None: it can."""
    page_size = min(page_size, BLOCK_LEN)
    if chip != "hopper":
        return f"chip = {chip}: products are written for Hopper's wgmma"
    if num_columns > MAX_COLUMNS:
        return f"columns = {num_columns}: must be at most {MAX_COLUMNS}, queries times query heads of a KV head"
    if dims[1] % 64:
        return f"head dim of values = {dims[1]}: must be a multiple of 64, the rows of a product"
    if format in FORMATS and per == "channel":
        if dims[0] % 64:
            return f"head dim of keys = {dims[0]}: must be a multiple of 64, where their channels have scales"
        if num_columns * BLOCK_LEN // page_size > MAX_COLUMNS:
            return f"columns = {num_columns}: too many for pages of {page_size} slots whose channels have scales"
    if not fit(dims, format, per, num_columns, page_size).num_stages:
        return f"head dims = {dims}: shared memory does not hold a block of {format} for {num_columns} columns"
    return None


def decode(
    queries: Float[Array, "items T H D"],
    key_pages: Pages,
    value_pages: Pages,
    plan: Plan,
    *,
    soft_cap: float | None,
    scale: float,
    with_page_mass: bool,
    max_stages: int | None = None,
    chip: Chip = "hopper",
    interpret: Any = False,
) -> tuple[Array, ...]:
    """Attention of every piece of a plan: outputs [pieces, K, Dv, columns] and log-sum-exp [pieces, K, columns] (natural log), both
    float32; a column is (query, head of the group). With page mass, the log-sum-exp of each entry [items, K, N, columns] as well.
    What empty pieces and unlisted entries hold is anything."""
    items, num_queries, num_heads, dim = queries.shape
    num_kv_heads, value_dim = key_pages.shape[1], value_pages.shape[3]
    group = num_heads // num_kv_heads
    num_columns, block_pages = columns_for(num_queries, group), BLOCK_LEN // plan.page_size
    per = key_pages.per if isinstance(key_pages, Quantised) else None
    format = format_of(key_pages)
    tiles = fit(
        (dim, value_dim),
        format,
        per or "token",
        num_columns,
        plan.page_size,
        max_stages or MAX_STAGES,
        with_page_mass=with_page_mass,
    )
    dtype = worked_in(key_pages, queries.dtype)
    rows = queries.reshape(items, num_queries, num_kv_heads, group, dim).swapaxes(1, 2)
    rows = rows.reshape(items, num_kv_heads, num_queries * group, dim)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, num_columns - num_queries * group), (0, 0)))
    arrays = {
        name: getattr(plan, name) for name in ("pieces", "launch", "pages", "starts", "whole", "first", "last")
    } | {"key_pages": arrays_of(key_pages), "value_pages": arrays_of(value_pages)}
    if plan.words is not None:
        arrays["words"] = plan.words
    if per == "channel":
        is_half = rows.dtype in (jnp.bfloat16, jnp.float16)
        arrays["rows"] = rows.astype(rows.dtype if is_half else jnp.bfloat16).swapaxes(2, 3)
    else:
        arrays["rows"], factors = fitted(rows, dtype)
        if factors is not None:
            arrays["column_factors"] = factors
    num_pieces = len(plan.pieces)
    out_type = {
        "outputs": jax.ShapeDtypeStruct((num_pieces, num_kv_heads, value_dim, num_columns), jnp.float32),
        "log_sum_exp": jax.ShapeDtypeStruct((num_pieces, num_kv_heads, num_columns), jnp.float32),
    }
    if with_page_mass:
        of_pages = (items, num_kv_heads, plan.pages.shape[1], num_columns)
        out_type["page_log_sum_exp"] = jax.ShapeDtypeStruct(of_pages, jnp.float32)
    given, structure = jax.tree.flatten(list(arrays.values()))
    pools, of_rows = (key_pages, value_pages), arrays["rows"].dtype
    scratch = scratch_for(tiles, *pools, dtype, of_rows, num_columns, block_pages, with_page_mass=with_page_mass)

    def kernel(*refs: Any) -> None:
        """Gives every ref its name."""
        inputs, refs = refs[: len(given)], refs[len(given) :]
        outputs, mine = refs[: len(out_type)], refs[len(out_type) :]
        named = dict(zip(arrays, jax.tree.unflatten(structure, inputs), strict=True))
        named |= dict(zip(out_type, outputs, strict=True)) | dict(zip(scratch, mine, strict=True))
        block = lax.axis_index("block")
        _Decode(
            named,
            piece=named["launch"][lax.div(block, num_kv_heads)],
            head=lax.rem(block, num_kv_heads),
            num_stages=tiles.num_stages,
            num_staged=tiles.num_staged,
            page_size=plan.page_size,
            num_sinks=plan.num_sinks if plan.window is not None else None,
            soft_cap=soft_cap,
            scale=scale,
            per=per,
            group=group,
            num_columns=num_columns,
            steps={"keys": step_of(dim, key_pages), "values": step_of(value_dim, value_pages)},
        ).run()

    made = plgpu.kernel(
        kernel,
        out_type=list(out_type.values()),
        scratch_types=list(scratch.values()),
        grid=(num_pieces * num_kv_heads,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=False),
    )(*given)
    return tuple(made)


def worked_in(pages: Pages, queries: Any) -> Any:
    """The type of 16 bits that products of keys are computed in. Hopper turns 8-bit floats into float16 at once, into bfloat16 not;
    queries times the scales of channels are sums of `PARTS` numbers of bfloat16, which have float32's range."""
    if not isinstance(pages, Quantised):
        return pages.dtype
    if pages.per == "channel":
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(jnp.float16 if queries == jnp.float16 or pages.format == "fp8" else jnp.bfloat16)


def fitted(rows: Float[Array, "N K R D"], dtype: Any) -> tuple[Array, Array | None]:
    """Queries in the type of their products, and what each one's scores are to be multiplied with, where float16 could not hold them:
    powers of two. The largest of a query comes near float16's largest, so that what is 2 ** 30 times smaller is still exact."""
    if dtype != jnp.float16 or rows.dtype == jnp.float16:
        return rows.astype(dtype), None
    largest = jnp.abs(rows.astype(jnp.float32)).max(axis=3)
    exponents = jnp.where(jnp.isfinite(largest) & (largest > 0), jnp.frexp(largest)[1] - 15, 0)
    factors = jnp.exp2(exponents.astype(jnp.float32))
    return (rows.astype(jnp.float32) / factors[..., None]).astype(dtype), factors


class _Decode(Ring):
    """One piece, in the kernel."""

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
        factors: Any = self.scale if self.soft_cap is not None else self.scale * LOG2_E
        if "column_factors" in self.named:
            theirs = self.column_factors.at[self.item, self.head]
            factors = factors * plgpu.load(theirs, layout=self.across, optimized=False)
        plgpu.barrier_wait(self.queries_arrived)
        queries = None
        if self.per == "channel":
            queries = plgpu.load(self.queries, layout=plgpu.Layout.WGMMA).astype(jnp.float32)

        def filled(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

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
        # In two halves of 16 bits the weights lose nothing.
        high = exact.astype(self.weights.dtype)
        self.store_across(self.weights.at[pl.ds(0, self.num_columns)], high)
        low = (exact - high.astype(jnp.float32)).astype(self.weights.dtype)
        self.store_across(self.weights.at[pl.ds(self.num_columns, self.num_columns)], low)
        if self.per is None:
            self.wait_to_multiply("values", number, place)
        values = self.multiplied("values").at[place]
        if not (self.per is not None and self.values_ring.dtype != jnp.float8_e4m3fn):  # whole numbers are never NaN
            pl.when(jnp.logical_not(self.is_whole(starts, bits)))(
                lambda: self.silence(values, self.steps["values"], starts, bits)
            )
        plgpu.commit_smem()
        scaled = []
        for columns, one in zip(stripes, sums, strict=True):
            part = self.weighed(values.at[:, columns], columns, number)
            scaled.append(one * lax.broadcast_in_dim(keep, one.shape, [1]) + part)
        plgpu.barrier_arrive(self.free.at[place])
        return tuple(scaled), new, total

    def multiplied(self, name: str) -> Any:
        """The ring, or the staged blocks."""
        return self.named[f"{name}_ring" if self.per is None else name]

    def wait_to_multiply(self, name: str, number: Any, place: Any) -> None:
        """Until a block of keys or values can be multiplied."""
        if self.per is None:
            self.wait_for(self.named[f"{name}_arrived"], number)
        else:
            plgpu.barrier_wait(self.named[f"{name}_staged"].at[place])

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
            return self.product(self.multiplied("keys").at[place], self.queries)
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
            part = (both[:, :size] + both[:, size:]) * lax.broadcast_in_dim(scales, shape, [0])
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
            self.pages_out[entry] = logs
        plgpu.commit_smem()

        def leave(entry):
            place = self.begin + number * self.block_pages + entry
            there = self.page_log_sum_exp.at[self.item, self.head, place]
            plgpu.copy_smem_to_gmem(self.pages_out.at[entry], there)

        self.each_page(number, leave)
