"""Paged attention for Hopper and Blackwell GPUs in Pallas Mosaic: decoding with queries in columns (`gpu_decode`), chunks and what that
does not take with queries in rows (`gpu_tiled`)."""

from typing import Any

from jax import Array

from pallas_kernels.formats import FORMATS, Quantised, Scaling, each_array, format_of
from pallas_kernels.paged_attention import gpu_decode
from pallas_kernels.paged_attention.gpu_merge import merge
from pallas_kernels.paged_attention.gpu_tiled import in_tiles
from pallas_kernels.paged_attention.gpu_tiles import fit
from pallas_kernels.paged_attention.pages import page_mass
from pallas_kernels.paged_attention.plan import BLOCK_LEN, Plan, plan_attention
from pallas_kernels.selection import Asked
from pallas_kernels.tensor_cores import ROWS, Chip, this_chip
from pallas_kernels.typing import Bool, Float, Int32


def refusal(asked: Asked) -> str | None:
    """Why this kernel cannot serve such pages; None: it can."""
    format, page_size, head_dims = asked.format, asked.page_size, asked.head_dims
    if format not in ("bfloat16", "float16", *FORMATS):
        return (
            f"pages of {format}: the tensor cores take bfloat16 and float16 here, or {', '.join(FORMATS)} with scales"
        )
    sizes = (32,) if format in FORMATS else (8, 16, 32)
    if page_size not in sizes and page_size % BLOCK_LEN:
        legal = ", ".join(map(str, sizes))
        return f"page_size = {page_size}: must be {legal} or a multiple of {BLOCK_LEN} for pages of {format}"
    step = 32 if format in FORMATS else 16
    if any(dim % step or not step <= dim <= 256 for dim in head_dims):
        return f"head dims = {head_dims}: must be multiples of {step} in [{step}, 256] for pages of {format}"
    if asked.group > ROWS:
        return f"group size = {asked.group}: must be at most {ROWS} query heads for a KV head"
    if not fit(*head_dims, format, asked.per, page_size=page_size).num_stages:
        return f"head dims = {head_dims}: shared memory does not hold a block of {format} scaled by {asked.per}"
    return None


def paged_attention(
    queries: Float[Array, "B T H D"],
    key_pages: Float[Array, "P K page D"] | Quantised,
    value_pages: Float[Array, "P K page Dv"] | Quantised,
    page_table: Int32[Array, "B *heads num_pages"],
    page_starts: Int32[Array, "B *heads num_pages"],
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    *,
    plan: Plan | None = None,
    valid_slots: Bool[Array, "B *heads num_pages page"] | None = None,
    window: int | None,
    num_sinks: int,
    soft_cap: float | None,
    scale: float,
    with_page_mass: bool = False,
    num_pieces: int | None = None,
    max_stages: int | None = None,
    chip: Chip | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """See `api.paged_attention`: by `gpu_decode` where it can, else in tiles of 64 rows, as chunks are."""
    chip = chip or this_chip()
    batch, num_queries, num_heads, dim = queries.shape
    _, num_kv_heads, page_size, value_dim = value_pages.shape
    per: Scaling = key_pages.per if isinstance(key_pages, Quantised) else "token"
    num_columns = gpu_decode.columns_for(num_queries, num_heads // num_kv_heads)
    dims, format = (dim, value_dim), format_of(key_pages)
    if gpu_decode.refusal(dims, format, per, num_columns, page_size, chip):
        tables = page_table, page_starts, query_positions, kv_lens
        options = {"valid_slots": valid_slots, "window": window, "num_sinks": num_sinks, "soft_cap": soft_cap}
        options |= {"scale": scale, "with_page_mass": with_page_mass, "num_pieces": num_pieces}
        options |= {"max_stages": max_stages, "chip": chip, "interpret": interpret}
        return in_tiles(queries, key_pages, value_pages, *tables, **options)
    if plan is None:
        plan = plan_attention(
            page_table,
            page_starts,
            query_positions,
            kv_lens,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            valid_slots=valid_slots,
            window=window,
            num_sinks=num_sinks,
            num_pieces=num_pieces,
        )
    group, by_head = num_heads // num_kv_heads, page_table.ndim == 3
    if by_head:  # a head is an item of its own, and a page a single tile
        queries = queries.reshape(batch, num_queries, num_kv_heads, group, dim).swapaxes(1, 2)
        queries = queries.reshape(-1, num_queries, group, dim)
        tiles = lambda x: x.reshape(-1, 1, *x.shape[2:])  # noqa: E731
        key_pages, value_pages = (each_array(pool, tiles) for pool in (key_pages, value_pages))
    made = gpu_decode.decode(
        queries,
        key_pages,
        value_pages,
        plan,
        soft_cap=soft_cap,
        scale=scale,
        with_page_mass=with_page_mass,
        max_stages=max_stages,
        interpret=interpret,
    )
    outputs, sums = merge(made[0], made[1], plan.shares, num_queries, group, queries.dtype, interpret=interpret)

    def parted(x: Array) -> Array:
        """[items, T, heads, ...] to [B, T, H, ...]."""
        if by_head:
            x = x.reshape(batch, num_kv_heads, num_queries, group, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(batch, num_queries, num_heads, *x.shape[4 if by_head else 3 :])

    def rows(x: Array) -> Array:
        """[items, K, columns, ...] to [B, T, H, ...]."""
        x = x[:, :, : num_queries * group].reshape(len(x), x.shape[1], num_queries, group, *x.shape[3:])
        x = x.swapaxes(1, 2)
        return parted(x.reshape(*x.shape[:2], -1, *x.shape[4:]))

    found = parted(outputs), rows(sums)
    if not with_page_mass:
        return found
    mass = page_mass(made[2], sums, plan.counts[:, None], plan.order[:, None])
    mass = mass.reshape(*mass.shape[:-1], page_table.shape[-1], -1).sum(axis=-1)
    return *found, rows(mass)
