"""Paged attention for Hopper and Blackwell GPUs in Pallas Mosaic: few queries in columns (`gpu_decode`), and what that
does not take, chunks among it, in rows (`gpu_tiled`).

A chunk is bound by products, and by pages that every tile reads anew from the cache of the second level: with twice the
rows a tile (`gpu_chunk`) they are read half as often."""

from typing import Any

from jax import Array

from pallas_kernels.formats import FORMATS, SHARED
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention import gpu_decode, gpu_scales
from pallas_kernels.paged_attention.gpu_merge import merge
from pallas_kernels.paged_attention.gpu_tiled import in_tiles
from pallas_kernels.paged_attention.gpu_tiles import COLUMNS, MAX_STAGES, fit
from pallas_kernels.paged_attention.plan import BLOCK_LEN, Plan, plan_attention
from pallas_kernels.paged_attention.sharing import page_mass
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.selection import Asked
from pallas_kernels.tensor_cores import ROWS, Chip, this_chip
from pallas_kernels.typing import Float, Int32


def refusal(asked: Asked) -> str | None:
    """Why this kernel cannot serve such pages; None: it can."""
    format, page_size, head_dims, schemes = asked.format, asked.page_size, asked.head_dims, asked.pools
    if format not in ("bfloat16", "float16", *FORMATS):
        return (
            f"pages of {format}: the tensor cores take bfloat16 and float16 here, or {', '.join(FORMATS)} with scales"
        )
    sizes = (32,) if schemes else (8, 16, 32)
    if page_size not in sizes and page_size % BLOCK_LEN:
        legal = ", ".join(map(str, sizes))
        return f"page_size = {page_size}: must be {legal} or a multiple of {BLOCK_LEN} for pages of {format}"
    if asked.is_latent and format in SHARED:
        return f"pages of {format} whose values are columns of the keys: the numbers of a byte are far apart"
    for dim, scheme in zip(head_dims, schemes or (None, None), strict=True):
        step = 16 if scheme is None else 64 if scheme.format == "int2" else 32
        if dim % step or not step <= dim <= (WIDEST if in_columns_alone(asked) else 256):
            kept = format if scheme is None else scheme.format
            return f"head dims = {head_dims}: must be multiples of {step} in [{step}, 256] for pages of {kept}"
    if asked.schemes is not None:
        reason = "values are columns of the keys" if asked.is_latent else None
        if reason := reason or gpu_scales.refusal(asked.schemes, page_size):
            return f"pages of {asked.stored_as}: {reason}"
    if asked.group > ROWS:
        return f"group size = {asked.group}: must be at most {ROWS} query heads for a KV head"
    if not in_columns_alone(asked) and not fit(head_dims, schemes, page_size=page_size).num_stages:
        return f"head dims = {head_dims}: shared memory does not hold a block of {asked.stored_as}"
    return None


WIDEST = 576
"""Most dims of keys whose first columns are the values (DeepSeek's 512 and 64, arXiv 2405.04434), in decoding."""


def in_columns_alone(asked: Asked) -> bool:
    """Whether these pages are wider than tiles with queries in rows hold, and `gpu_decode` takes them: latent ones of
    16 bits, few queries at once."""
    dims, num_columns = asked.head_dims, gpu_decode.columns_for(asked.num_queries, asked.group)
    is_one = asked.is_latent and asked.pools is None and max(dims) > 256 and not any(dim % 64 for dim in dims)
    return is_one and gpu_decode.refusal(dims, None, num_columns, asked.page_size, is_latent=True) is None


NARROW = 64
"""Most dims of values that two warpgroups attend to with page mass or valid slots: beyond, the registers of jax 0.12 do
not suffice."""


