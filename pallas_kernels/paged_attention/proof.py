"""What every kernel of paged attention must do, simulated or on a chip: float64's answer from memory that is NaN wherever nothing
may be read."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import Pages, Quantised, quantised
from pallas_kernels.masking import NOWHERE


def brute_force(query, keys, values, position, window, sinks, cap, scale, readable=None):
    """One query head [D] over keys [n, D] and values [n, Dv] in float64, of which `readable` says which are there; returns output
    and log-sum-exp."""
    seen = [p for p in range(len(keys)) if p <= position and (window is None or position - p < window or p < sinks)]
    seen = [p for p in seen if readable is None or readable[p]]
    if not seen:
        return np.zeros(values.shape[1]), -np.inf
    scores = keys[seen] @ query * scale
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    weights = np.exp(scores - scores.max())
    return weights @ values[seen] / weights.sum(), np.log(weights.sum()) + scores.max()


CASES: dict[str, dict[str, Any]] = {
    "lengths 0, 1, page, page + 1; an empty one first and last": {
        "lengths": [0, 1, 8, 0, 9, 0],
        "num_queries": 1,
        "group": 4,
    },
    "several blocks, odd head dims": {
        "lengths": [70, 3],
        "num_queries": 1,
        "group": 3,
        "dims": (80, 32),
        "kv_heads": 1,
    },
    "head dims that models have": {"lengths": [70], "num_queries": 1, "group": 4, "dims": (256, 128), "kv_heads": 1},
    "head dims of 192": {"lengths": [70], "num_queries": 1, "group": 2, "dims": (192, 64), "kv_heads": 1},
    "one-hot attention": {"lengths": [40, 9], "num_queries": 1, "group": 2, "magnitude": 1e3},
    "pages that several sequences list, and one lists twice": {
        "lengths": [40, 20, 70],
        "num_queries": 1,
        "group": 2,
        "page_size": 8,
        "is_shared": True,
    },
    "positions beyond 32 K": {
        "lengths": [40_000],
        "num_queries": 1,
        "group": 2,
        "kv_heads": 1,
        "window": 70,
        "page_size": 64,
        "with_mass": False,
    },
    "one head each": {"lengths": [41, 64], "num_queries": 1, "group": 1},
    "a chunk in two tiles, window, sinks, soft cap": {
        "lengths": [33, 9],
        "num_queries": 5,
        "group": 2,
        "window": 7,
        "sinks": 2,
        "cap": 5.0,
    },
    "large logits": {"lengths": [30], "num_queries": 2, "group": 2, "magnitude": 40.0},
    "every KV head keeps pages and slots of its own": {
        "lengths": [50, 7, 0],
        "num_queries": 2,
        "group": 2,
        "lists": "heads",
        "kept": 0.5,
    },
    "slots that are not valid, window, sinks": {
        "lengths": [45, 20],
        "num_queries": 1,
        "group": 2,
        "kept": 0.7,
        "window": 12,
        "sinks": 3,
        "page_size": 16,
    },
    "int8 by token, window, soft cap": {
        "lengths": [45, 0, 8],
        "num_queries": 2,
        "group": 2,
        "format": "int8",
        "window": 9,
        "cap": 5.0,
        "page_size": 32,
        "dims": (32, 64),
    },
    "fp8 by token, large logits": {
        "lengths": [70, 9],
        "num_queries": 1,
        "group": 4,
        "format": "fp8",
        "magnitude": 40.0,
        "page_size": 32,
        "dims": (32, 32),
    },
    "fp8 by token, tiny values": {
        "lengths": [40],
        "num_queries": 1,
        "group": 2,
        "format": "fp8",
        "of_values": 1e-6,
        "page_size": 32,
        "dims": (32, 32),
    },
    "int4 by token, lists of each head": {
        "lengths": [70, 9],
        "num_queries": 1,
        "group": 2,
        "format": "int4",
        "lists": "heads",
        "page_size": 32,
        "dims": (64, 32),
    },
    "int8 by channel, valid slots": {
        "lengths": [70, 9],
        "num_queries": 1,
        "group": 2,
        "format": "int8",
        "per": "channel",
        "kept": 0.6,
        "page_size": 32,
        "dims": (32, 32),
    },
    "fp8 by channel, large logits": {
        "lengths": [40, 9],
        "num_queries": 1,
        "group": 4,
        "format": "fp8",
        "per": "channel",
        "magnitude": 40.0,
        "page_size": 32,
        "dims": (32, 32),
    },
    "int8 by channel, sizes of queries and keys that make up for each other": {
        "lengths": [40],
        "num_queries": 1,
        "group": 2,
        "format": "int8",
        "per": "channel",
        "magnitude": tuple(0.5**channel for channel in range(32)),
        "of_keys": tuple(2.0**channel for channel in range(32)),
        "page_size": 32,
        "dims": (32, 32),
    },
    "int8 by channel, keys beyond float16": {
        "lengths": [40],
        "num_queries": 1,
        "group": 2,
        "format": "int8",
        "per": "channel",
        "magnitude": 1e-6,
        "of_keys": 1e6,
        "page_size": 32,
        "dims": (32, 32),
    },
    "int4 by channel, tiny keys, channels of many sizes": {
        "lengths": [40],
        "num_queries": 1,
        "group": 2,
        "format": "int4",
        "per": "channel",
        "magnitude": 1e7,
        "of_keys": tuple(1e-6 * 0.7**channel for channel in range(32)),
        "page_size": 32,
        "dims": (32, 32),
    },
    "int8 by channel, a page of which nothing is seen though slots behind its end are valid": {
        "lengths": [33],
        "num_queries": 1,
        "group": 2,
        "kv_heads": 1,
        "format": "int8",
        "per": "channel",
        "kept": 0.5,
        "seed": 1,
        "page_size": 32,
        "dims": (32, 32),
    },
    "int4 by channel": {
        "lengths": [40, 100],
        "num_queries": 1,
        "group": 2,
        "format": "int4",
        "per": "channel",
        "page_size": 32,
        "dims": (32, 32),
    },
}


def generated(
    number: int,
    *,
    dtypes: Sequence[str],
    page_sizes: Sequence[int],
    dims: Sequence[int],
    formats: Sequence[str] = (),
    quantised_page_sizes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A case drawn from the option space, the same for the same number: one in three in one of `formats`, if any."""
    rng = np.random.default_rng(number)

    def one_of(options: Sequence[Any]) -> Any:
        return options[int(rng.integers(len(options)))]

    format = one_of((None, None, *formats[:1])) and one_of(formats)
    sizes = quantised_page_sizes if format and quantised_page_sizes else page_sizes
    page_size, num_queries = one_of(sizes), one_of((1, 1, 2, 5))
    window = one_of((None, None, 1, page_size, 13))
    edges = (0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size)
    return {
        "lengths": [one_of((*edges, int(rng.integers(0, 61)))) for _ in range(rng.integers(1, 4))],
        "num_queries": num_queries,
        "group": one_of((1, 2, 3, 4, 8, 16) if num_queries == 1 else (1, 2, 4)),
        "dims": (one_of(dims), one_of(dims)),
        "kv_heads": one_of((1, 2)),
        "window": window,
        "sinks": 0 if window is None else one_of((0, 0, 1, 4)),
        "cap": one_of((None, None, 1.5, 30.0)),
        "dtype": one_of(dtypes),
        "page_size": page_size,
        "magnitude": one_of((1.0, 1.0, 40.0)),
        "of_values": one_of((1.0, 1.0, 1e-3, 1e3)),
        "lists": one_of(("sequences", "sequences", "heads")),
        "kept": one_of((1.0, 1.0, 0.6)),
        "format": format,
        "per": one_of(("token", "token", "channel")),
        "with_mass": one_of((False, False, True)),
        "seed": number,
    }


