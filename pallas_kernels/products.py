"""Batched matrix products whose gradients XLA on CPU multiplies as fast as the products themselves.

A gradient a^T b contracts over rows. XLA on CPU multiplies it at a fifth of a product's speed, and undoes a transposed
operand that is written in front of it. Here the smaller factor is transposed in memory, behind a barrier. Elsewhere
these are the plain products.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.selection import this_device
from pallas_kernels.typing import Float


def product(a: Float[Array, "*batch M K"], b: Float[Array, "*batch K N"]) -> Float[Array, "*batch M N"]:
    """a @ b."""
    return _product(a, b) if _is_for_cpu() else a @ b


def product_with_rows(a: Float[Array, "*batch M K"], b: Float[Array, "*batch N K"]) -> Float[Array, "*batch M N"]:
    """a @ b^T: every row of one with every row of the other."""
    return _product_with_rows(a, b) if _is_for_cpu() else a @ _transposed(b)


def product_over_rows(a: Float[Array, "*batch K M"], b: Float[Array, "*batch K N"]) -> Float[Array, "*batch M N"]:
    """a^T @ b: summed over rows."""
    if not _is_for_cpu():
        return _transposed(a) @ b
    barrier = jax.lax.optimization_barrier
    if a.size <= b.size:
        return barrier(_transposed(a)) @ b
    return _transposed(barrier(barrier(_transposed(b)) @ a))


def scores_of(queries: Float[Array, "B K G T D"], keys: Float[Array, "B K S D"]) -> Float[Array, "B K G T S"]:
    """Products of the queries of each group with its keys, in float32."""
    if queries.dtype != jnp.float32:
        return jnp.einsum("bkgtd,bksd->bkgts", queries, keys, preferred_element_type=jnp.float32)
    rows = queries.reshape(*queries.shape[:2], -1, queries.shape[-1])  # a group's heads one below the other
    return product_with_rows(rows, keys).reshape(*queries.shape[:-1], -1)


def weighted(weights: Float[Array, "B K G T S"], values: Float[Array, "B K S Dv"]) -> Float[Array, "B K G T Dv"]:
    """Values, weighted and summed, of one dtype."""
    rows = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
    return product(rows, values).reshape(*weights.shape[:-1], -1)


def _is_for_cpu() -> bool:
    return this_device().platform == "cpu"


def _transposed(x: Array) -> Array:
    return x.swapaxes(-1, -2)


@jax.custom_vjp
def _product(a: Array, b: Array) -> Array:
    return a @ b


@jax.custom_vjp
def _product_with_rows(a: Array, b: Array) -> Array:
    return a @ _transposed(b)


_product.defvjp(
    lambda a, b: (a @ b, (a, b)),
    lambda factors, ct: (ct @ _transposed(factors[1]), product_over_rows(factors[0], ct)),
)
_product_with_rows.defvjp(
    lambda a, b: (a @ _transposed(b), (a, b)),
    lambda factors, ct: (ct @ factors[1], product_over_rows(ct, factors[0])),
)