def is_wide(
    queries: tuple[int, ...],
    pages: Pages,
    lists: Lists,
    with_page_mass: bool,
    chip: Chip,
    max_stages: int | None = None,
) -> bool:
    """Whether a tile of these queries [B, T, H, D] has 128 rows, for two warpgroups."""
    value_dim = pages.head_dims[1]
    if chip != "hopper" or queries[1] * queries[2] // pages.num_kv_heads <= ROWS or pages.per is not None:
        return False
    # The first silences what nobody sees of the values, and the second may be reading them as keys.
    if pages.is_latent:
        return False
    # Wider values than are multiplied at once would not fit into registers, where the next scores are beside them.
    if value_dim > (NARROW if with_page_mass or lists.valid is not None else COLUMNS):
        return False
    tiles = fit(
        pages.head_dims,
        None,
        num_consumers=2,
        page_size=pages.page_size,
        max_stages=max_stages or MAX_STAGES,
        with_page_mass=with_page_mass,
    )
    return tiles.num_stages >= 2


def paged_attention(
    queries: Float[Array, "B T H D"],
    pages: Pages,
    lists: Lists,
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    scoring: Scoring,
    *,
    plan: Plan | None = None,
    num_pieces: int | None = None,
    max_stages: int | None = None,
    chip: Chip | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """See `api.paged_attention`: by `gpu_decode` where it can, else in tiles of 64 or 128 rows."""
    chip = chip or this_chip()
    num_queries, num_heads = queries.shape[1:3]
    num_columns = gpu_decode.columns_for(num_queries, num_heads // pages.num_kv_heads)
    asked = pages.head_dims, pages.schemes, num_columns, pages.page_size, chip, pages.is_latent
    if gpu_decode.refusal(*asked):
        return in_tiles(
            queries,
            pages,
            lists,
            query_positions,
            kv_lens,
            scoring,
            num_pieces=num_pieces,
            max_stages=max_stages,
            num_consumers=1 + is_wide(queries.shape, pages, lists, scoring.with_page_mass, chip, max_stages),
            chip=chip,
            interpret=interpret,
        )
    if plan is None:
        plan = plan_attention(
            lists,
            query_positions,
            kv_lens,
            num_kv_heads=pages.num_kv_heads,
            page_size=pages.page_size,
            visible=scoring.visible,
            num_pieces=num_pieces,
        )
    return in_columns(queries, pages, lists, plan, scoring, max_stages=max_stages, chip=chip, interpret=interpret)


def in_columns(
    queries: Float[Array, "B T H D"],
    pages: Pages,
    lists: Lists,
    plan: Plan,
    scoring: Scoring,
    *,
    max_stages: int | None,
    chip: Chip,
    interpret: Any,
) -> tuple[Array, ...]:
    """See `api.paged_attention`: by `gpu_decode`, which takes it."""
    batch, num_queries, num_heads, dim = queries.shape
    num_kv_heads = pages.num_kv_heads
    group = num_heads // num_kv_heads
    if lists.is_by_head:  # a head is an item of its own, and a page a single tile
        queries = queries.reshape(batch, num_queries, num_kv_heads, group, dim).swapaxes(1, 2)
        queries = queries.reshape(-1, num_queries, group, dim)
        pages = pages.by_head()
    made = gpu_decode.decode(queries, pages, plan, scoring, max_stages=max_stages, chip=chip, interpret=interpret)
    outputs, sums = merge(made[0], made[1], plan.shares, num_queries, group, queries.dtype, interpret=interpret)

    def parted(x: Array) -> Array:
        """[items, T, heads, ...] to [B, T, H, ...]."""
        if lists.is_by_head:
            x = x.reshape(batch, num_kv_heads, num_queries, group, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(batch, num_queries, num_heads, *x.shape[4 if lists.is_by_head else 3 :])

    def rows(x: Array) -> Array:
        """[items, K, columns, ...] to [B, T, H, ...]."""
        x = x[:, :, : num_queries * group].reshape(len(x), x.shape[1], num_queries, group, *x.shape[3:])
        x = x.swapaxes(1, 2)
        return parted(x.reshape(*x.shape[:2], -1, *x.shape[4:]))

    found = parted(outputs), rows(sums)
    if not scoring.with_page_mass:
        return found
    mass = page_mass(made[2], sums, plan.counts[:, None], plan.order[:, None])
    mass = mass.reshape(*mass.shape[:-1], lists.num_entries, -1).sum(axis=-1)
    return *found, rows(mass)
