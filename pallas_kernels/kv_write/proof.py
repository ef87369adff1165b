"""What every implementation of `kv_write` must do, simulated or on a chip: bit for bit what numpy writes, and nothing else."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.formats import FAINT, FORMATS, INVERSE, LARGEST, Pages, Quantised, arrays_of

CASES: dict[str, dict[str, Any]] = {
    "one token each, some dropped": {"counts": [1, 0, 1, 1, 0, 1], "begins": [0, 3, 31, 5, 0, 32], "page_size": 32},
    "a chunk from the middle of a page, a whole page, an empty row": {
        "counts": [80, 64, 0],
        "begins": [5, 64, 0],
        "page_size": 64,
    },
    "pages of 8, odd head dims": {"counts": [30, 1], "begins": [3, 7], "page_size": 8, "dims": (80, 48)},
    "int8 by token": {"counts": [70, 3], "begins": [9, 32], "format": "int8"},
    "fp8 by token, one token each": {"counts": [1, 1, 1], "begins": [0, 33, 63], "format": "fp8", "page_size": 64},
    "int4 by token": {"counts": [40, 32], "begins": [31, 0], "format": "int4", "dims": (64, 128)},
    "int8 by channel": {"counts": [70, 3], "begins": [0, 37], "format": "int8", "per": "channel"},
    "int4 by channel, one token each": {
        "counts": [1, 1],
        "begins": [5, 32],
        "format": "int4",
        "per": "channel",
        "dims": (64, 64),
    },
    "int8 by token, one token each, 8 heads": {
        "counts": [1, 0, 1],
        "begins": [0, 3, 33],
        "format": "int8",
        "kv_heads": 8,
    },
    "fp8 by token, sizes that some chips take for zero": {
        "counts": [9] * 4,
        "begins": [0] * 4,
        "format": "fp8",
        "sizes": (-128, -100),
    },
    "fp8 by channel, sizes that some chips take for zero, one token each": {
        "counts": [1] * 6,
        "begins": [0, 0, 0, 0, 5, 5],
        "format": "fp8",
        "per": "channel",
        "sizes": (-128, -100),
    },
}


def generated(
    number: int, *, dtypes: Sequence[str], page_sizes: Sequence[int], dims: Sequence[int],
    quantised_page_sizes: Sequence[int] | None = None, quantised_dims: Sequence[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A case drawn from the option space, the same for the same number."""
    rng = np.random.default_rng(number)

    def one_of(options: Sequence[Any]) -> Any:
        return options[int(rng.integers(len(options)))]

    format = one_of((None, *FORMATS))
    page_size = one_of(quantised_page_sizes if format and quantised_page_sizes else page_sizes)
    dims = (quantised_dims if format else None) or dims
    longest = one_of((1, 1, page_size, 2 * page_size + 3))
    rows = int(rng.integers(1, 5))
    return {
        "counts": [int(rng.integers(longest + 1)) for _ in range(rows)],
        "begins": [one_of((0, 1, page_size - 1, page_size, int(rng.integers(60)))) for _ in range(rows)],
        "num_tokens": longest,
        "dims": (one_of(dims), one_of(dims)),
        "kv_heads": one_of((1, 2)),
        "dtype": one_of(dtypes),
        "page_size": page_size,
        "format": format,
        "per": one_of(("token", "channel")),
        "seed": number,
    }


def check(
    write: Callable[..., tuple[Pages, Pages]], *, counts, begins, num_tokens=None, dims=(32, 32), kv_heads=2, dtype="float32",
    page_size=32, format=None, per="token", misplace=0, seed=3, sizes=(-6, 6), is_compiled=True,
) -> None:  # fmt: skip
    """Against numpy, bit for bit. Row b writes `counts[b]` tokens at positions from `begins[b]`; all other slots hold NaN and must
    go on doing so, and the tokens that are dropped hold NaN too. `misplace` adds to every slot that the implementation is given; `sizes` are the
    exponents, base 2, between which rows differ; `is_compiled` as in `paged_attention.proof`."""
    rng, batch = np.random.default_rng(seed), len(counts)
    num_tokens = num_tokens or max(1, *counts)
    per_row = max((begin + count) // page_size + 1 for begin, count in zip(begins, counts, strict=True))
    num_pages = 2 + batch * per_row
    tables = rng.permutation(np.arange(1, num_pages - 1))[: batch * per_row].reshape(batch, per_row)
    slots = np.full((batch, num_tokens), num_pages * page_size, np.int32)
    for row, (begin, count) in enumerate(zip(begins, counts, strict=True)):
        positions = begin + np.arange(count)
        slots[row, :count] = tables[row, positions // page_size] * page_size + positions % page_size
    tokens = []
    for dim in dims:
        drawn = rng.standard_normal((batch, num_tokens, kv_heads, dim)) * np.exp2(
            rng.integers(sizes[0], sizes[1], (batch, 1, kv_heads, 1))
        )
        drawn[rng.random(drawn.shape[:3]) < 0.1] = 0  # a token of zeros has no scale
        drawn[slots >= num_pages * page_size] = np.nan
        tokens.append(jnp.asarray(drawn, dtype))
    pools = [_pool(rng, (num_pages, kv_heads, page_size, dim), dtype, format, per) for dim in dims]
    wanted = [_written(pool, np.asarray(one), slots) for pool, one in zip(pools, tokens, strict=True)]
    found = (jax.jit(write) if is_compiled else write)(
        pools[0], pools[1], tokens[0], tokens[1], jnp.asarray(slots + misplace)
    )
    for name, pool, arrays in zip(("keys", "values"), found, wanted, strict=True):
        for part, one, there in zip(("payload", "scales"), arrays_of(pool), arrays, strict=False):
            width = np.dtype(f"u{there.dtype.itemsize}")
            same = np.asarray(one).view(width) == there.view(width)
            assert same.all(), (
                f"{name}, {part}: {int((~same).sum())} of {same.size} numbers differ, first {np.argwhere(~same)[0]}"
            )


def _pool(rng: Any, shape: tuple[int, ...], dtype: str, format: str | None, per: Any) -> Pages:
    if format is None:
        return jnp.full(shape, jnp.nan, dtype)
    width = shape[3] // 2 if format == "int4" else shape[3]
    bits = rng.integers(0, 256, (*shape[:3], width)).astype(np.uint8)
    scales = np.full((*shape[:2], shape[2] if per == "token" else shape[3]), np.nan, np.float32)
    if per == "channel":  # pages begun earlier have some
        scales[:] = np.exp2(rng.integers(-9, -3, scales.shape))
    payload = jnp.asarray(bits.view(np.dtype(FORMATS[format])))
    return Quantised(payload, jnp.asarray(scales), per)


def _written(pool: Pages, tokens: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
    """What is to be in the pool's arrays, token by token."""
    arrays = [np.array(one) for one in arrays_of(pool)]
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
