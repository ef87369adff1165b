"""(I + L)^-1 of strictly lower triangular matrices: what a delta rule adds in a chunk, all at once."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.products import product, product_over_rows
from pallas_kernels.typing import Float

SUBSTITUTED = 8
"""Most rows of a block on the diagonal that is inverted row by row; a row is then one sum over all matrices at once.
Matrices of a few rows are what XLA on CPU multiplies slowest."""


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "*leading C C"]) -> Float[Array, "*leading C C"]:
    """(I + lower)^-1: blocks on the diagonal row by row, then by halves, [[P, 0], [-Q lower_21 P, Q]]. No power of
    `lower` is formed, which overflows where keys repeat before it cancels. The gradient is -X^T dX X^T."""
    size, leading = lower.shape[-1], lower.shape[:-2]
    count = 1 << max(0, math.ceil(math.log2(size / SUBSTITUTED)))
    length = -(-size // count)
    lower = jnp.pad(lower, (*((0, 0),) * len(leading), *((0, count * length - size),) * 2))
    found = _substituted(_blocks(lower, length, [(place, place) for place in range(count)]))
    while count > 1:
        count = count // 2
        below = _blocks(lower, length, [(2 * place + 1, 2 * place) for place in range(count)])
        first, second = found[..., ::2, :, :], found[..., 1::2, :, :]
        corner = -product(second, product(below, first))
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        found = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        length *= 2
    return found[..., 0, :size, :size]


def _forward(lower: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(lower)
    return inverse, inverse


def _backward(inverse: Array, cotangent: Array) -> tuple[Array]:
    return (-jnp.tril(product_over_rows(inverse, cotangent @ inverse.swapaxes(-1, -2)), -1),)


unit_lower_inverse.defvjp(_forward, _backward)


def _blocks(matrix: Array, length: int, places: list[tuple[int, int]]) -> Float[Array, "*leading count length length"]:
    """Square blocks of a matrix, by row and column of blocks."""
    cut = matrix.reshape(*matrix.shape[:-2], matrix.shape[-2] // length, length, -1, length)
    return jnp.stack([cut[..., row, :, column, :] for row, column in places], axis=-3)


def _substituted(lower: Float[Array, "*leading C C"]) -> Float[Array, "*leading C C"]:
    """(I + lower)^-1, a row after the other: x_i = e_i - sum_{j < i} lower_ij x_j."""
    unit, rows = jnp.eye(lower.shape[-1], dtype=lower.dtype), list[Array]()
    for i in range(lower.shape[-1]):
        row = jnp.broadcast_to(unit[i], lower.shape[:-1])
        for j, above in enumerate(rows):
            row = row - lower[..., i, j, None] * above
        rows.append(row)
    return jnp.stack(rows, axis=-2)
