"""Decoding on GPUs, with the factors swapped: tokens in the rows of products, queries in their columns.

Tensor cores multiply 64 rows at once, and a KV head has rarely as many queries. So keys are the left factor and queries
the right one, whose columns come in eights: scores [64 tokens, queries] = K Q^T, outputs [dims, queries] = V^T P^T.
Nothing of a product is padding but up to seven columns, and a thread holds few registers, so that two thread blocks
share a multiprocessor: while one begins or ends, or computes a softmax, the other's pages arrive.

A thread block takes a piece of an item's pages (`plan`) of one KV head, and all columns or a part of them. One
warpgroup asks for pages, and turns quantised ones into 16 bits; the other attends. Outputs leave normalised, in
float32, as columns; `gpu_merge` puts the pieces together.

On Blackwell a product has 32 columns at least, of which 16 may be queries."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import Scheme, arrays_of
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention.gpu_decode_piece import Columns, Queries
from pallas_kernels.paged_attention.gpu_decode_tiles import (
    MAX_COLUMNS,
    ROW_BLOCK,
    columns_for,
    fit,
    parts_of_columns,
    producers_for,
    scratch_for,
    step_of,
)
from pallas_kernels.paged_attention.gpu_ring import Part, by_name, given
from pallas_kernels.paged_attention.gpu_tiles import MAX_STAGES
from pallas_kernels.paged_attention.plan import BLOCK_LEN, Plan
from pallas_kernels.pages import Pages
from pallas_kernels.tensor_cores import Chip
from pallas_kernels.typing import Float


def refusal(
    dims: tuple[int, int],
    schemes: tuple[Scheme, Scheme] | None,
    num_columns: int,
    page_size: int,
    chip: Chip = "hopper",
    is_latent: bool = False,
) -> str | None:
    """Why this kernel cannot serve what `gpu.refusal` lets pass; None: it can."""
    page_size = min(page_size, BLOCK_LEN)
    if num_columns > MAX_COLUMNS:
        return f"columns = {num_columns}: must be at most {MAX_COLUMNS}, queries times query heads of a KV head"
    if dims[1] < ROW_BLOCK:
        return f"head dim of values = {dims[1]}: must be at least {ROW_BLOCK}, the rows of a product"
    if schemes and schemes[0].per == "channel" and dims[0] < ROW_BLOCK:
        return f"head dim of keys = {dims[0]}: must be at least {ROW_BLOCK}, where their channels have scales"
    how = {"with_page_mass": True, "chip": chip, "is_latent": is_latent}
    if not parts_of_columns(num_columns, dims, schemes, page_size, **how)[0]:
        return f"head dims = {dims}: shared memory does not hold a block"
    return None


def decode(
    queries: Float[Array, "items T H D"],
    pages: Pages,
    plan: Plan,
    scoring: Scoring,
    *,
    max_stages: int | None = None,
    chip: Chip = "hopper",
    interpret: Any = False,
) -> tuple[Array, ...]:
    """Attention of every piece of a plan: outputs [pieces, K, Dv, columns] and log-sum-exp [pieces, K, columns]
    (natural log), both float32; a column is (query, head of the group). With page mass, the log-sum-exp of each entry
    [items, K, N, columns] as well. What empty pieces and unlisted entries hold is anything."""
    items, num_queries, num_heads, _ = queries.shape
    num_kv_heads, group = pages.num_kv_heads, num_heads // pages.num_kv_heads
    num_pieces, most = len(plan.pieces), max_stages or MAX_STAGES
    asked, places = (pages.head_dims, pages.schemes), {"with_page_mass": scoring.with_page_mass, "chip": chip}
    how: dict[str, Any] = {**places, "is_latent": pages.is_latent}
    num_parts, num_columns = parts_of_columns(columns_for(num_queries, group), *asked, plan.page_size, **how)
    block_pages, all_columns = BLOCK_LEN // plan.page_size, num_parts * num_columns
    num_producers = producers_for(num_columns, *asked, plan.page_size, **how)
    tiles = fit(*asked, num_columns, plan.page_size, most, **how)
    dtype = worked_in(pages, queries.dtype)
    arrays = _arrays(queries, pages, plan, all_columns, dtype)
    out_type = _outputs(num_pieces, items, pages, plan, all_columns, with_page_mass=scoring.with_page_mass)
    scratch = scratch_for(tiles, pages, dtype, arrays["rows"].dtype, num_columns, block_pages, **places)

    def kernel(*refs: Any) -> None:
        """Gives every ref its name."""
        named = by_name(refs, arrays, out_type, scratch)
        block = lax.axis_index("block")
        # Parts of the columns follow one another: their pages come from memory once.
        of_head, first_column = lax.div(block, num_parts), lax.rem(block, num_parts) * num_columns
        part = Part.of(
            named,
            (step_of(pages, 0), step_of(pages, 1)),
            pages.schemes,
            piece=named["launch"][lax.div(of_head, num_kv_heads)],
            head=lax.rem(of_head, num_kv_heads),
            num_stages=tiles.num_stages,
            num_staged=tiles.num_staged,
            num_scale_places=tiles.num_stages + tiles.num_staged,
            page_size=plan.page_size,
            scoring=scoring,
        )
        columns = {"group": group, "num_columns": num_columns, "first_column": first_column if num_parts > 1 else 0}
        Columns(part, given(Queries, named, **columns), num_producers).run()

    made = plgpu.kernel(
        kernel,
        out_type=list(out_type.values()),
        scratch_types=list(scratch.values()),
        grid=(num_pieces * num_kv_heads * num_parts,),
        grid_names=("block",),
        num_threads=1 + num_producers,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=False),
    )(*jax.tree.leaves(list(arrays.values())))
    return tuple(made)


def _outputs(
    num_pieces: int, items: int, pages: Pages, plan: Plan, num_columns: int, *, with_page_mass: bool
) -> dict[str, Any]:
    """What `decode` answers with, by name."""
    sizes = {
        "outputs": (num_pieces, pages.num_kv_heads, pages.head_dims[1], num_columns),
        "log_sum_exp": (num_pieces, pages.num_kv_heads, num_columns),
    }
    if with_page_mass:
        sizes["page_log_sum_exp"] = items, pages.num_kv_heads, plan.pages.shape[1], num_columns
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


def _arrays(
    queries: Float[Array, "items T H D"], pages: Pages, plan: Plan, num_columns: int, dtype: Any
) -> dict[str, Any]:
    """What the kernel is given, by name. Queries are rows [items, K, columns, D], or their transpose where keys have
    scales by channel."""
    items, num_queries, num_heads, dim = queries.shape
    num_kv_heads = pages.num_kv_heads
    group = num_heads // num_kv_heads
    rows = queries.reshape(items, num_queries, num_kv_heads, group, dim).swapaxes(1, 2)
    rows = rows.reshape(items, num_kv_heads, num_queries * group, dim)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, num_columns - num_queries * group), (0, 0)))
    arrays = {
        name: getattr(plan, name) for name in ("pieces", "launch", "pages", "starts", "whole", "first", "last")
    } | {"key_pages": arrays_of(pages.keys), "value_pages": arrays_of(pages.pools[-1])}
    if plan.words is not None:
        arrays["words"] = plan.words
    if pages.per == "channel":
        is_half = rows.dtype in (jnp.bfloat16, jnp.float16)
        arrays["rows"] = rows.astype(rows.dtype if is_half else jnp.bfloat16).swapaxes(2, 3)
    else:
        arrays["rows"], factors = fitted(rows, dtype)
        if factors is not None:
            arrays["column_factors"] = factors
    return arrays


def worked_in(pages: Pages, queries: Any) -> Any:
    """The type of 16 bits that products of keys are computed in. Hopper turns 8-bit floats into float16 at once, into
    bfloat16 not; queries times the scales of channels are sums of `PARTS` numbers of bfloat16, which have float32's
    range."""
    if pages.per is None:
        return pages.keys.dtype
    if pages.per == "channel":
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(jnp.float16 if queries == jnp.float16 or pages.format == "fp8" else jnp.bfloat16)


def fitted(rows: Float[Array, "N K R D"], dtype: Any) -> tuple[Array, Array | None]:
    """Queries in the type of their products, and what each one's scores are to be multiplied with, where float16 could
    not hold them: powers of two. The largest of a query comes near float16's largest, so that what is 2 ** 30 times
    smaller is still exact."""
    if dtype != jnp.float16 or rows.dtype == jnp.float16:
        return rows.astype(dtype), None
    largest = jnp.abs(rows.astype(jnp.float32)).max(axis=3)
    exponents = jnp.where(jnp.isfinite(largest) & (largest > 0), jnp.frexp(largest)[1] - 15, 0)
    factors = jnp.exp2(exponents.astype(jnp.float32))
    return (rows.astype(jnp.float32) / factors[..., None]).astype(dtype), factors
