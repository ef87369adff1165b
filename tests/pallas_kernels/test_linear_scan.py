"""The chunked form and the single step against the recurrence in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.linear_scan import linear_scan, linear_scan_step
from pallas_kernels.linear_scan.inverse import unit_lower_inverse

GATES = {"none": None, "head": 1, "channel": "N"}


def recurrence(queries, keys, values, beta, log_decay, state, rule):
    """Decay, read, write, token by token in float64."""
    outputs = np.zeros_like(values)
    state = state.copy()
    for t in range(keys.shape[1]):
        if log_decay is not None:
            state *= np.exp(log_decay[:, t])[..., None]
        held = np.einsum("bhn,bhnp->bhp", keys[:, t], state) if rule == "delta" else 0
        state += np.einsum("bhn,bhp->bhnp", keys[:, t], beta[:, t, :, None] * (values[:, t] - held))
        outputs[:, t] = np.einsum("bhn,bhnp->bhp", queries[:, t], state)
    return outputs, state


def draw(seed, tokens, gate="head", *, batch=2, heads=2, key_dim=4, value_dim=3, most_beta=1.0, decay=0.7):
    rng = np.random.default_rng(seed)
    queries, keys = rng.standard_normal((2, batch, tokens, heads, key_dim))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    count = key_dim if gate == "channel" else 1
    log_decay = None if gate == "none" else -rng.uniform(0, decay, (batch, tokens, heads, count))
    values, beta = (
        rng.standard_normal((batch, tokens, heads, value_dim)),
        rng.uniform(0, most_beta, (batch, tokens, heads)),
    )
    return queries, keys, values, beta, log_decay, rng.standard_normal((batch, heads, key_dim, value_dim))


def single(arguments):
    return [None if x is None else jnp.asarray(x, jnp.float32) for x in arguments]


def assert_is_the_recurrence(arguments, rule, chunk_len, tolerance=2e-5):
    expected, last = recurrence(*arguments, rule)
    outputs, state = jax.jit(partial(linear_scan, rule=rule, chunk_len=chunk_len))(*single(arguments))
    for found, right in ((outputs, expected), (state, last)):
        np.testing.assert_allclose(found, right, atol=tolerance * np.abs(right).max())


@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 40),
    gate=st.sampled_from(list(GATES)),
    rule=st.sampled_from(["plain", "delta"]),
    chunk_len=st.sampled_from([1, 2, 5, 32, 64]),
    most_beta=st.sampled_from([1.0, 2.0]),
)
@settings(max_examples=20, deadline=None)
def test_the_chunked_form_is_the_recurrence(seed, tokens, gate, rule, chunk_len, most_beta):
    assert_is_the_recurrence(draw(seed, tokens, gate, most_beta=most_beta), rule, chunk_len)


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("rule", ["plain", "delta"])
def test_one_step_is_the_recurrence(gate, rule):
    arguments = draw(0, 1, gate)
    expected, last = recurrence(*arguments, rule)
    *tokens, state = single(arguments)
    outputs, after = linear_scan_step(*(None if x is None else x[:, 0] for x in tokens), state, rule=rule)
    np.testing.assert_allclose(outputs, expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(after, last, atol=1e-5)


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("most_beta", [1.0, 2.0])
def test_one_key_over_a_chunk(gate, most_beta):
    """As padding and newlines give it: powers of the matrix that is inverted would overflow."""
    queries, keys, values, beta, log_decay, state = draw(1, 64, gate)
    keys[:], beta[:] = keys[:, :1], most_beta
    assert_is_the_recurrence((queries, keys, values, beta, log_decay, state), "delta", 64)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_a_strong_decay_neither_overflows_nor_spoils_gradients(gate):
    """5 a step over 64 tokens: e^-g alone would be infinite in float32."""
    arguments = draw(2, 64, gate)
    arguments[4][:] = -5.0
    assert_is_the_recurrence(arguments, "delta", 64)
    grads = jax.grad(lambda *a: linear_scan(*a, chunk_len=64)[0].sum(), argnums=range(6))(*single(arguments))
    assert all(bool(jnp.isfinite(grad).all()) for grad in grads)


def test_gradients_are_those_of_the_steps():
    """The chunked form and a scan of single steps are one function of everything that goes in."""
    arguments = single(draw(3, 7, "channel", most_beta=2.0))
    weights = jax.random.normal(jax.random.key(0), arguments[2].shape)

    def by_steps(*arguments):
        *tokens, state = arguments

        def step(state, token):
            outputs, state = linear_scan_step(*token, state)
            return state, outputs

        return jax.lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), tokens))[1].swapaxes(0, 1)

    def loss(form):
        return jax.grad(lambda *a: (form(*a) * weights).sum(), argnums=range(6))(*arguments)

    for found, right in zip(loss(lambda *a: linear_scan(*a, chunk_len=4)[0]), loss(by_steps), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-4)


@pytest.mark.parametrize("rule", ["plain", "delta"])
@pytest.mark.parametrize("gate", list(GATES))
def test_padding_leaves_the_state_bit_for_bit(rule, gate):
    queries, keys, values, beta, log_decay, state = single(draw(4, 6, gate))
    decay = None if log_decay is None else jnp.zeros_like(log_decay)
    _, after = linear_scan(queries, keys, values, jnp.zeros_like(beta), decay, state, rule=rule, chunk_len=4)
    np.testing.assert_array_equal(after, state)


@pytest.mark.parametrize("size", [1, 5, 8, 13, 32, 33])
def test_the_inverse_of_a_unit_triangle_and_its_gradient(size):
    """Of two and more blocks, padded or not; the gradient by differences in float64."""
    numbers = np.random.default_rng(size)
    lower = np.tril(numbers.standard_normal((3, size, size)), -1) * 0.5
    weights = numbers.standard_normal(lower.shape)
    inverse, gradient = jax.vjp(unit_lower_inverse, jnp.asarray(lower, jnp.float32))
    right = np.linalg.inv(np.eye(size) + lower)
    np.testing.assert_allclose(inverse, right, rtol=1e-4, atol=1e-4 * abs(right).max())
    (found,) = gradient(jnp.asarray(weights, jnp.float32))
    assert not np.triu(found).any(), "the upper half is no part of the matrix"
    for row, column in ((size - 1, 0), (size // 2, size // 2 - 1)):
        if row <= column or column < 0:
            continue
        step = np.zeros_like(lower)
        step[1, row, column] = 1e-5
        ends = [(np.linalg.inv(np.eye(size) + lower + sign * step) * weights).sum() for sign in (1, -1)]
        np.testing.assert_allclose(found[1, row, column], (ends[0] - ends[1]) / 2e-5, rtol=1e-3, atol=1e-2)


def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    queries, keys, values, beta, log_decay, state = single(draw(6, 5, "head"))

    def said(**changed):
        given = {"queries": queries, "keys": keys, "values": values, "beta": beta, "log_decay": log_decay}
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            linear_scan(**{**given, "initial_state": state, **changed})
        return str(caught.value)

    assert said(chunk_len=0) == "chunk_len = 0: must be at least 1"
    assert said(rule="gla") == "rule = 'gla': must be one of plain, delta"
    assert said(beta=beta[:, :, :1]).startswith("beta = (2, 5, 1): must be (2, 5, 2)")
    assert said(values=values[:, :3]).startswith("values = (2, 3, 2, 3): must be (2, 5, 2, 3)")
    assert said(initial_state=state[:1]).startswith("state = (1, 2, 4, 3): must be (2, 2, 4, 3)")
    three = jnp.concatenate([log_decay] * 3, axis=-1)
    assert said(log_decay=three).startswith("log_decay = (2, 5, 2, 3): must be (2, 5, 2, 1) or (2, 5, 2, 4)")
    assert "'triton' is not available" in said(implementation="triton")
