"""Paged attention for XLA on CPU: a loop over blocks of pages that stay in cache, as long as what is live.

The work list holds every (sequence, block of table entries) in which some query sees something. Each turn of the loop
takes a few items of it, gathers their tiles, attends, and merges the partial results online (arXiv 1805.02867). So the
cost follows the sum of the live lengths, not the width of the page table nor the longest sequence, and the temporaries
are one turn's."""

from functools import reduce
from operator import add

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.formats import Quantised, Stored, column_parts, each_array
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention.sharing import any_lists
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.typing import Bool, Float, Int32
from pallas_kernels.visible import NOWHERE, Visible

BLOCK_LEN = 256
"""Tokens of an item: a tile of keys, its values and its scores fit in a core's cache together."""


@any_lists
def paged_attention(
    queries: Float[Array, "B T H D"],
    pages: Pages,
    lists: Lists,
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    scoring: Scoring,
    *,
    block_len: int | None = None,
) -> tuple[Array, ...]:
    """See `api.paged_attention`. Not differentiable: the loop's length is known on the device only."""
    batch, num_queries, num_heads, dim = queries.shape
    num_kv_heads, page_size, value_dim = pages.num_kv_heads, pages.page_size, pages.head_dims[1]
    block_pages = max(1, min((block_len or BLOCK_LEN) // page_size, lists.num_entries))
    # Few items a turn waste little on the last one; many short queries want more work than one item is.
    num_blocks = batch * -(-lists.num_entries // block_pages)
    num_items = min(max(8, batch // 4) if num_queries < 8 else 2, num_blocks)

    work = _work_list(lists, query_positions, kv_lens, scoring.visible, page_size, block_pages, num_items)
    tables, starts, valid, owners, order, num_live = work
    grouped = queries.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, dim)
    rows = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, dim)  # [B, K, G * T, D]
    offsets = jnp.arange(page_size, dtype=jnp.int32)[None, None, :]

    def turn(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        highest, total, outputs, *of_pages = state
        listed, begins, owner = (
            lax.dynamic_slice_in_dim(x, index * num_items, num_items) for x in (tables, starts, owners)
        )
        positions = (begins[:, :, None] + offsets).reshape(num_items, 1, -1)
        seen = scoring.visible.sees(query_positions[owner][:, :, None], positions)
        seen = seen & (positions < kv_lens[owner][:, None, None])
        if valid is not None:
            seen = seen & lax.dynamic_slice_in_dim(valid, index * num_items, num_items)[:, None]
        part, part_highest, part_totals = _attend(rows[owner], pages, listed, seen, scoring)
        # Several items of a turn may belong to one sequence.
        new = highest.at[owner].max(part_highest)
        keep, take = jnp.exp(highest - _finite(new)), jnp.exp(part_highest - _finite(new)[owner])
        outputs = (outputs * keep[..., None]).at[owner].add(take[..., None] * part)
        if of_pages:
            logs = jnp.log(part_totals) + _finite(part_highest)[..., None]
            of_pages = [of_pages[0].at[lax.dynamic_slice_in_dim(order, index * num_items, num_items)].set(logs)]
        return new, (total * keep).at[owner].add(take * part_totals.sum(axis=-1)), outputs, *of_pages

    shape = rows.shape[:3]
    state = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, value_dim)))
    if scoring.with_page_mass:  # of all blocks and one more, where what fills the last turn is written
        state = (*state, jnp.full((num_blocks + 1, *shape[1:], block_pages), -jnp.inf))
    highest, total, outputs, *of_pages = lax.fori_loop(0, -(-num_live // num_items), turn, state)

    outputs = outputs / jnp.where(total == 0, 1, total)[..., None]
    shape = (batch, num_kv_heads, num_heads // num_kv_heads, num_queries)
    outputs = outputs.reshape(*shape, value_dim).transpose(0, 3, 1, 2, 4)
    log_sum_exp = (jnp.log(total) + _finite(highest)).reshape(shape).transpose(0, 3, 1, 2)
    outputs = outputs.reshape(batch, num_queries, num_heads, value_dim).astype(queries.dtype)
    log_sum_exp = log_sum_exp.reshape(batch, num_queries, num_heads)
    if not scoring.with_page_mass:
        return outputs, log_sum_exp
    logs = of_pages[0][:-1].reshape(batch, -1, *shape[1:], block_pages)
    return outputs, log_sum_exp, _page_mass(logs, log_sum_exp)[..., : lists.num_entries]


def _page_mass(
    logs: Float[Array, "B blocks K G T pages"], log_sum_exp: Float[Array, "B T H"]
) -> Float[Array, "B T H entries"]:
    """What each entry's share of the whole is, from the log-sum-exp of both."""
    logs = logs.transpose(0, 4, 2, 3, 1, 5).reshape(*log_sum_exp.shape, -1)
    return jnp.exp(logs - _finite(log_sum_exp)[..., None])


def _work_list(
    lists: Lists,
    query_positions: Int32[Array, "B T"],
    kv_lens: Int32[Array, "B"],
    visible: Visible,
    page_size: int,
    block_pages: int,
    num_items: int,
) -> tuple[Array, Array, Array | None, Array, Array, Array]:
    """Pages [N, c], first positions [N, c], valid slots [N, S], sequence [N] and number [N] of every item in which a
    query sees something, those first; and how many these are. N is a multiple of `num_items`; what fills it belongs to
    sequence 0, sees nothing and changes nothing."""
    padding = ((0, 0), (0, -lists.num_entries % block_pages))
    tables = jnp.pad(lists.table, padding).reshape(-1, block_pages)
    starts = jnp.pad(lists.starts, padding, constant_values=NOWHERE).reshape(-1, block_pages)
    owners = jnp.arange(len(tables), dtype=jnp.int32) // (len(tables) // len(lists.table))
    last = jnp.minimum(query_positions.max(axis=1), kv_lens - 1)[owners, None]
    live = starts <= last
    if visible.span is not None:
        earliest = jnp.where(query_positions < 0, NOWHERE, query_positions).min(axis=1)
        first = visible.earliest(earliest)[owners, None]
        live = live & ((starts + page_size > first) | (starts < visible.num_sinks))
    valid = None
    if lists.valid is not None:
        valid = jnp.pad(lists.valid, (*padding, (0, 0))).reshape(len(tables), block_pages, page_size)
        live = live & valid.any(axis=2)
    live = live.any(axis=1)
    size = -(-len(tables) // num_items) * num_items
    (order,) = jnp.nonzero(live, size=size, fill_value=len(tables))
    tables = jnp.pad(tables, ((0, 1), (0, 0)))[order]
    starts = jnp.pad(starts, ((0, 1), (0, 0)), constant_values=NOWHERE)[order]
    if valid is not None:
        valid = jnp.pad(valid, ((0, 1), (0, 0), (0, 0)))[order].reshape(size, -1)
    return tables, starts, valid, jnp.pad(owners, (0, 1))[order], order, live.sum(dtype=jnp.int32)


def _attend(
    queries: Float[Array, "I K M D"],
    pages: Pages,
    listed: Int32[Array, "I c"],
    seen: Bool[Array, "I T S"],
    scoring: Scoring,
) -> tuple[Float[Array, "I K M Dv"], Float[Array, "I K M"], Float[Array, "I K M c"]]:
    """Outputs of each item's queries over its own pages, not normalised, with the highest score and each page's sum of
    weights."""
    num_items, num_kv_heads, num_rows, _ = queries.shape
    num_pages, page_size, value_dim = pages.num_pages, pages.page_size, pages.head_dims[1]
    num_slots = listed.shape[1] * page_size
    # Rows of one whole (page, head) tile are long contiguous copies, already in the order that the products want.
    heads = jnp.arange(num_kv_heads, dtype=jnp.int32)[None, :, None]
    tiles = listed[:, None, :] * num_kv_heads + heads

    def gather(pool: Stored) -> list[Array]:
        """[I, K, c, page * D / n] for each of the n parts of its columns."""

        def gathered(x: Array) -> Array:
            rows = x.reshape(num_pages * num_kv_heads, -1).at[tiles].get(mode="clip")
            return rows.reshape(*tiles.shape, *x.shape[2:]) if isinstance(pool, Quantised) else rows

        return [part.reshape(*tiles.shape, -1) for part in column_parts(each_array(pool, gathered))]

    # Barriers keep XLA from computing the mask anew in each consumer, and from gathering into layouts of its own.
    seen = lax.optimization_barrier(seen)
    keys = [part.reshape(*tiles.shape[:2], num_slots, -1) for part in lax.optimization_barrier(gather(pages.keys))]
    batched = ((0, 1), (0, 1))
    if pages.per is not None:
        queries = queries.astype(jnp.float32)
    products = [
        lax.dot_general(rows, part, (((3,), (3,)), batched), preferred_element_type=jnp.float32)
        for rows, part in zip(jnp.split(queries, len(keys), axis=3), keys, strict=True)
    ]
    scores = scoring.capped(reduce(add, products) * scoring.scale)
    scores = scores.reshape(num_items, num_kv_heads, -1, seen.shape[1], num_slots)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf).reshape(num_items, num_kv_heads, num_rows, num_slots)
    highest = scores.max(axis=-1)
    weights = jnp.exp(scores - _finite(highest)[..., None])

    # A weight of zero does not silence a NaN. Most items are seen whole and need no silencing.
    readable = seen.any(axis=1)

    def gathered_values() -> list[Array]:
        if not pages.is_latent:
            return gather(pages.values)
        values = jnp.concatenate(keys, axis=-1)[..., :value_dim]
        return [values.reshape(num_items, num_kv_heads, -1, page_size * value_dim)]

    def silenced() -> list[Array]:
        parts = [part.reshape(*tiles.shape, page_size, -1) for part in gathered_values()]
        parts = [jnp.where(readable.reshape(num_items, 1, -1, page_size, 1), part, 0) for part in parts]
        return [part.reshape(*tiles.shape, -1) for part in parts]

    values = lax.optimization_barrier(lax.cond(readable.all(), gathered_values, silenced))
    values = [part.reshape(num_items, num_kv_heads, num_slots, -1).astype(jnp.float32) for part in values]
    outputs = jnp.concatenate([lax.dot_general(weights, part, (((3,), (2,)), batched)) for part in values], axis=3)
    return outputs, highest, weights.reshape(*highest.shape, -1, page_size).sum(axis=-1)


def _finite(highest: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A shift that leaves what saw nothing at zero weight."""
    return jnp.where(highest == -jnp.inf, 0, highest)
