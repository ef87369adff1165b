"""The chunked form and the single step against the recurrence in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ssd import ssd, ssd_step


def recurrence(x, dt, rate, b, c, state):
    """h = exp(rate dt) h + dt x b^T; y = h c, token by token in float64."""
    outputs = np.zeros_like(x)
    heads_per_group = x.shape[2] // b.shape[2]
    for t in range(x.shape[1]):
        for head in range(x.shape[2]):
            group = head // heads_per_group
            decay = np.exp(rate[head] * dt[:, t, head])[:, None, None]
            added = np.einsum("bp,bn->bpn", x[:, t, head] * dt[:, t, head, None], b[:, t, group])
            state[:, head] = decay * state[:, head] + added
            outputs[:, t, head] = np.einsum("bpn,bn->bp", state[:, head], c[:, t, group])
    return outputs, state


def draw(seed, batch, tokens, groups, per_group, head_dim, state_dim):
    rng = np.random.default_rng(seed)
    heads = groups * per_group
    return (
        rng.standard_normal((batch, tokens, heads, head_dim)),
        rng.uniform(0, 0.7, (batch, tokens, heads)),
        -rng.uniform(0.1, 4, heads),
        rng.standard_normal((batch, tokens, groups, state_dim)),
        rng.standard_normal((batch, tokens, groups, state_dim)),
        rng.standard_normal((batch, heads, head_dim, state_dim)),
    )


@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 20),
    groups=st.integers(1, 2),
    per_group=st.integers(1, 3),
    chunk_len=st.sampled_from([1, 2, 5, 8, 64]),
)
@settings(max_examples=20, deadline=None)
def test_chunked_form_equals_the_recurrence(seed, tokens, groups, per_group, chunk_len):
    arguments = draw(seed, 2, tokens, groups, per_group, 3, 4)
    expected, last = recurrence(*(x.copy() for x in arguments))
    single = [jnp.asarray(x, jnp.float32) for x in arguments]
    outputs, state = jax.jit(partial(ssd, chunk_len=chunk_len))(*single)
    np.testing.assert_allclose(outputs, expected, atol=2e-5, rtol=2e-4)
    np.testing.assert_allclose(state, last, atol=2e-5, rtol=2e-4)


def test_one_step_equals_the_recurrence():
    x, dt, rate, b, c, state = draw(0, 3, 1, 2, 2, 4, 5)
    single = [jnp.asarray(array, jnp.float32) for array in (x[:, 0], dt[:, 0], rate, b[:, 0], c[:, 0], state)]
    outputs, after = ssd_step(*single)
    expected, last = recurrence(x, dt, rate, b, c, state)
    np.testing.assert_allclose(outputs, expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(after, last, atol=1e-5)


def test_zero_dt_leaves_the_state_bit_for_bit():
    x, dt, rate, b, c, state = (jnp.asarray(array, jnp.float32) for array in draw(0, 2, 4, 1, 2, 3, 4))
    _, after = ssd(x, jnp.zeros_like(dt), rate, b, c, state, chunk_len=2)
    np.testing.assert_array_equal(after, state)


def test_gradients_are_finite_under_strong_decay():
    """exp of a positive difference above the diagonal would overflow before it is masked."""
    x, dt, _, b, c, state = (jnp.asarray(array, jnp.float32) for array in draw(0, 1, 64, 1, 1, 2, 2))
    rate = jnp.asarray([-200.0])
    grads = jax.grad(lambda *a: ssd(*a, chunk_len=64)[0].sum(), argnums=(0, 1, 2, 3, 4, 5))(x, dt, rate, b, c, state)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_wrong_arguments_name_the_limit():
    x, dt, rate, b, c, state = (jnp.asarray(array, jnp.float32) for array in draw(0, 1, 4, 2, 1, 2, 2))
    with pytest.raises(ValueError, match="groups = 2: must divide the number of heads 1"):
        ssd(x[:, :, :1], dt[:, :, :1], rate[:1], b, c, chunk_len=2)
    with pytest.raises(ValueError, match="chunk_len = 0"):
        ssd(x, dt, rate, b, c, state, chunk_len=0)
    with pytest.raises(ValueError, match="'triton' is not available"):
        ssd(x, dt, rate, b, c, state, implementation="triton")


@pytest.mark.parametrize(
    ("name", "shape"), [("dt", (2, 5, 3)), ("decay_rate", (3,)), ("c", (2, 5, 1, 4)), ("b", (2, 6, 2, 4))]
)
def test_wrong_shapes_are_named(name, shape, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    names = ("inputs", "dt", "decay_rate", "b", "c", "initial_state")
    single = (jnp.asarray(array, jnp.float32) for array in draw(0, 2, 5, 2, 2, 3, 4))
    with pytest.raises(ValueError, match=rf"^{name} = \("):
        ssd(**dict(zip(names, single, strict=True)) | {name: jnp.zeros(shape)})
