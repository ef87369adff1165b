"""What every implementation of `kv_write` must do, simulated or on a chip: bit for bit what numpy writes, and nothing
else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.formats import FAINT, FORMATS, INVERSE, LARGEST, Quantised, Stored, arrays_of
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.pages import Pages


def by_api(**how: Any) -> Callable[..., Pages]:
    """`api.kv_write`, which is called as implementations are; `how` goes to it as well."""
    return partial(kv_write, **how)


def check(
    write: Callable[..., Pages], *, counts, begins, num_tokens=None, dims=(32, 32), kv_heads=2, dtype="float32",
    page_size=32, format=None, per="token", misplace=0, seed=3, sizes=(-6, 6), is_latent=False, is_compiled=True,
) -> None:  # fmt: skip
    """Against numpy, bit for bit. Row b writes `counts[b]` tokens at positions from `begins[b]`; all other slots hold
    NaN and must go on doing so, and the tokens that are dropped hold NaN too. `misplace` adds to every slot that the
    implementation is given; `sizes` are the exponents, base 2, between which rows differ; where values are columns of
    the keys (`is_latent`), only keys are written; `is_compiled` as in `paged_attention.proof`."""
    rng, batch = np.random.default_rng(seed), len(counts)
    num_tokens = num_tokens or max(1, *counts)
    per_row = max((begin + count) // page_size + 1 for begin, count in zip(begins, counts, strict=True))
    num_pages = 2 + batch * per_row
    tables = rng.permutation(np.arange(1, num_pages - 1))[: batch * per_row].reshape(batch, per_row)
    slots = np.full((batch, num_tokens), num_pages * page_size, np.int32)
    for row, (begin, count) in enumerate(zip(begins, counts, strict=True)):
        positions = begin + np.arange(count)
        slots[row, :count] = tables[row, positions // page_size] * page_size + positions % page_size
    tokens, widths = [], dims[:1] if is_latent else dims
    for dim in widths:
        drawn = rng.standard_normal((batch, num_tokens, kv_heads, dim)) * np.exp2(
            rng.integers(sizes[0], sizes[1], (batch, 1, kv_heads, 1))
        )
        drawn[rng.random(drawn.shape[:3]) < 0.1] = 0  # a token of zeros has no scale
        drawn[slots >= num_pages * page_size] = np.nan
        tokens.append(jnp.asarray(drawn, dtype))
    pools = [_pool(rng, (num_pages, kv_heads, page_size, dim), dtype, format, per) for dim in widths]
    wanted = [_written(pool, np.asarray(array), slots) for pool, array in zip(pools, tokens, strict=True)]
    pages = Pages(pools[0], value_dim=dims[1]) if is_latent else Pages(pools[0], pools[1])
    given = (tokens[0], None) if is_latent else tokens
    found = (jax.jit(write) if is_compiled else write)(pages, *given, jnp.asarray(slots + misplace))
    for name, pool, arrays in zip(("keys", "values")[: len(pools)], found.pools, wanted, strict=True):
        for part, array, there in zip(("payload", "scales"), arrays_of(pool), arrays, strict=False):
            width = np.dtype(f"u{there.dtype.itemsize}")
            same = np.asarray(array).view(width) == there.view(width)
            assert same.all(), (
                f"{name}, {part}: {int((~same).sum())} of {same.size} numbers differ, first {np.argwhere(~same)[0]}"
            )


def _pool(rng: Any, shape: tuple[int, ...], dtype: str, format: str | None, per: Any) -> Stored:
    if format is None:
        return jnp.full(shape, jnp.nan, dtype)
    width = shape[3] // 2 if format == "int4" else shape[3]
    bits = rng.integers(0, 256, (*shape[:3], width)).astype(np.uint8)
    scales = np.full((*shape[:2], shape[2] if per == "token" else shape[3]), np.nan, np.float32)
    if per == "channel":  # pages begun earlier have some
        scales[:] = np.exp2(rng.integers(-9, -3, scales.shape))
    payload = jnp.asarray(bits.view(np.dtype(FORMATS[format])))
    return Quantised(payload, jnp.asarray(scales), format, per)


def _written(pool: Stored, tokens: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
    """What is to be in the pool's arrays, token by token."""
    arrays = [np.array(array) for array in arrays_of(pool)]
    page_size, past = pool.shape[2], pool.shape[0] * pool.shape[2]
    if not isinstance(pool, Quantised):
        for row, place in np.argwhere(slots < past):
            arrays[0][slots[row, place] // page_size, :, slots[row, place] % page_size] = tokens[row, place]
        return arrays
    payload, scales = arrays
    exact, largest, inverse = (
        tokens.astype(np.float32),
        np.float32(LARGEST[pool.format]),
        np.float32(INVERSE[pool.format]),
    )
    if pool.per == "channel":
        opened = {int(slot) // page_size for slot in slots[slots < past] if slot % page_size == 0}
        for page in opened:
            mine = (slots // page_size == page) & (slots < past)
            scales[page] = _loud(np.abs(exact[mine]).max(axis=0)) * inverse
    for row, place in np.argwhere(slots < past):
        page, offset = slots[row, place] // page_size, slots[row, place] % page_size
        for head in range(scales.shape[1]):
            token = exact[row, place, head]
            if pool.per == "token":
                scales[page, head, offset] = _loud(np.abs(token).max()) * inverse
            scale = scales[page, head, offset] if pool.per == "token" else scales[page, head]
            with np.errstate(divide="ignore"):
                number = np.clip(token * np.where(scale == 0, np.float32(0), 1 / scale), -largest, largest)
            if pool.format == "fp8":
                payload[page, head, offset] = number.astype(ml_dtypes.float8_e4m3fn)
            else:
                whole = np.rint(number).astype(np.int32)
                if pool.format == "int4":
                    low, high = np.split(whole & 15, 2)
                    whole = low | high << 4
                payload[page, head, offset] = whole.astype(payload.dtype)
    return arrays


def _loud(largest: Any) -> Any:
    """What is too faint for a format is zero."""
    return np.where(largest < FAINT, np.float32(0), largest)
