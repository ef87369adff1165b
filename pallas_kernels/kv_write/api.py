"""Writing keys and values of new tokens into their pages, in the pages' format."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels import selection
from pallas_kernels.debug import check_slots
from pallas_kernels.formats import Quantised
from pallas_kernels.kv_write import reference
from pallas_kernels.pages import Pages
from pallas_kernels.selection import Asked
from pallas_kernels.typing import Float, Int32

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mosaic_gpu": selection.kernel("kv_write", "gpu"),
    "mosaic_tpu": selection.kernel("kv_write", "tpu"),
    "reference": reference.kv_write,
}
"""The first that can run is taken unless another is named."""
refusals = partial(selection.refusals, "kv_write")


def kv_write(
    pages: Pages,
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K Dv"] | None,
    write_slots: Int32[Array, "B T"],
    *,
    implementation: str | None = None,
) -> Pages:
    """The pages with every token's keys and values in its slot; in place where the caller donates the pages. `values`
    are None where they are columns of the keys.

    Slot s is offset s % page of page s // page; a token whose slot is not in the pool is dropped, and what it holds is
    not read arithmetically. The tokens of a row go to consecutive positions, from the last slot of a page into the
    first of another; those that are dropped count as well. No two rows write into one page.

    `Quantised` pages take tokens in their scheme, in the same pass. By token, each token and head, or each group of its
    channels, has the scale with which its largest magnitude, or its range, just fits. By channel, the tokens of this
    call set the scales of the pages whose first slot they write, so that whole pages are quantised best. Into pages
    begun earlier they are written with the scales that these have, cut off at the largest number. What is nowhere as
    large as `formats.FAINT` (6e-33) is stored as zeros. By channel with zeros, or with scales of bfloat16, pages are
    only sealed whole (`sealing`): they are refused.

    Raises ValueError for shapes that do not fit together and for an unavailable `implementation`; while debugging is on
    (`pallas_kernels.debug`), for slots against the rules above as well.
    """
    _check(pages, keys, values, write_slots)
    asked = Asked.of(pages, 1, keys.dtype)
    _, run = selection.select("kv_write", implementation, IMPLEMENTATIONS, refusals(asked))
    check_slots("kv_write", write_slots, pages.num_pages, pages.page_size)
    if not write_slots.size:
        return pages
    return run(pages, keys, values, write_slots)


def _check(pages: Pages, keys: Array, values: Array | None, write_slots: Array) -> None:
    """Raises ValueError for shapes and types that do not fit together."""
    pages.check()
    if write_slots.ndim != 2 or write_slots.dtype != jnp.int32:
        raise ValueError(f"write_slots = {write_slots.dtype.name}{list(write_slots.shape)}: must be int32 [B, T]")
    if (values is None) != pages.is_latent:
        said = "None, as they are columns of the keys" if pages.is_latent else "given, as the pages have some"
        raise ValueError(f"values = {None if values is None else values.shape}: must be {said}")
    if values is not None and keys.dtype != values.dtype:
        raise ValueError(f"values of {values.dtype.name}: must be of the keys' type, {keys.dtype.name}")
    for name, pool in zip(("keys", "values"), pages.pools, strict=False):
        if isinstance(pool, Quantised) and pool.per == "channel" and not pool.scheme.is_plain:
            raise ValueError(f"pages.{name} of {pool.scheme}: must be sealed whole (`sealing.seal_pages`)")
    stored = pages.keys.dtype
    if pages.per is not None and not jnp.issubdtype(keys.dtype, jnp.floating):
        raise ValueError(f"keys of {keys.dtype.name}: must be floating, to be quantised to {pages.format}")
    if pages.per is None and not jnp.issubdtype(stored, jnp.floating):
        bits = jnp.uint8 if keys.dtype.itemsize == 1 else keys.dtype  # numbers of 8 bits may be kept as such
        if stored not in (keys.dtype, bits):
            said = f"must be floating, of the tokens' type {keys.dtype.name}, or Quantised"
            raise ValueError(f"pages.keys of {stored.name}: {said}")
    wanted = (*write_slots.shape, pages.num_kv_heads)
    tokens = {"keys": keys} if values is None else {"keys": keys, "values": values}
    for (name, given), pool in zip(tokens.items(), pages.pools, strict=True):
        if given.shape != (*wanted, pool.shape[3]):
            said = f"must be {(*wanted, pool.shape[3])}, as write_slots and pages of {pool.shape} say"
            raise ValueError(f"{name} = {given.shape}: {said}")
