"""Softmax times values: outputs, log-sums and gradients in float64, and no pass over the weights that need not be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.softmax import softmax_product
from pallas_kernels.visible import Visible


def drawn(*shapes):
    numbers = np.random.default_rng(0)
    return [numbers.standard_normal(shape) for shape in shapes]


def right(scores, values):
    """Outputs and log-sums in float64."""
    weights = np.exp(scores)
    totals = weights.sum(-1)
    return np.einsum("bkgts,bksd->bkgtd", weights / totals[..., None], values), np.log(totals)


def assert_gradients(loss, given, found, *, atol):
    """The gradients against central differences of a loss in float64, along three random directions each."""
    for place, gradient in enumerate(found):
        for direction in np.random.default_rng(place).standard_normal((3, *gradient.shape)):
            ends = [[*given[:place], given[place] + step * direction, *given[place + 1 :]] for step in (1e-5, -1e-5)]
            slope = (loss(*ends[0]) - loss(*ends[1])) / 2e-5
            np.testing.assert_allclose(np.vdot(np.float64(gradient), direction), slope, atol=atol)


def test_outputs_log_sums_and_their_gradients_in_float64():
    """Both results are used, as a sink logit uses them; some keys are not seen."""
    scores, values, of_outputs, of_sums = drawn((2, 3, 2, 5, 7), (2, 3, 7, 4), (2, 3, 2, 5, 4), (2, 3, 2, 5))
    scores = np.where(np.tri(5, 7, 2), 3 * scores, -np.inf)
    (outputs, sums), gradients = jax.vjp(softmax_product, jnp.float32(scores), jnp.float32(values))
    for found, wanted in zip((outputs, sums), right(scores, values), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)

    def loss(scores, values):
        outputs, sums = right(scores, values)
        return (outputs * of_outputs).sum() + (sums * of_sums).sum()

    found = gradients((jnp.float32(of_outputs), jnp.float32(of_sums)))
    assert not np.asarray(found[0])[np.isinf(scores)].any()
    assert_gradients(loss, (scores, values), found, atol=1e-4)


@pytest.mark.parametrize(
    ("visible", "soft_cap", "has_sinks"),
    [(Visible(), None, False), (Visible(window=70), None, True), (Visible(window=3, num_sinks=1), 2.0, False)],
)
def test_gradients_of_attention_in_float64(visible, soft_cap, has_sinks):
    """Over two blocks of queries, of which the second is a part; two heads read each KV head."""
    length = 100
    queries, keys, values, sinks, weights = drawn(
        (1, length, 4, 6), (1, length, 2, 6), (1, length, 2, 5), (4,), (1, length, 4, 5)
    )
    positions = np.arange(length)
    seen = np.asarray(visible.sees(positions[:, None], positions[None]))

    def loss(queries, keys, values, sinks):
        scores = np.einsum("btkgd,bskd->bkgts", queries.reshape(1, length, 2, 2, 6), keys) * 6**-0.5
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        outputs, sums = right(np.where(seen, scores, -np.inf), values.transpose(0, 2, 1, 3))
        if has_sinks:
            outputs = outputs / (1 + np.exp(sinks.reshape(1, 2, 2, 1) - sums))[..., None]
        return (outputs.transpose(0, 3, 1, 2, 4).reshape(weights.shape) * weights).sum()

    def ours(queries, keys, values, sinks):
        options = {"visible": visible, "soft_cap": soft_cap, "sink_logits": sinks if has_sinks else None}
        return (flash_attention(queries, keys, values, **options) * weights).sum()

    given = (queries, keys, values, sinks)
    found = jax.grad(ours, argnums=(0, 1, 2, 3))(*map(jnp.float32, given))
    assert bool(np.any(found[3])) == has_sinks
    assert_gradients(loss, given, found, atol=3e-4)


def types_of_products(program):
    """Of every product of matrices the types of its factors, and that of what it gives."""
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            yield [factor.aval.dtype.name for factor in equation.invars], equation.outvars[0].aval.dtype.name
        for value in equation.params.values():
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                yield from types_of_products(getattr(value, "jaxpr", value))


def test_sixteen_bits_are_multiplied_as_such_and_summed_in_float32():
    scores, values = drawn((1, 2, 2, 5, 300), (1, 2, 300, 4))
    values = jnp.bfloat16(values)
    (outputs, sums), gradients = jax.vjp(softmax_product, jnp.float32(scores), values)
    assert {outputs.dtype, sums.dtype} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(outputs, right(scores, np.float64(values))[0], atol=2e-3)
    found, exact = gradients((outputs, sums)), jax.vjp(softmax_product, jnp.float32(scores), jnp.float32(values))[1]
    for mine, wanted in zip(found, exact((outputs, sums)), strict=True):
        np.testing.assert_allclose(np.float32(mine), wanted, atol=2e-3)
    assert [mine.dtype for mine in found] == [jnp.float32, jnp.bfloat16]
    both = jax.make_jaxpr(softmax_product)(jnp.float32(scores), values), jax.make_jaxpr(gradients)((outputs, sums))
    products = [types for program in both for types in types_of_products(program.jaxpr)]
    assert [{*operands} for operands, _ in products] == [{"bfloat16"}] * 3
    assert [result for _, result in products] == ["float32", "float32", "bfloat16"]


def test_weights_are_neither_divided_nor_masked_again_nor_summed_in_the_gradient():
    """Each would be a pass of its own over the largest array there is."""
    scores, values = map(jnp.float32, drawn((1, 1, 1, 64, 64), (1, 1, 64, 8)))
    (outputs, sums), gradients = jax.vjp(softmax_product, scores, values)
    program = str(jax.make_jaxpr(gradients)((outputs, sums)))
    passes = [line.split(" = ")[1].split()[0].strip("[") for line in program.splitlines() if "[1,1,1,64,64] = " in line]
    assert sorted(passes) == ["mul", "reshape", "sub"], program
