"""Keys and values that are turned before they are rounded, so that no channel is much larger than the others: by a
Hadamard matrix behind random signs (QuaRot, arXiv 2404.00456).

    stored keys     k R       queries  q R       scores unchanged: (q R) (k R)^T = q k^T
    stored values   v R       outputs  o R^T     since weights act on tokens, the turn is undone once, on the output
    R = diag(signs) H / sqrt(b)                  H: blocks of b dims, the largest power of two that divides the head dim

Nobody but the pools knows: mixers, compressions and selections see keys and values as they are. Head dims that are no
power of two are turned block by block; odd ones are refused (`TokenState`)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array


@functools.cache
def turn(dim: int) -> npt.NDArray[np.float32]:
    """R, an orthogonal matrix [D, D]; the same for every head and layer of that dim."""
    block = dim & -dim
    hadamard = np.ones((1, 1))
    while len(hadamard) < block:
        hadamard = np.kron([[1, 1], [1, -1]], hadamard)
    signs = np.random.RandomState(dim).choice([-1.0, 1.0], dim)  # a stream that numpy will not change
    return (signs[:, None] * np.kron(np.eye(dim // block), hadamard) / np.sqrt(block)).astype(np.float32)


def turned(state: Any, array: Array) -> Array:
    """Keys, values or queries [..., D] as a state stores them, or asks for them; in their own type."""
    return _times(array, turn(array.shape[-1])) if _is_rotated(state) else array


def turned_back(state: Any, array: Array) -> Array:
    """What was stored, or outputs [..., D] over what was stored, as the mixer knows them."""
    return _times(array, turn(array.shape[-1]).T) if _is_rotated(state) else array


def _is_rotated(state: Any) -> bool:
    return getattr(state, "is_rotated", False)


def _times(array: Array, matrix: npt.NDArray[np.float32]) -> Array:
    return jnp.matmul(array.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST).astype(array.dtype)
