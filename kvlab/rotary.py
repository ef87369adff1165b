"""Rotary position embeddings (arXiv 2104.09864): pairs of numbers turned by an angle that grows with the position."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from kvlab.schema import ConfigError
from kvlab.typing import Positions


def rotary_angles(
    positions: Positions, rotary_dim: int, base: float, scaling: tuple[float, ...] = ()
) -> tuple[Array, Array]:
    """Cosine and sine [B, T, 1, rotary_dim / 2] of position * base ** (-2 i / rotary_dim), in float32; scaled as
    `AttentionConfig.rope_scaling` says."""
    frequencies = base ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    if scaling:
        factor, low, high, original_len = (*scaling, 1.0, 1.0, 0.0)[:4]
        turns = original_len * frequencies / (2 * math.pi)
        kept = jnp.clip((turns - low) / max(high - low, 1e-9), 0, 1)  # of one factor alone: nothing
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def check_scaling(scaling: Sequence[float]) -> None:
    """Raises ConfigError for a `rope_scaling` that `AttentionConfig` does not describe."""
    if len(scaling) not in (0, 1, 4) or (len(scaling) == 4 and not scaling[1] < scaling[2]):
        legal = "must be [], [factor] or [factor, low, high, original_len] with low < high"
        raise ConfigError("rope_scaling", list(scaling), legal)


def rotate(x: Array, cos: Array, sin: Array, start: int = 0) -> Array:
    """Turns pairs (i, i + rotary_dim / 2), counted from `start`, of each head of x [B, T, heads, D]; the remaining
    dimensions pass through."""
    half = cos.shape[-1]
    before, first, second, rest = jnp.split(x.astype(jnp.float32), [start, start + half, start + 2 * half], axis=-1)
    turned = [before, first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
