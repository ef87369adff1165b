"""FLOPs of programs, against closed forms and, where nothing loops, against XLA's own count."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from kvlab.lab.flops import flops_of


def matmuls(num_steps, x, w):
    """XLA counts the body of this loop once: 327,680 for 1 step and for 128."""
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=num_steps)[0]


@pytest.mark.parametrize("num_steps", [1, 2, 128])
def test_a_scan_counts_every_step(num_steps):
    x, w = jnp.zeros((40, 64)), jnp.zeros((64, 64))
    traced = jax.jit(partial(matmuls, num_steps)).trace(x, w)
    assert flops_of(traced.jaxpr) == num_steps * 2 * 40 * 64 * 64 == num_steps * 327_680
    xla = traced.lower().compile().cost_analysis()["flops"]
    assert xla == pytest.approx(327_680, rel=0.01), "once XLA counts steps this file can go"


def test_gradients_nested_loops_and_rematerialisation_are_counted():
    """Backwards a product costs twice what it costs forwards, of which the last needs no gradient of its input; what is
    computed again counts again."""
    x, w = jnp.zeros((8, 16)), jnp.zeros((16, 16))
    one = 2 * 8 * 16 * 16

    def loss(w, remat):
        inner = partial(matmuls, 3)
        inner = jax.checkpoint(inner) if remat else inner
        x_out = jax.lax.scan(lambda y, _: (inner(y, w), None), x, None, length=5)[0]
        return jnp.sum(x_out)

    def products(remat):
        return flops_of(jax.jit(jax.grad(partial(loss, remat=remat))).trace(w).jaxpr, only=("dot_general",))

    assert products(False) == 15 * 3 * one
    assert products(True) in (15 * 4 * one, 15 * 3 * one + 5 * 2 * one), "forwards once more, but for what is not used"


def test_without_loops_it_agrees_with_xla():
    def mlp(x, a, b):
        return jnp.sum(jnp.einsum("btf,fe->bte", jax.nn.relu(jnp.einsum("bte,ef->btf", x, a)), b))

    shapes = [(4, 32, 48), (48, 192), (192, 48)]
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    traced = jax.jit(jax.value_and_grad(mlp, argnums=(0, 1, 2))).trace(*given)
    xla = traced.lower().compile().cost_analysis()["flops"]
    assert flops_of(traced.jaxpr) == pytest.approx(xla, rel=0.03)


def test_branches_count_as_the_dearest_and_convolutions_in_full():
    w = jnp.zeros((16, 16))

    def branch(x, flag):
        return jax.lax.cond(flag, lambda x: x @ w @ w, lambda x: x @ w, x)

    traced = jax.jit(branch).trace(jnp.zeros((8, 16)), True)
    assert flops_of(traced.jaxpr, only=("dot_general",)) == 2 * 2 * 8 * 16 * 16
    conv = partial(jax.lax.conv_general_dilated, window_strides=(1,), padding="VALID", feature_group_count=4)
    traced = jax.jit(conv).trace(jnp.zeros((2, 8, 12)), jnp.zeros((8, 2, 3)))
    assert flops_of(traced.jaxpr) == 2 * (2 * 8 * 10) * (2 * 3)


def test_a_product_by_groups_counts_each_row_once():
    """Forwards, which the gradient has too, and backwards for rows and for matrices."""
    rows, matrices, sizes = jnp.zeros((24, 8)), jnp.zeros((5, 8, 16)), jnp.array([4, 0, 10, 10, 0])

    def loss(rows, matrices):
        return jnp.sum(jax.lax.ragged_dot(rows, matrices, sizes))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(rows, matrices)
    assert flops_of(traced.jaxpr, only=("ragged_dot_general",)) == 3 * 2 * 24 * 8 * 16
    assert flops_of(jax.jit(loss).trace(rows, matrices).jaxpr, only=("ragged_dot_general",)) == 2 * 24 * 8 * 16
