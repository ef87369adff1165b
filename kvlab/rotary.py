"""Rotary position embeddings (arXiv 2104.09864): pairs of numbers turned by an angle that grows with the position."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from kvlab.schema import ConfigError
from kvlab.typing import Positions

YARN = 5
"""Numbers of a `rope_scaling` after YaRN. A sixth, 1, says that its ramp may begin and end between two pairs."""


def rotary_angles(
    positions: Positions, rotary_dim: int, base: float, scaling: tuple[float, ...] = ()
) -> tuple[Array, Array]:
    """Cosine and sine [B, T, 1, rotary_dim / 2] of position * base ** (-2 i / rotary_dim), in float32; scaled as
    `AttentionConfig.rope_scaling` says."""
    frequencies = base ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    length = length_of(scaling)
    if scaling:
        kept = _kept(frequencies, base, scaling)
        frequencies = frequencies * (kept + (1 - kept) / scaling[0])
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if length == 1 else (cos * length, sin * length)


def length_of(scaling: Sequence[float]) -> float:
    """How much longer queries and keys become as they are turned: 1, but for YaRN."""
    return scaling[4] if is_yarn(scaling) else 1.0


def is_yarn(scaling: Sequence[float]) -> bool:
    """Whether a `rope_scaling` is YaRN's."""
    return len(scaling) >= YARN


def back(cos: Array, sin: Array, scaling: Sequence[float]) -> tuple[Array, Array]:
    """The angles that `rotate` undoes those of `rotary_angles` with."""
    stretched = length_of(scaling) ** 2
    return (cos, -sin) if stretched == 1 else (cos / stretched, -sin / stretched)


def _kept(frequencies: Array, base: float, scaling: tuple[float, ...]) -> Array | float:
    """[rotary_dim / 2]: the share of each frequency that is not divided."""
    if len(scaling) == 1:
        return 0.0
    _, low, high, original_len = scaling[:4]
    if not is_yarn(scaling):
        turns = original_len * frequencies / (2 * math.pi)
        return jnp.clip((turns - low) / max(high - low, 1e-9), 0, 1)
    # YaRN's ramp is linear in the number of the pair, between those that turn so often.
    dim = 2 * len(frequencies)
    place = [dim * math.log(original_len / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (high, low)]
    if len(scaling) == YARN:
        place = [math.floor(place[0]), math.ceil(place[1])]
    first, last = max(place[0], 0), min(place[1], dim - 1)
    numbers = jnp.arange(dim // 2, dtype=jnp.float32)
    return 1 - jnp.clip((numbers - first) / (last - first or 1e-3), 0, 1)


def check_scaling(scaling: tuple[float, ...], base: float) -> None:
    """Raises ConfigError for a `rope_scaling` that `AttentionConfig` does not describe."""
    lengths = (0, 1, 4, YARN, YARN + 1)
    is_blended = len(scaling) < 4 or scaling[1] < scaling[2]
    if len(scaling) not in lengths or not is_blended or scaling[YARN:] not in ((), (1.0,)):
        legal = "must be [], [factor] or [factor, low, high, original_len]; for YaRN [factor, low, high, original_len, "
        raise ConfigError("rope_scaling", list(scaling), f"{legal}length], or the same and a 1; with low < high")
    if is_yarn(scaling) and base == 1:
        raise ConfigError("rope_base", base, "must be above 1 for YaRN, whose ramp is over frequencies that differ")


def rotate(x: Array, cos: Array, sin: Array, start: int = 0) -> Array:
    """Turns pairs (i, i + rotary_dim / 2), counted from `start`, of each head of x [B, T, heads, D]; the remaining
    dimensions pass through."""
    half = cos.shape[-1]
    before, first, second, rest = jnp.split(x.astype(jnp.float32), [start, start + half, start + 2 * half], axis=-1)
    turned = [before, first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
