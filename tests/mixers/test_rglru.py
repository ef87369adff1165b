"""RG-LRU against a float64 rewrite of its recurrence: chunks, padding, gradients at a = 1, and its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.compose import compose
from kvlab.lab.laboratory import Laboratory
from kvlab.memory.views import whole
from kvlab.mixers.rglru import RGLRU, RGLRUConfig, bounded_sqrt, linear_recurrence
from kvlab.schema import ConfigError

NUM_TOKENS, MODEL_DIM = 13, 16


def param(variable):
    return np.asarray(variable[...], np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def by_hand(layer: RGLRU, x: np.ndarray) -> np.ndarray:
    """Outputs [T, E] for inputs [T, E], token by token and block by block."""
    config, tokens = layer.config, len(x)
    channels = x @ param(layer.inputs.kernel) + param(layer.inputs.bias)
    if config.conv_len:
        kernel, before = param(layer.conv.kernel), config.conv_len - 1
        padded = np.concatenate([np.zeros((before, config.width)), channels])
        lagged = [kernel[lag] * padded[before - lag : before - lag + tokens] for lag in range(config.conv_len)]
        channels = sum(lagged) + param(layer.conv.bias)
    size = config.width // config.num_heads

    def gate_of(module):
        blocks = [channels[:, i * size : (i + 1) * size] @ kernel for i, kernel in enumerate(param(module.kernel))]
        return sigmoid(np.concatenate(blocks, axis=-1) + param(module.bias))

    recurrence, entered = gate_of(layer.decay_gate), gate_of(layer.input_gate)
    hidden, state = np.zeros((tokens, config.width)), np.zeros(config.width)
    for t in range(tokens):
        decay = np.exp(-8 * recurrence[t] * np.log1p(np.exp(param(layer.lambda_))))
        share = np.sqrt(1 - decay**2) if t else 1.0
        state = decay * state + share * entered[t] * channels[t]
        hidden[t] = state
    opened = gelu(x @ param(layer.gate.kernel) + param(layer.gate.bias))
    return (opened * hidden) @ param(layer.out.kernel) + param(layer.out.bias)


def perturbed(layer):
    """The layer with every parameter moved, biases and gates included."""
    rng = np.random.default_rng(1)
    graph, params = nnx.split(layer)
    moved = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), params)
    return nnx.merge(graph, moved)


@pytest.mark.parametrize("fields", [{}, {"conv_len": 0, "num_heads": 1}, {"conv_len": 2, "num_heads": 6}])
def test_equals_the_recurrence(fields):
    layer = perturbed(RGLRU(RGLRUConfig(width=12, **fields), MODEL_DIM, dtype="float32", rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).standard_normal((1, NUM_TOKENS, MODEL_DIM))
    positions = jnp.arange(NUM_TOKENS, dtype=jnp.int32)[None]
    (memory,) = whole([layer.states()], 1, NUM_TOKENS)
    y, _ = jax.jit(lambda x: layer(x, positions, memory))(jnp.asarray(x, jnp.float32))
    expected = by_hand(layer, x[0])
    assert np.abs(y[0] - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 1000])
def test_the_scan_is_the_recurrence(tokens):
    """Decays at both ends of (0, 1), over a state that is not zero."""
    rng = np.random.default_rng(tokens)
    decay = 1 - 10.0 ** rng.uniform(-6, 0, (2, tokens, 5))
    added, state = rng.standard_normal((2, tokens, 5)), rng.standard_normal((2, 5))
    single = [jnp.asarray(x, jnp.float32) for x in (decay, added, state)]
    decay, added, state = (np.asarray(x, np.float64) for x in single)  # as float32 has rounded them
    expected = np.zeros_like(added)
    for t in range(tokens):
        state = decay[:, t] * state + added[:, t]
        expected[:, t] = state
    found = jax.jit(linear_recurrence)(*single)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_padding_and_chunks_leave_what_they_should():
    """Tokens that decay = 1 and added = 0 stand for do not touch the state, in whichever place they are."""
    rng = np.random.default_rng(3)
    decay, added = (jnp.asarray(rng.uniform(0.1, 0.9, (1, 6, 3)), jnp.float32) for _ in range(2))
    state = jnp.asarray(rng.standard_normal((1, 3)), jnp.float32)
    is_real = jnp.array([True, False, True, True, False, False])[None, :, None]
    padded = linear_recurrence(jnp.where(is_real, decay, 1), jnp.where(is_real, added, 0), state)
    real = np.flatnonzero(np.asarray(is_real)[0, :, 0])
    alone = linear_recurrence(decay[:, real], added[:, real], state)
    np.testing.assert_allclose(padded[:, -1], alone[:, -1], rtol=1e-6)
    first = linear_recurrence(decay[:, :4], added[:, :4], state)
    second = linear_recurrence(decay[:, 4:], added[:, 4:], first[:, -1])
    np.testing.assert_allclose(second, linear_recurrence(decay, added, state)[:, 4:], rtol=1e-6)


def test_gradients_stay_finite_where_nothing_decays():
    """A closed gate gives a = 1 in float32, where the root's own gradient is infinite."""
    layer = RGLRU(RGLRUConfig(width=12), MODEL_DIM, dtype="float32", rngs=nnx.Rngs(0))
    layer.decay_gate.bias = nnx.Param(jnp.full(12, -200.0))
    graph, params = nnx.split(layer)
    x = jnp.ones((1, NUM_TOKENS, MODEL_DIM))
    (memory,) = whole([layer.states()], 1, NUM_TOKENS)
    positions = jnp.arange(NUM_TOKENS, dtype=jnp.int32)[None]
    grads = jax.grad(lambda params: nnx.merge(graph, params)(x, positions, memory)[0].sum())(params)
    assert all(bool(jnp.isfinite(grad).all()) for grad in jax.tree.leaves(grads))


