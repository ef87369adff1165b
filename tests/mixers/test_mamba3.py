"""Mamba-3 against a float64 rewrite of its recurrence: chunks, padding, long turns, gradients, and its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.memory.views import whole
from kvlab.mixers.mamba3 import Drive, Mamba3, Mamba3Config, trapezoid, turned
from kvlab.schema import ConfigError

NUM_TOKENS, MODEL_DIM = 13, 16


def param(variable):
    return np.asarray(variable[...], np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def by_hand(layer: Mamba3, x: np.ndarray) -> np.ndarray:
    """Outputs [T, E] for inputs [T, E], token by token and head by head."""
    config, tokens = layer.config, len(x)
    heads, dim, size, pairs = config.num_heads, config.head_dim, config.state_dim, config.num_angles
    inner, shared = heads * dim, config.num_groups * size
    sizes = np.cumsum([inner, inner, shared, shared, heads, heads, heads])
    gate, inputs, b, c, step, rate, share, angle = np.split(x @ param(layer.split.kernel), sizes, axis=-1)
    inputs, dt, share = inputs.reshape(tokens, heads, dim), softplus(step + param(layer.dt_bias)), sigmoid(share)
    angles = np.cumsum(np.pi * np.tanh(angle)[:, None, :] * dt[:, :, None], axis=0)  # [T, H, R]

    def prepared(part, norm, bias, t, head):
        part = part.reshape(tokens, config.num_groups, size)[t, head * config.num_groups // heads]
        part = part / np.sqrt((part**2).mean() + config.norm_eps) * param(norm.scale)
        part = part + param(bias).reshape(heads, size)[head]
        for i in range(pairs):
            cos, sin = np.cos(angles[t, head, i]), np.sin(angles[t, head, i])
            first, second = part[i], part[i + pairs]
            part[i], part[i + pairs] = cos * first - sin * second, sin * first + cos * second
        return part

    outputs = np.zeros((tokens, heads, dim))
    for head in range(heads):
        state, written = np.zeros((size, dim)), np.zeros((size, dim))
        for t in range(tokens):
            before, written = written, np.outer(prepared(b, layer.b_norm, layer.b_bias, t, head), inputs[t, head])
            kept = np.exp(-max(softplus(rate[t, head]), 1e-4) * dt[t, head])
            entered = (1 - share[t, head]) * dt[t, head] * kept * before + share[t, head] * dt[t, head] * written
            state = kept * state + entered
            outputs[t, head] = state.T @ prepared(c, layer.c_norm, layer.c_bias, t, head)
    outputs = (outputs + param(layer.skip)[:, None] * inputs).reshape(tokens, inner)
    return (outputs * gate * sigmoid(gate)) @ param(layer.out.kernel)


def perturbed(layer):
    """The layer with every parameter moved, norms and biases included."""
    rng = np.random.default_rng(1)
    graph, params = nnx.split(layer)
    moved = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), params)
    return nnx.merge(graph, moved)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_heads": 2, "dt_range": (0.1, 1.0)},
        {"num_heads": 4, "num_groups": 2, "rope_fraction": 1.0, "dt_range": (0.5, 4.0)},
        {"num_heads": 1, "chunk_len": 64},
    ],
)
def test_equals_the_recurrence(fields):
    config = Mamba3Config(**{"state_dim": 6, "head_dim": 5, "chunk_len": 4, **fields})
    layer = perturbed(Mamba3(config, MODEL_DIM, dtype="float32", rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).standard_normal((1, NUM_TOKENS, MODEL_DIM))
    positions = jnp.arange(NUM_TOKENS, dtype=jnp.int32)[None]
    (memory,) = whole([layer.states()], 1, NUM_TOKENS)
    y, _ = jax.jit(lambda x: layer(x, positions, memory))(jnp.asarray(x, jnp.float32))
    expected = by_hand(layer, x[0])
    assert np.abs(y[0] - expected).max() <= 1e-5 * np.abs(expected).max()


def draw(seed, tokens, *, batch=2, heads=2, key_dim=4, value_dim=3):
    """A drive, the token before it and a state, in float32."""
    rng = np.random.default_rng(seed)
    queries, keys = rng.standard_normal((2, batch, tokens, heads, key_dim))
    inputs = rng.standard_normal((batch, tokens, heads, value_dim))
    now, before, decay = rng.uniform(0, 1, (3, batch, tokens, heads))
    key, held = rng.standard_normal((batch, heads, key_dim)), rng.standard_normal((batch, heads, value_dim))
    state = rng.standard_normal((batch, heads, key_dim, value_dim))
    arrays = [jnp.asarray(x, jnp.float32) for x in (queries, keys, inputs, -decay, now, before, key, held, state)]
    return Drive(*arrays[:6]), *arrays[6:]


def trapezoid_by_hand(drive, key, held, state):
    """Both terms of the trapezoid, token by token in float64."""
    queries, keys, inputs, log_decay, now, before = (np.asarray(part, np.float64) for part in drive)
    key, held, state = (np.asarray(x, np.float64) for x in (key, held, state))
    outputs = np.zeros_like(inputs)
    for t in range(keys.shape[1]):
        kept = np.exp(log_decay[:, t])[..., None, None]
        state = kept * state + (kept[..., 0] * before[:, t, :, None] * key)[..., None] * held[:, :, None, :]
        state = state + (now[:, t, :, None] * keys[:, t])[..., None] * inputs[:, t, :, None, :]
        outputs[:, t] = np.einsum("bhn,bhnp->bhp", queries[:, t], state)
        key, held = keys[:, t], inputs[:, t]
    return outputs, state


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 17])
@pytest.mark.parametrize("chunk_len", [1, 4, 64])
def test_one_scan_over_shifted_inputs_is_the_trapezoid(tokens, chunk_len):
    arguments = draw(tokens, tokens)
    found = jax.jit(lambda *a: trapezoid(*a, chunk_len=chunk_len))(*arguments)
    for array, expected in zip(found, trapezoid_by_hand(*arguments), strict=True):
        assert np.abs(array - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_small_step_is_not_spoiled_by_a_large_one_behind_it():
    """Token t enters the state again at t + 1, and output t must not come of adding that and taking it off."""
    drive, *rest = draw(0, 9)
    sizes = jnp.where(jnp.arange(9) % 2 == 0, 1e-6, 1e3)[None, :, None]
    drive = drive._replace(now=drive.now * sizes, before=drive.before * sizes)
    rest = [jnp.zeros_like(x) for x in rest]
    found, expected = trapezoid(drive, *rest, chunk_len=4)[0], trapezoid_by_hand(drive, *rest)[0]
    assert np.abs(found[:, 0] - expected[:, 0]).max() <= 1e-5 * np.abs(expected[:, 0]).max()


def test_padding_leaves_the_state():
    """Behind real tokens whose last is in part still to come: all of it that was due stays, and no more comes."""
    drive, *rest = draw(1, 7)
    is_real = (jnp.arange(7) < 4)[None, :, None]
    padded = drive._replace(**{n: jnp.where(is_real, getattr(drive, n), 0) for n in ("log_decay", "now", "before")})
    _, expected = trapezoid(Drive(*(part[:, :4] for part in drive)), *rest, chunk_len=3)
    _, state = trapezoid(padded, *rest, chunk_len=3)
    np.testing.assert_allclose(state, expected, rtol=2e-6, atol=2e-6)


def test_angles_keep_their_precision_over_many_turns():
    """20,000 steps of up to half a turn each, by a scan and by single steps; a float32 sum that only grows is
    off by a hundredth of a turn."""
    rng = np.random.default_rng(2)
    steps = jnp.asarray(rng.uniform(-0.1, 0.5, (1, 20_000, 1, 3)), jnp.float32)
    before = jnp.asarray(rng.uniform(0, 1, (1, 1, 3)), jnp.float32)
    exact = np.asarray(before, np.float64)[:, None] + np.cumsum(np.asarray(steps, np.float64), axis=1)
    assert exact.max() > 1000

    def step(held, one):
        after = turned(held, one[:, None])[:, 0]
        return after, after

    by_steps = jax.lax.scan(step, before, steps.swapaxes(0, 1))[1].swapaxes(0, 1)
    for found in (turned(before, steps), by_steps):
        assert np.asarray(found).min() >= 0
        assert np.asarray(found).max() <= 1
        away = np.asarray(found, np.float64) - exact
        assert np.abs(away - np.round(away)).max() < 2e-5


def test_gradients_are_finite_for_one_token_over_a_chunk():
    config = Mamba3Config(state_dim=6, head_dim=5, num_heads=2, chunk_len=32, dt_range=(0.5, 4.0))
    layer = Mamba3(config, MODEL_DIM, dtype="float32", rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    (memory,) = whole([layer.states()], 1, 64)
    positions = jnp.arange(64, dtype=jnp.int32)[None]
    x = 30 * jnp.broadcast_to(jax.random.normal(jax.random.key(0), (MODEL_DIM,)), (1, 64, MODEL_DIM))
    grads = jax.jit(jax.grad(lambda params: (nnx.merge(graph, params)(x, positions, memory)[0] ** 2).sum()))(params)
    assert all(bool(jnp.isfinite(grad).all()) for grad in jax.tree.leaves(grads))


def test_state_bytes():
    """About heads * (P N + N + P + R) numbers, as the last token and the angles go along."""
    config = Mamba3Config(state_dim=128, num_heads=32, head_dim=64)
    layer = nnx.eval_shape(lambda: Mamba3(config, 1024, dtype="bfloat16", rngs=nnx.Rngs(0)))
    stated = sum(spec.unit_bytes for spec in layer.states().values())
    assert stated == 4 * 32 * (64 * 128 + 128 + 64 + 32)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_heads": 4, "num_groups": 3}, "num_groups = 3: must divide num_heads: one of [1, 2, 4]"),
        ({"state_dim": 3}, "rope_fraction = 0.5: must be at least 0.666667: a pair is turned"),
        ({"dt_range": (0.1, 0.01)}, "dt_range = [0.1, 0.01]: must be two numbers [low, high] with low <= high"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(ConfigError) as found:
        Mamba3Config(**fields)
    assert said in str(found.value)
