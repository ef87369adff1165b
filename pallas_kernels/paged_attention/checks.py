"""What is refused before anything is traced: pools, tables and options that do not fit together."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.formats import Pages, Quantised, check_format, format_of
from pallas_kernels.masking import check_options
from pallas_kernels.paged_attention.plan import BLOCK_LEN, Plan


def check_pages(key_pages: Pages, value_pages: Pages) -> None:
    """Raises ValueError for pools that are not of one format, or whose arrays do not fit together."""
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if pages.ndim != 4 or 0 in pages.shape:
            raise ValueError(f"{name} = {pages.shape}: must be [P, K, page, D], with one at least of each")
        if isinstance(pages, Quantised):
            check_format(pages.format, pages.per, pages.shape)
            if pages.scales.dtype != jnp.float32:
                raise ValueError(f"{name}.scales of {pages.scales.dtype.name}: must be float32")
    if key_pages.shape[:3] != value_pages.shape[:3]:
        raise ValueError(f"value_pages = {value_pages.shape}: must share [P, K, page] with keys {key_pages.shape}")
    if isinstance(key_pages, Quantised) != isinstance(value_pages, Quantised) or key_pages.dtype != value_pages.dtype:
        raise ValueError(f"value_pages of {format_of(value_pages)}: must be stored as keys are, {format_of(key_pages)}")
    if isinstance(key_pages, Quantised) and isinstance(value_pages, Quantised) and key_pages.per != value_pages.per:
        raise ValueError(f"value_pages: scaled by {value_pages.per}, must be by {key_pages.per}, as keys are")
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if isinstance(pages, Quantised):
            wanted = (*pages.shape[:2], pages.shape[2 if pages.per == "token" else 3])
            if pages.scales.shape != wanted:
                raise ValueError(f"{name}.scales = {pages.scales.shape}: must be {wanted}, one for each {pages.per}")


def check(
    queries: Array,
    key_pages: Pages,
    value_pages: Pages,
    page_table: Array,
    page_starts: Array,
    valid_slots: Array | None,
    window: int | None,
    num_sinks: int,
    soft_cap: float | None,
    by_sequence: dict[str, tuple[Array, tuple[int, ...]]],
) -> None:
    """Raises ValueError for shapes that do not fit together and options out of range; `by_sequence` are arrays and the shapes that
    the queries ask of them."""
    if queries.ndim != 4 or not queries.shape[2] or not jnp.issubdtype(queries.dtype, jnp.floating):
        raise ValueError(
            f"queries = {queries.dtype.name}{list(queries.shape)}: must be floating [B, T, H, D], with a head at least"
        )
    check_pages(key_pages, value_pages)
    num_heads, num_kv_heads = queries.shape[2], key_pages.shape[1]
    if not isinstance(key_pages, Quantised) and not jnp.issubdtype(key_pages.dtype, jnp.floating):
        raise ValueError(f"key_pages of {key_pages.dtype.name}: must be floating, or Quantised with scales")
    if page_table.ndim not in (2, 3):
        raise ValueError(
            f"page_table = {page_table.shape}: must be [B, num_pages], or [B, K, num_pages] for lists of each head"
        )
    for name, array in (
        ("page_table", page_table),
        ("page_starts", page_starts),
        *((n, x) for n, (x, _) in by_sequence.items()),
    ):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} of {array.dtype.name}: must be int32")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads = {num_heads}: must be a multiple of num_kv_heads = {num_kv_heads}")
    if queries.shape[3] != key_pages.shape[3]:
        raise ValueError(f"queries: head dim {queries.shape[3]} must equal the keys' {key_pages.shape[3]}")
    if page_table.shape != page_starts.shape:
        raise ValueError(f"page_starts = {page_starts.shape}: must have the shape of page_table {page_table.shape}")
    for name, (array, shape) in by_sequence.items():
        if array.shape != shape:
            raise ValueError(f"{name} = {array.shape}: must be {shape}, as queries {queries.shape} say")
    if len(page_table) != len(queries):
        raise ValueError(f"page_table = {page_table.shape}: must have a row for each of {len(queries)} sequences")
    if page_table.ndim == 3 and page_table.shape[1] != num_kv_heads:
        raise ValueError(f"page_table = {page_table.shape}: must list pages for each of {num_kv_heads} KV heads")
    slots = (*page_table.shape, key_pages.shape[2])
    if valid_slots is not None and valid_slots.shape != slots:
        raise ValueError(f"valid_slots = {valid_slots.shape}: must be {slots}, a flag for each slot of each entry")
    if valid_slots is not None and valid_slots.dtype != jnp.bool:
        raise ValueError(f"valid_slots of {valid_slots.dtype.name}: must be bool")
    check_options(window, num_sinks, soft_cap)


def check_plan(
    plan: Plan,
    queries: tuple[int, ...],
    key_pages: tuple[int, ...],
    page_table: tuple[int, ...],
    valid_slots: Array | None,
    window: int | None,
    num_sinks: int,
) -> None:
    """Raises ValueError for a plan that was made for something else than a call of these shapes and options."""
    by_head = len(page_table) == 3
    num_parts = max(1, key_pages[2] // BLOCK_LEN)
    wanted = {
        "items": queries[0] * (key_pages[1] if by_head else 1),
        "queries": queries[1],
        "entries": page_table[-1] * num_parts,
        "page_size": key_pages[2] // num_parts,
        "num_kv_heads": 1 if by_head else key_pages[1],
        "has valid_slots": valid_slots is not None,
        "window": window,
        "num_sinks": num_sinks,
    }
    found = {
        "items": plan.last.shape[0],
        "queries": plan.last.shape[1],
        "entries": plan.pages.shape[1],
        "page_size": plan.page_size,
        "num_kv_heads": plan.num_kv_heads,
        "has valid_slots": plan.words is not None,
        "window": plan.window,
        "num_sinks": plan.num_sinks,
    }
    for name, value in found.items():
        if value != wanted[name]:
            raise ValueError(f"plan: {name} = {value}: must be {wanted[name]}, as the call's arguments say")