def test_the_roots_gradient_is_clipped_as_published():
    """RecurrentGemma: the gradient of sqrt at max(x, 1 / (4 * 1000^2))."""
    x = jnp.array([0.0, 1e-12, 2.4e-7, 2.6e-7, 0.01, 1.0])
    expected = 0.5 / np.sqrt(np.maximum(np.asarray(x, np.float64), 1 / (4 * 1000.0**2)))
    np.testing.assert_allclose(jax.vmap(jax.grad(bounded_sqrt))(x), expected, rtol=1e-5)


def test_initial_decays_lie_in_the_ring():
    layer = RGLRU(RGLRUConfig(width=4096, num_heads=64), MODEL_DIM, dtype="float32", rngs=nnx.Rngs(0))
    radius = np.exp(-np.log1p(np.exp(param(layer.lambda_))))
    assert 0.9 - 1e-4 <= radius.min() <= radius.max() <= 0.999 + 1e-4
    assert abs((radius**2).mean() - (0.9**2 + 0.999**2) / 2) < 0.005  # uniform by area


def test_state_bytes_of_recurrentgemma_2b():
    """2,560 channels: a float32 number and three 16-bit columns of the convolution each, a layer."""
    config = RGLRUConfig(width=2560, num_heads=10)
    layer = nnx.eval_shape(lambda: RGLRU(config, 2560, dtype="bfloat16", rngs=nnx.Rngs(0)))
    assert {name: spec.unit_bytes for name, spec in layer.states().items()} == {"lru": 10_240, "conv": 15_360}


def test_griffin_is_two_recurrent_layers_and_a_window():
    model = Laboratory.of(compose(["mixer=griffin", "debug=tiny"]), abstract=True).model
    assert [set(layer) for layer in model.states] == [{"lru", "conv"}, {"lru", "conv"}, {"kv"}]
    assert model.states[2]["kv"].visible.window == 32


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 10, "num_heads": 4}, "num_heads = 4: must divide width = 10"),
        ({"conv_len": 1}, "conv_len = 1: must be 0 (none) or a width in [2, 64]"),
        ({"radius_range": (0.9, 1.0)}, "radius_range = [0.9, 1.0]: must be two numbers [low, high]"),
        ({"radius_range": (0.9, 0.5)}, "radius_range = [0.9, 0.5]: must be two numbers [low, high]"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(ConfigError) as found:
        RGLRUConfig(**fields)
    assert said in str(found.value)
