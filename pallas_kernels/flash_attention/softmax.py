"""Softmax and its product with values as one function, whose gradient passes over the weights once."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.products import product_over_rows
from pallas_kernels.typing import Float

type Residuals = tuple[Array, Array, Array, Array]
"""The weights before their division, their sums, the values, the outputs."""


@jax.custom_vjp
def softmax_product(
    scores: Float[Array, "B K G T S"], values: Float[Array, "B K S Dv"]
) -> tuple[Float[Array, "B K G T Dv"], Float[Array, "B K G T"]]:
    """softmax(scores) @ values over the last axis, in float32, and the log-sum-exp of the scores, which are float32 and
    -inf where a key is not seen. Every query must see one, and none may have NaN or inf, hidden ones neither. There is
    no forward-mode derivative.

    With weights P and outputs O the gradient of a score is P (dP - sum(P dP)), and sum(P dP) over keys is sum(O dO)
    over dims (FlashAttention, arXiv 2205.14135, appendix B): no sum over keys, no division, no mask.
    """
    return _forward(scores, values)[0]


def _forward(scores: Array, values: Array) -> tuple[tuple[Array, Array], Residuals]:
    highest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    totals = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(values.dtype)
    outputs = _times(weights, values) / totals
    return (outputs, (jnp.log(totals) + highest)[..., 0]), (weights, totals, values, outputs)


def _backward(residuals: Residuals, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
    weights, totals, values, outputs = residuals
    of_outputs = gradients[0] / totals
    common = (of_outputs * outputs).sum(axis=-1, keepdims=True) - gradients[1][..., None] / totals
    of_outputs = of_outputs.astype(values.dtype)
    of_scores = weights.astype(jnp.float32) * (_times(of_outputs, values.swapaxes(-1, -2)) - common)
    of_values = product_over_rows(_rows(weights), _rows(of_outputs))
    return of_scores, of_values.astype(values.dtype)


softmax_product.defvjp(_forward, _backward)


def _times(grouped: Float[Array, "B K G T N"], matrices: Float[Array, "B K N M"]) -> Float[Array, "B K G T M"]:
    """The heads of a group, one below the other, times the matrix of their group, in float32."""
    rows = jnp.matmul(_rows(grouped), matrices, preferred_element_type=jnp.float32)
    return rows.reshape(*grouped.shape[:-1], -1)


def _rows(grouped: Float[Array, "B K G T N"]) -> Float[Array, "B K GT N"]:
    return grouped.reshape(*grouped.shape[:2], -1, grouped.shape[-1])
