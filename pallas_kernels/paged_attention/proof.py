"""What every kernel of paged attention must do, simulated or on a chip: float64's answer from memory that is NaN wherever nothing
may be read."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from pallas_kernels.masking import NOWHERE


def brute_force(query, keys, values, position, window, sinks, cap, scale):
    """One query head [D] over keys [n, D] and values [n, Dv] in float64; returns output and log-sum-exp."""
    seen = [p for p in range(len(keys)) if p <= position and (window is None or position - p < window or p < sinks)]
    if not seen:
        return np.zeros(values.shape[1]), -np.inf
    scores = keys[seen] @ query * scale
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    weights = np.exp(scores - scores.max())
    return weights @ values[seen] / weights.sum(), np.log(weights.sum()) + scores.max()


CASES = {
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
}


def check(
    kernel: Callable, *, lengths, num_queries, group, dims=(16, 16), kv_heads=2, window=None, sinks=0, cap=None, dtype=jnp.float32, page_size=8,
    magnitude=1.0, misread=0,
):  # fmt: skip
    """Against float64: relative error at most 1.25 times that of rounding the exact answer to the type, log-sum-exp to 1e-4.
    `misread` adds to every page id that the kernel is given."""
    rng = np.random.default_rng(3)
    table_len = max(-(-max(lengths) // page_size), 1) + 2
    num_pages = 2 + len(lengths) * table_len
    keys = np.full((num_pages, kv_heads, page_size, dims[0]), np.nan, np.float32)
    values = np.full((num_pages, kv_heads, page_size, dims[1]), np.nan, np.float32)
    table, starts = np.zeros((2, len(lengths), table_len), np.int32)
    starts[:] = NOWHERE
    order = iter(rng.permutation(np.arange(1, num_pages - 1)).tolist())
    positions = np.zeros((len(lengths), num_queries), np.int32)
    stored = []
    for row, length in enumerate(lengths):
        stored.append([np.zeros((length, kv_heads, dim)) for dim in dims])
        positions[row] = max(length - num_queries, 0) + np.arange(num_queries)
        for entry, logical in enumerate(rng.permutation(-(-length // page_size)).tolist()):
            table[row, entry], starts[row, entry] = page, begin = next(order), logical * page_size
            for pool, mine in zip((keys, values), stored[row], strict=True):
                tokens = rng.standard_normal((kv_heads, min(page_size, length - begin), pool.shape[3]))
                pool[page, :, : tokens.shape[1]] = np.asarray(jnp.asarray(tokens, dtype), np.float32)
                mine[begin : begin + tokens.shape[1]] = pool[page, :, : tokens.shape[1]].swapaxes(0, 1)
    queries = jnp.asarray(
        magnitude * rng.standard_normal((len(lengths), num_queries, kv_heads * group, dims[0])), dtype
    )
    scale = dims[0] ** -0.5
    outputs, log_sum_exp = kernel(
        queries,
        jnp.asarray(keys, dtype),
        jnp.asarray(values, dtype),
        jnp.asarray(table + misread * (starts < NOWHERE)),
        *map(jnp.asarray, (starts, positions, np.array(lengths, np.int32))),
        window=window,
        num_sinks=sinks,
        soft_cap=cap,
        scale=scale,
    )
    wanted, wanted_sum = np.zeros(outputs.shape), np.zeros(log_sum_exp.shape)
    for row, head, place in np.ndindex(len(lengths), kv_heads * group, num_queries):
        k, v = (one[:, head // group].astype(np.float64) for one in stored[row])
        query = np.asarray(queries[row, place, head], np.float64)
        answer = brute_force(query, k, v, positions[row, place], window, sinks, cap, scale)
        wanted[row, place, head], wanted_sum[row, place, head] = answer
    rounding = np.linalg.norm(np.asarray(jnp.asarray(wanted, dtype), np.float64) - wanted)
    error = np.linalg.norm(np.asarray(outputs, np.float64) - wanted)
    allowed = max(1.25 * rounding, 1e-6 * np.linalg.norm(wanted))
    assert error <= allowed, f"error {error}, allowed {allowed}"
    np.testing.assert_allclose(log_sum_exp, wanted_sum, atol=1e-4, rtol=1e-5)
