"""Writing keys and values of new tokens into their pages, in the pages' format."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels import selection
from pallas_kernels.debug import check_slots
from pallas_kernels.formats import Pages, Quantised
from pallas_kernels.kv_write import reference
from pallas_kernels.paged_attention.checks import check_pages
from pallas_kernels.selection import Asked
from pallas_kernels.typing import Float, Int32

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mosaic_gpu": selection.kernel("kv_write", "gpu"),
    "mosaic_tpu": selection.kernel("kv_write", "tpu"),
    "reference": reference.kv_write,
}
"""The first that can run is taken unless another is named."""
refusals = partial(selection.refusals, "kv_write")


def implementations() -> dict[str, Callable[..., Any]]:
    """What can run on this device, the most preferred first, for the pages that kernels like best."""
    return selection.available(IMPLEMENTATIONS, refusals())


def kv_write(
    key_pages: Float[Array, "P K page D"] | Quantised | Array,
    value_pages: Float[Array, "P K page Dv"] | Quantised | Array,
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K Dv"],
    write_slots: Int32[Array, "B T"],
    *,
    implementation: str | None = None,
) -> tuple[Pages, Pages]:
    """The pages with every token's keys and values in its slot; in place where the caller donates the pages.

    Slot s is offset s % page of page s // page; a token whose slot is not in the pool is dropped, and what it holds is not read
    arithmetically. The tokens of a row go to consecutive positions, from the last slot of a page into the first of another; those
    that are dropped count as well. No two rows write into one page.

    `Quantised` pages take tokens in their format, in the same pass. By token, each token and head has the scale with which its
    largest magnitude just fits. By channel, the tokens of this call set the scales of the pages whose first slot they write, so
    that whole pages are quantised best; into pages begun earlier they are written with the scales that these have, cut off at the
    largest number. What is nowhere as large as `formats.FAINT` (6e-33) is stored as zeros.

    Raises ValueError for shapes that do not fit together and for an unavailable `implementation`; while debugging is on
    (`pallas_kernels.debug`), for slots against the rules above as well.
    """
    check_pages(key_pages, value_pages)
    if write_slots.ndim != 2 or write_slots.dtype != jnp.int32:
        raise ValueError(f"write_slots = {write_slots.dtype.name}{list(write_slots.shape)}: must be int32 [B, T]")
    if keys.dtype != values.dtype:
        raise ValueError(f"values of {values.dtype.name}: must be of the keys' type, {keys.dtype.name}")
    if isinstance(key_pages, Quantised) and not jnp.issubdtype(keys.dtype, jnp.floating):
        raise ValueError(f"keys of {keys.dtype.name}: must be floating, to be quantised to {key_pages.format}")
    if not isinstance(key_pages, Quantised) and not jnp.issubdtype(key_pages.dtype, jnp.floating):
        bits = jnp.uint8 if keys.dtype.itemsize == 1 else keys.dtype  # numbers of 8 bits may be kept as such
        if key_pages.dtype not in (keys.dtype, bits):
            raise ValueError(
                f"key_pages of {key_pages.dtype.name}: must be floating, of the tokens' type {keys.dtype.name}, or Quantised"
            )
    wanted = (*write_slots.shape, key_pages.shape[1])
    for name, tokens, pool in (("keys", keys, key_pages), ("values", values, value_pages)):
        if tokens.shape != (*wanted, pool.shape[3]):
            raise ValueError(
                f"{name} = {tokens.shape}: must be {(*wanted, pool.shape[3])}, as write_slots and pages of {pool.shape} say"
            )
    asked = Asked.of(key_pages, value_pages, 1, keys.dtype)
    _, run = selection.select("kv_write", implementation, IMPLEMENTATIONS, refusals(asked))
    check_slots("kv_write", write_slots, key_pages.shape[0], key_pages.shape[2])
    if not write_slots.size:
        return key_pages, value_pages
    return run(key_pages, value_pages, keys, values, write_slots)