def check(
    kernel: Callable, *, lengths, num_queries, group, dims=(16, 16), kv_heads=2, window=None, sinks=0, cap=None, dtype="float32", page_size=8,
    magnitude=1.0, lists="sequences", kept=1.0, format=None, per="token", with_mass=True, prefill=False, of_keys=1.0, of_values=1.0, misread=0, is_shared=False, seed=3, is_compiled=True,
):  # fmt: skip
    """Against float64: relative error at most 1.25 times that of rounding the exact answer to the type, log-sum-exp to 1e-4. Where
    the type is float32 itself, at most what rounding the scores does to the weights.

    `kernel` is called as `api.paged_attention`, or for `prefill` as `paged_prefill`, where a sequence shorter than the chunk leaves
    the rest of it empty. With lists of "heads" every KV head has its own, which leaves pages out; `kept` is the part of all slots
    that is valid; `magnitude` of queries and `of_keys` may be of each channel, from the first again where there are more; `misread` adds to every page id
    that the kernel is given; where pages are shared, the first two of every sequence are the first one's first. In a `format`, what is compared is the kernel's answer over what the numbers stand for: the loss of
    quantising is not the kernel's. All of it is one program, unless it is not to be `is_compiled`: the simulator of GPUs wants a
    thread for every warpgroup, of which a program of many steps takes one.
    """
    rng, batch = np.random.default_rng(seed), len(lengths)
    magnitude, of_keys = (np.resize(np.asarray(one, np.float64), dims[0]) for one in (magnitude, of_keys))
    table_len = max(-(-max(lengths) // page_size), 1) + 2
    num_pages = 2 + batch * kv_heads * table_len
    keys, values = (np.full((num_pages, kv_heads, page_size, dim), np.nan, np.float32) for dim in dims)
    table, starts = np.zeros((2, batch, kv_heads, table_len), np.int32)
    starts[:] = NOWHERE
    valid = rng.random((batch, kv_heads, table_len, page_size)) < kept
    free_pages = iter(rng.permutation(np.arange(1, num_pages - 1)).tolist())
    positions = np.zeros((batch, num_queries), np.int32)
    stored = [[np.zeros((length, kv_heads, dim)) for dim in dims] for length in lengths]
    readable = [np.zeros((length, kv_heads), bool) for length in lengths]
    for row, length in enumerate(lengths):
        positions[row] = max(length - num_queries, 0) + np.arange(num_queries)
        num_held = -(-length // page_size)
        for head in range(kv_heads):
            if head and lists == "sequences":
                table[row, head], starts[row, head], valid[row, head] = table[row, 0], starts[row, 0], valid[row, 0]
            else:
                held = rng.permutation(num_held)[: num_held if lists == "sequences" else rng.integers(num_held + 1)]
                table[row, head, : len(held)] = [next(free_pages) for _ in held]
                starts[row, head, : len(held)] = held * page_size
            for entry in np.flatnonzero(starts[row, head] < NOWHERE):
                begin = starts[row, head, entry]
                slots = np.flatnonzero(valid[row, head, entry, : length - begin])
                readable[row][begin + slots, head] = True
                for pool, size in ((keys, of_keys), (values, of_values)):
                    tokens = (size * rng.standard_normal((len(slots), pool.shape[3]))).astype(jnp.dtype(dtype))
                    pool[table[row, head, entry], head, slots] = tokens.astype(np.float32)
    for row, head in np.ndindex(batch, kv_heads) if is_shared else ():
        for begin in (0, page_size):
            if lengths[row] >= begin + page_size:
                table[row, head, starts[row, head] == begin] = table[0, head, starts[0, head] == 0]
    pools = [as_stored(pool, dtype, format, per) for pool in (keys, values)]
    for row, length in enumerate(lengths):
        for head, entry in np.argwhere(starts[row] < NOWHERE):
            begin = starts[row, head, entry]
            slots = np.flatnonzero(valid[row, head, entry, : length - begin])
            for (_, holds), mine in zip(pools, stored[row], strict=True):
                mine[begin + slots, head] = holds[table[row, head, entry], head, slots]
    num_new = np.minimum(np.array(lengths, np.int32), num_queries)
    asked_for = positions, np.array(lengths, np.int32)
    if prefill:
        asked_for = positions[:, 0].copy(), num_new
        positions[np.arange(num_queries)[None] >= num_new[:, None]] = -1
    queries = jnp.asarray(magnitude * rng.standard_normal((batch, num_queries, kv_heads * group, dims[0])), dtype)
    scale = dims[0] ** -0.5
    table = table + misread * (starts < NOWHERE)
    mine = slice(None) if lists == "heads" else 0
    options = {"window": window, "num_sinks": sinks, "soft_cap": cap, "scale": scale, "with_page_mass": with_mass}
    run = partial(kernel, **options)
    outputs, log_sum_exp, *mass = (jax.jit(run) if is_compiled else run)(
        queries,
        pools[0][0],
        pools[1][0],
        *map(jnp.asarray, (table[:, mine], starts[:, mine], *asked_for)),
        valid_slots=None if kept == 1 else jnp.asarray(valid[:, mine]),
    )
    wanted, wanted_sum = np.zeros(outputs.shape), np.zeros(log_sum_exp.shape)
    for row, head, place in np.ndindex(batch, kv_heads * group, num_queries):
        k, v, there = (one[:, head // group] for one in (*stored[row], readable[row]))
        query = np.asarray(queries[row, place, head], np.float64)
        asked = (query, k, v, positions[row, place], window, sinks, cap, scale)
        wanted[row, place, head], wanted_sum[row, place, head] = brute_force(*asked, there)
        for entry in range(table_len) if with_mass else ():
            begin, share = starts[row, head // group, entry], 0.0
            if begin < len(there):  # what the entry's own tokens weigh, of all
                own = np.zeros_like(there)
                own[begin : begin + page_size] = there[begin : begin + page_size]
                part = brute_force(*asked, own)[1]
                share = 0.0 if part == -np.inf else np.exp(part - wanted_sum[row, place, head])
            found = float(mass[0][row, place, head, entry])
            assert abs(found - share) < 2e-4, f"page mass {found}, wanted {share}"
    rounding = np.linalg.norm(np.asarray(jnp.asarray(wanted, dtype), np.float64) - wanted)
    error = np.linalg.norm(np.asarray(outputs, np.float64) - wanted)
    allowed = max(
        1.25 * rounding,
        1e-6 * max(1, np.max(magnitude * of_keys) / 10) * np.linalg.norm(wanted),
    )
    assert error <= allowed, f"error {error}, allowed {allowed}"
    np.testing.assert_allclose(log_sum_exp, wanted_sum, atol=1e-4, rtol=1e-5)


def as_stored(pool: np.ndarray, dtype: Any, format: str | None, per: Any) -> tuple[Pages, np.ndarray]:
    """A pool [P, K, page, D] whose unused slots are NaN, in its type or format, and what it stands for in float64. Unused slots stay
    as bad as the format can make them: NaN scales, or NaN payloads where there are any."""
    if format is None:
        return jnp.asarray(pool, dtype), pool.astype(np.float64)
    unused = np.isnan(pool).any(axis=3)
    pages = jax.jit(partial(quantised, format=format, per=per))(np.nan_to_num(pool))
    payload, scales = np.array(pages.payload), np.array(pages.scales)
    holds = np.asarray(pages.values(), np.float64)
    payload[unused] = np.nan if format == "fp8" else 0x55
    scales[unused if per == "token" else unused.all(axis=2)] = np.nan
    return Quantised(jnp.asarray(payload), jnp.asarray(scales), per), holds
