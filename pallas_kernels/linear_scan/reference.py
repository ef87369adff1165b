"""Linear recurrences in plain XLA: the oracle, and the CPU path. Matrix products over chunks of tokens, in the form of
arXiv 2406.06484 and 2412.06464."""

import jax
import jax.numpy as jnp
from jax import Array

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
    if rule == "delta":
        # Token i adds beta_i (v_i - what k_i finds): of the state before the chunk, and of what was added in it.
        found = weight * _pairs(keys, keys, total, strictly=True)
        solved = unit_lower_inverse(found) @ jnp.concatenate([put, erased], axis=-1)
        put, erased = jnp.split(solved, [value_dim], axis=-1)

    def next_chunk(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        asked, scores, added, removed, carried, kept = chunk
        if rule == "delta":
            added = added - removed @ state
        outputs = asked @ state + scores @ added
        return state * kept[..., None] + carried.swapaxes(-1, -2) @ added, outputs

    chunks = (
        queries * since_begin,
        _pairs(queries, keys, total),
        put,
        erased,
        keys * to_end,
        since_begin[..., -1, :],
    )
    if initial_state is None:
        initial_state = jnp.zeros((batch, num_heads, key_dim, value_dim), keys.dtype)
    last, outputs = jax.lax.scan(next_chunk, initial_state, tuple(jnp.moveaxis(x, 2, 0) for x in chunks))
    outputs = outputs.transpose(1, 0, 3, 2, 4).reshape(batch, -1, num_heads, value_dim)
    return outputs[:, :num_tokens], last


def _pairs(
    rows: Float[Array, "B H c l N"],
    columns: Float[Array, "B H c l N"],
    total: Float[Array, "B H c l G"],
    *,
    strictly: bool = False,
) -> Float[Array, "B H c l l"]:
    """Products of row i with column j, decayed from j to i, for every j up to i, or below it; zero elsewhere."""
    length = rows.shape[3]
    seen = jnp.tril(jnp.ones((length, length), bool), -1 if strictly else 0)
    # The exponent is positive where nothing is seen: masked before, so that no gradient meets an infinity.
    exponent = total[..., :, None, :] - total[..., None, :, :]  # [B, H, c, l, l, G]
    decay = jnp.exp(jnp.where(seen[..., None], exponent, -jnp.inf))
    if total.shape[-1] == 1:
        return jnp.einsum("bhcin,bhcjn->bhcij", rows, columns) * decay[..., 0]
    return jnp.einsum("bhcin,bhcjn,bhcijn->bhcij", rows, columns, decay)


def unit_lower_inverse(lower: Float[Array, "*leading C C"]) -> Float[Array, "*leading C C"]:
    """(I + lower)^-1 of strictly lower triangular matrices, by halves: [[P, 0], [-Q lower_21 P, Q]]. Matrix products
    alone, and no power of `lower`, which overflows where keys repeat before it cancels."""
    size = lower.shape[-1]
    if size == 1:
        return jnp.ones_like(lower)
    half = size // 2
    first, second = unit_lower_inverse(lower[..., :half, :half]), unit_lower_inverse(lower[..., half:, half:])
    corner = -second @ (lower[..., half:, :half] @ first)
    above = jnp.zeros((*lower.shape[:-2], half, size - half), lower.dtype)
    top, bottom = jnp.concatenate([first, above], axis=-1), jnp.concatenate([corner, second], axis=-1)
    return jnp.concatenate([top, bottom], axis=-2)


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
