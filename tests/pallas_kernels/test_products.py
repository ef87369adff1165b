"""Products with gradients for CPUs: right in float64, and no large factor is turned around."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.products import product, product_over_rows, product_with_rows
from pallas_kernels.selection import Device, as_if_on

FORMS = {
    "product": (product, lambda a, b: a @ b, (5, 7), (7, 3)),
    "of a small factor": (product, lambda a, b: a @ b, (3, 4), (4, 9)),
    "with rows": (product_with_rows, lambda a, b: a @ b.swapaxes(-1, -2), (8, 3), (6, 3)),
    "over rows": (product_over_rows, lambda a, b: a.swapaxes(-1, -2) @ b, (6, 8), (6, 2)),
}


def drawn(*shapes):
    numbers = np.random.default_rng(0)
    return [jnp.asarray(numbers.standard_normal((2, 3, *shape)), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("form", list(FORMS))
def test_products_and_their_gradients_in_float64(form):
    function, right, *shapes = FORMS[form]
    a, b = drawn(*shapes)
    exact_a, exact_b = np.float64(a), np.float64(b)
    outputs, gradients = jax.vjp(function, a, b)
    np.testing.assert_allclose(outputs, right(exact_a, exact_b), atol=1e-5)
    (weights,) = drawn(outputs.shape[-2:])
    for place, found in enumerate(gradients(weights)):
        given = [exact_a, exact_b]

        def loss(changed, place=place, given=given):
            return (right(*given[:place], changed, *given[place + 1 :]) * weights).sum()

        unit = np.zeros_like(given[place])
        for index in ((0, 0, 0, 0), (1, 2, -1, -1), (1, 0, 1, 2 % given[place].shape[-1])):
            unit[...] = 0
            unit[index] = 1  # linear in each factor: a difference is the derivative
            slope = loss(given[place] + unit) - loss(given[place])
            np.testing.assert_allclose(found[index], slope, atol=1e-4)


def transposed_sizes(function, a, b):
    """Of a program with its gradients: how many numbers each transposition moves."""

    def with_gradients(a, b):
        outputs, gradients = jax.vjp(function, a, b)
        return gradients(outputs)

    jaxpr = jax.make_jaxpr(with_gradients)(a, b)

    def walk(program):
        for equation in program.eqns:
            if equation.primitive.name == "transpose":
                yield equation.invars[0].aval.size
            for value in equation.params.values():
                if hasattr(getattr(value, "jaxpr", value), "eqns"):
                    yield from walk(getattr(value, "jaxpr", value))

    return sorted(walk(jaxpr.jaxpr)), "optimization_barrier" in str(jaxpr)


def test_weights_of_attention_are_never_turned_around():
    """[64, 64] weights over [64, 8] values: what is transposed in memory has 8 columns."""
    weights, values = drawn((64, 64), (64, 8))
    sizes, has_barrier = transposed_sizes(product, weights, values)
    assert has_barrier
    assert max(sizes) == values.size
    queries, keys = drawn((64, 8), (64, 8))
    sizes, has_barrier = transposed_sizes(product_with_rows, queries, keys)
    assert has_barrier
    assert max(sizes) == keys.size


def test_elsewhere_they_are_plain_products():
    with as_if_on(Device("gpu", "NVIDIA H200", "9.0")):
        _, has_barrier = transposed_sizes(product, *drawn((64, 64), (64, 8)))
    assert not has_barrier
