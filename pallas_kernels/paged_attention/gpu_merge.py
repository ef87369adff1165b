"""The pieces of an item put together on GPUs, by their log-sum-exp, and written where the answer has them: one
launch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.alignment import ALIGNMENT
from pallas_kernels.paged_attention.gpu_ring import LOG2_E, filled
from pallas_kernels.paged_attention.gpu_tiles import stripes_of
from pallas_kernels.tensor_cores import store_plainly
from pallas_kernels.typing import Float, Int32

AT_ONCE = 8
"""Pieces that are read side by side: copies from the cache of the second level take their time."""
REGISTERS = 64
"""Most registers of a thread for the outputs that are read side by side."""
STRIPE = 64
"""Dims that are put together at once."""
PART = 128
"""Dims of a thread block, where values have a multiple of it: 64 latent caches of 512 would fill half a chip only."""


def merge(
    outputs: Float[Array, "pieces K Dv columns"],
    log_sum_exp: Float[Array, "pieces K columns"],
    shares: Int32[Array, "items 2"],
    num_queries: int,
    group: int,
    dtype: Any,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "items T H Dv"], Float[Array, "items K columns"]]:
    """Attention over all pieces of each item, in `dtype`, from normalised outputs of each; and its log-sum-exp. An item
    without pieces has 0 and -inf."""
    (_, num_kv_heads, value_dim, num_columns), items = outputs.shape, len(shares)
    if num_queries > 1 and group * value_dim * jnp.dtype(dtype).itemsize % ALIGNMENT:
        # A copy could not begin where a query's rows do: all columns leave as one query's, and XLA parts them.
        merged, sums = merge(outputs, log_sum_exp, shares, 1, num_columns, dtype, interpret=interpret)
        return _parted(merged, num_kv_heads, num_queries, group), sums

    part_dim = PART if value_dim % PART == 0 else value_dim
    num_parts = value_dim // part_dim

    def kernel(outputs, log_sum_exp, shares, merged, merged_sums, rows, sums):
        block = lax.axis_index("block")
        part, of_part = lax.rem(block, num_parts), lax.div(block, num_parts)
        item, head = lax.div(of_part, num_kv_heads), lax.rem(of_part, num_kv_heads)
        begin, end, dims = shares[item, 0], shares[item, 1], pl.ds(part * part_dim, part_dim)
        for columns in stripes_of(part_dim, STRIPE):
            there = pl.ds(part * part_dim + columns.start, columns.size)
            found, highest, total = _of_stripe(outputs, log_sum_exp, (begin, end), head, there)
            divisor = jnp.where(total == 0, 1.0, total)
            found = (found / lax.broadcast_in_dim(divisor, found.shape, [1])).astype(dtype)
            turned = plgpu.layout_cast(found, plgpu.Layout.WGMMA_TRANSPOSED)
            store_plainly(rows.at[:, columns].transpose((1, 0)), turned)
            if columns.start == 0:
                sums[...] = jnp.where(total == 0, -jnp.inf, (highest + jnp.log2(divisor)) / LOG2_E)
        plgpu.commit_smem()
        for query in range(num_queries):
            mine = pl.ds(query * group, group)
            plgpu.copy_smem_to_gmem(rows.at[mine], merged.at[item, query, pl.ds(head * group, group), dims])

        @pl.when(part == 0)
        def _():
            plgpu.copy_smem_to_gmem(sums, merged_sums.at[item, head])

        plgpu.wait_smem_to_gmem(0)

    merged, merged_sums = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((items, num_queries, num_kv_heads * group, value_dim), dtype),
            jax.ShapeDtypeStruct((items, num_kv_heads, num_columns), jnp.float32),
        ],
        scratch_types=[plgpu.SMEM((num_columns, part_dim), dtype), plgpu.SMEM((num_columns,), jnp.float32)],
        grid=(items * num_kv_heads * num_parts,),
        grid_names=("block",),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=False, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(outputs, log_sum_exp, shares)
    return merged, merged_sums


def _parted(
    merged: Float[Array, "items 1 columns Dv"], num_kv_heads: int, num_queries: int, group: int
) -> Float[Array, "items T H Dv"]:
    """The rows of each query, from the columns of every KV head."""
    items, _, _, value_dim = merged.shape
    merged = merged.reshape(items, num_kv_heads, -1, value_dim)[:, :, : num_queries * group]
    merged = merged.reshape(items, num_kv_heads, num_queries, group, value_dim).swapaxes(1, 2)
    return merged.reshape(items, num_queries, num_kv_heads * group, value_dim)


def _of_stripe(outputs: Any, log_sum_exp: Any, pieces: tuple[Any, Any], head: Any, columns: Any) -> tuple[Array, ...]:
    """The sums of an item's pieces [begin, end) for a stripe of dims, their highest log-sum-exp, and what all of them
    weigh beside it."""
    begin, end = pieces
    num_columns, across = outputs.shape[3], plgpu.Layout.WGMMA.reduce(0)
    most = max(1, min(AT_ONCE, REGISTERS * 128 // (STRIPE * num_columns)))

    def read(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def some(number, state):
        merged, highest, total = state
        logs, parts = [], []
        for piece in [begin + number * most + place for place in range(most)]:
            there = jnp.minimum(piece, end - 1)
            theirs = read(log_sum_exp.at[there, head], across) * LOG2_E
            logs.append(theirs + jnp.where(piece < end, 0.0, -jnp.inf))
            parts.append(read(outputs.at[there, head, columns], plgpu.Layout.WGMMA))
        new = highest
        for log in logs:
            new = jnp.maximum(new, log)
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        keep = jnp.exp2(highest - shift)
        merged, total = merged * lax.broadcast_in_dim(keep, merged.shape, [1]), total * keep
        for log, part in zip(logs, parts, strict=True):
            weight = jnp.exp2(log - shift)
            merged, total = merged + part * lax.broadcast_in_dim(weight, part.shape, [1]), total + weight
        return merged, new, total

    state = (
        filled((columns.size, num_columns), 0, plgpu.Layout.WGMMA),
        filled((num_columns,), -jnp.inf, across),
        filled((num_columns,), 0, across),
    )
    return lax.fori_loop(0, pl.cdiv(end - begin, most), some, state)
