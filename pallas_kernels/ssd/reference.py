"""SSD in plain XLA: the oracle, and the CPU path."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.typing import Float


def ssd(
    inputs: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    decay_rate: Float[Array, "H"],
    b: Float[Array, "B T groups N"],
    c: Float[Array, "B T groups N"],
    initial_state: Float[Array, "B H P N"] | None,
    *,
    chunk_len: int,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """See `api.ssd`. Chunk-local quantities are [B, chunks, ...]; only the chunk states go through a scan."""
    batch, num_tokens, num_heads, head_dim = inputs.shape
    num_groups, state_dim = b.shape[2:]
    length = min(chunk_len, num_tokens)
    padding = -num_tokens % length

    def chunked(x: Array) -> Array:  # [B, T, ...] -> [B, chunks, length, ...], padded with dt = 0
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(batch, -1, length, *x.shape[2:])

    def by_group(x: Array) -> Array:  # heads [.., H, ..] on axis 3 -> [.., groups, heads per group, ..]
        return x.reshape(*x.shape[:3], num_groups, -1, *x.shape[4:])

    drive = by_group(chunked(inputs * dt[..., None]))  # [B, c, l, g, h, P]
    log_decay = by_group(chunked(dt * decay_rate[None, None, :]))  # [B, c, l, g, h]
    b, c = chunked(b), chunked(c)  # [B, c, l, g, N]
    total = jnp.cumsum(log_decay, axis=2)  # log decay of chunk tokens [0, i]

    # Inside a chunk: y_i += sum_{j <= i} exp(total_i - total_j) (c_i . b_j) dt_j x_j
    by_head = total.transpose(0, 1, 3, 4, 2)  # [B, c, g, h, l]
    exponent = by_head[..., :, None] - by_head[..., None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None, None, None]
    decay = jnp.exp(jnp.where(causal, exponent, -jnp.inf))
    scores = jnp.einsum("bcign,bcjgn->bcgij", c, b)
    outputs = jnp.einsum("bcghij,bcjghp->bcighp", scores[:, :, :, None] * decay, drive)

    # What each chunk adds to the state, and what it lets through.
    to_end = jnp.exp(total[:, :, -1:] - total)
    added = jnp.einsum("bcjgn,bcjghp->bcghpn", b, drive * to_end[..., None])
    kept = jnp.exp(total[:, :, -1])  # [B, c, g, h]

    if initial_state is None:
        initial_state = jnp.zeros((batch, num_heads, head_dim, state_dim), inputs.dtype)

    def next_chunk(state: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        chunk_added, chunk_kept = chunk
        return state * chunk_kept[..., None, None] + chunk_added, state

    first = initial_state.reshape(batch, num_groups, -1, head_dim, state_dim)
    last, before = jax.lax.scan(next_chunk, first, (added.swapaxes(0, 1), kept.swapaxes(0, 1)))
    carried = jnp.einsum("bcign,cbghpn->bcighp", c, before)
    outputs = outputs + carried * jnp.exp(total)[..., None]
    outputs = outputs.reshape(batch, -1, num_heads, head_dim)[:, :num_tokens]
    return outputs, last.reshape(batch, num_heads, head_dim, state_dim)


def ssd_step(
    inputs: Float[Array, "B H P"],
    dt: Float[Array, "B H"],
    decay_rate: Float[Array, "H"],
    b: Float[Array, "B groups N"],
    c: Float[Array, "B groups N"],
    state: Float[Array, "B H P N"],
) -> tuple[Float[Array, "B H P"], Float[Array, "B H P N"]]:
    """See `api.ssd_step`."""
    heads_per_group = inputs.shape[1] // b.shape[1]
    b, c = (jnp.repeat(x, heads_per_group, axis=1) for x in (b, c))  # [B, H, N]
    kept = jnp.exp(dt * decay_rate[None, :])[:, :, None, None]
    added = (inputs * dt[..., None])[..., None] * b[:, :, None, :]
    state = state * kept + added
    return jnp.einsum("bhpn,bhn->bhp", state, c), state
