"""Linear recurrences in plain XLA, in the arrays' own dtype: what every platform takes. Matrix products over chunks of
tokens, in the form of arXiv 2406.06484 and 2412.06464. Tests compare it with the recurrence in float64, a token at a
time."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.linear_scan.inverse import unit_lower_inverse
from pallas_kernels.products import product, product_with_rows
from pallas_kernels.typing import Float

CHANNEL_CHUNK = 16
"""Most tokens of a chunk where every channel decays by itself: e^(g_i - g_j) is then formed for each pair of tokens and
channel, [C, C, N], since e^g_i and e^-g_j by themselves overflow."""


def linear_scan(
    queries: Float[Array, "B T H N"],
    keys: Float[Array, "B T H N"],
    values: Float[Array, "B T H P"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H G"] | None,
    initial_state: Float[Array, "B H N P"] | None,
    *,
    rule: str,
    chunk_len: int,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H N P"]]:
    """See `api.linear_scan`. What is local to a chunk is [B, H, chunks, ...]; only the states go through a scan."""
    batch, num_tokens, num_heads, key_dim = keys.shape
    value_dim = values.shape[-1]
    by_channel = log_decay is not None and log_decay.shape[-1] > 1
    length = min(chunk_len, num_tokens, CHANNEL_CHUNK if by_channel else chunk_len)

    def chunked(x: Array) -> Array:  # [B, T, H, D] -> [B, H, chunks, length, D], padded with zeros
        x = jnp.pad(x, ((0, 0), (0, -num_tokens % length), (0, 0), (0, 0)))
        return x.reshape(batch, -1, length, num_heads, x.shape[3]).transpose(0, 3, 1, 2, 4)

    queries, keys, values, weight = map(chunked, (queries, keys, values, beta[..., None]))
    if log_decay is None:
        log_decay = jnp.zeros((*beta.shape, 1), keys.dtype)
    total = jnp.cumsum(chunked(log_decay), axis=3)  # log decay of the chunk's tokens [0, i]
    since_begin, to_end = jnp.exp(total), jnp.exp(total[..., -1:, :] - total)

    put, erased = weight * values, weight * keys * since_begin
    rows = [queries, keys] if rule == "delta" else [queries]
    scores, *found = jnp.split(_pairs(jnp.concatenate(rows, axis=3), keys, total), len(rows), axis=3)
    if rule == "delta":
        # Token i adds beta_i (v_i - what k_i finds): of the state before the chunk, and of what was added in it.
        found = jnp.tril(weight * found[0], -1)
        solved = product(unit_lower_inverse(found), jnp.concatenate([put, erased], axis=-1))
        put, erased = jnp.split(solved, [value_dim], axis=-1)

    def next_chunk(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        asked, scores, added, removed, carried, kept = chunk
        if rule == "delta":
            added = added - product(removed, state)
        outputs = product(asked, state) + product(scores, added)
        return state * kept[..., None] + product(carried, added), outputs

    chunks = (
        queries * since_begin,
        scores,
        put,
        erased,
        (keys * to_end).swapaxes(-1, -2),
        since_begin[..., -1, :],
    )
    if initial_state is None:
        initial_state = jnp.zeros((batch, num_heads, key_dim, value_dim), keys.dtype)
    last, outputs = jax.lax.scan(next_chunk, initial_state, tuple(jnp.moveaxis(x, 2, 0) for x in chunks))
    outputs = outputs.transpose(1, 0, 3, 2, 4).reshape(batch, -1, num_heads, value_dim)
    return outputs[:, :num_tokens], last


def _pairs(
    rows: Float[Array, "B H c rows N"], columns: Float[Array, "B H c l N"], total: Float[Array, "B H c l G"]
) -> Float[Array, "B H c rows l"]:
    """Products of row i with column j, decayed from j to i, for every j up to i; zero elsewhere. Rows are those of one
    or several chunks of l, one below the other."""
    length = columns.shape[3]
    seen = jnp.tril(jnp.ones((length, length), bool))
    # The exponent is positive where nothing is seen: masked before, so that no gradient meets an infinity.
    exponent = total[..., :, None, :] - total[..., None, :, :]  # [B, H, c, l, l, G]
    decay = jnp.exp(jnp.where(seen[..., None], exponent, -jnp.inf))
    if total.shape[-1] == 1:
        products = product_with_rows(rows, columns)
        products = products.reshape(*products.shape[:3], -1, length, length) * decay[:, :, :, None, ..., 0]
        return products.reshape(*rows.shape[:4], length)
    rows = rows.reshape(*rows.shape[:3], -1, length, 1, rows.shape[-1])
    decayed = (columns[:, :, :, None] * decay)[:, :, :, None]  # [B, H, c, 1, l, l, N]
    return (rows * decayed).sum(axis=-1).reshape(*columns.shape[:3], -1, length)


def linear_scan_step(
    queries: Float[Array, "B H N"],
    keys: Float[Array, "B H N"],
    values: Float[Array, "B H P"],
    beta: Float[Array, "B H"],
    log_decay: Float[Array, "B H G"] | None,
    state: Float[Array, "B H N P"],
    *,
    rule: str,
) -> tuple[Float[Array, "B H P"], Float[Array, "B H N P"]]:
    """See `api.linear_scan_step`."""
    if log_decay is not None:
        state = state * jnp.exp(log_decay)[..., None]
    if rule == "delta":
        values = values - jnp.einsum("bhn,bhnp->bhp", keys, state)
    state = state + keys[..., None] * (beta[..., None] * values)[:, :, None, :]
    return jnp.einsum("bhn,bhnp->bhp", queries, state), state
