"""Linear attention and delta rules against a float64 rewrite of their recurrence, and their bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.compose import compose
from kvlab.lab.laboratory import Laboratory
from kvlab.memory.views import whole
from kvlab.mixers.linear import LinearAttention, LinearConfig
from kvlab.schema import ConfigError

NUM_TOKENS, WIDTH = 13, 16


def silu(x):
    return x * sigmoid(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def param(variable):
    return np.asarray(variable[...], np.float64)


def by_hand(layer: LinearAttention, x: np.ndarray) -> np.ndarray:
    """Outputs [T, E] for inputs [T, E], token by token and head by head."""
    config, tokens = layer.config, len(x)
    channels = x @ param(layer.split.kernel)
    if config.conv_len:
        kernel, before = param(layer.conv.kernel), config.conv_len - 1
        padded = np.concatenate([np.zeros((before, channels.shape[1])), channels])
        lagged = [kernel[lag] * padded[before - lag : before - lag + tokens] for lag in range(config.conv_len)]
        channels = silu(sum(lagged) + param(layer.conv.bias))
    inner, heads = config.num_heads * config.key_dim, config.heads
    queries, keys, values = np.split(channels, [inner, 2 * inner], axis=-1)
    queries, keys = (part.reshape(tokens, config.num_heads, config.key_dim) for part in (queries, keys))
    values = values.reshape(tokens, heads, config.value_dim)
    beta = np.ones((tokens, heads))
    if config.write_gate:
        beta = sigmoid(x @ param(layer.beta.kernel)) * (2 if config.negative_eigenvalues else 1)
    decay = np.zeros((tokens, heads, 1))
    if config.decay == "constant":
        decay = np.log(1 - 2.0 ** -(5 + np.arange(heads)))[None, :, None] * np.ones((tokens, 1, 1))
    elif config.decay != "none":
        step = x if config.decay == "head" else x @ param(layer.step_in.kernel)
        step = (step @ param(layer.step.kernel)).reshape(tokens, heads, -1)
        step = np.log1p(np.exp(step + param(layer.dt_bias).reshape(heads, -1)))
        decay = -np.exp(param(layer.log_rate))[None, :, None] * step
    outputs = np.zeros((tokens, heads, config.value_dim))
    for head in range(heads):
        shared, state = head * config.num_heads // heads, np.zeros((config.key_dim, config.value_dim))
        for t in range(tokens):
            key, query = unit(keys[t, shared]), unit(queries[t, shared]) / np.sqrt(config.key_dim)
            state = np.exp(decay[t, head])[:, None] * state
            found = state.T @ key if config.rule == "delta" else 0
            state = state + beta[t, head] * np.outer(key, values[t, head] - found)
            outputs[t, head] = state.T @ query
    normed = outputs / np.sqrt((outputs**2).mean(-1, keepdims=True) + config.norm_eps) * param(layer.norm.scale)
    normed = normed.reshape(tokens, -1)
    if config.gate == "low_rank":
        normed = normed * sigmoid(x @ param(layer.gate_in.kernel) @ param(layer.gate.kernel))
    elif config.gate != "none":
        normed = normed * {"silu": silu, "sigmoid": sigmoid}[config.gate](x @ param(layer.gate.kernel))
    return normed @ param(layer.out.kernel)


CASES = {
    "gated deltanet, grouped": {"num_value_heads": 4},
    "deltanet": {"decay": "none", "conv_len": 3},
    "negative eigenvalues": {"decay": "none", "negative_eigenvalues": True, "gate": "sigmoid"},
    "kda": {"decay": "channel", "gate": "low_rank", "conv_len": 2},
    "linear attention": {"rule": "plain", "decay": "none", "write_gate": False, "conv_len": 0, "gate": "none"},
    "linear attention, gated": {"rule": "plain", "decay": "none"},
    "retnet": {"rule": "plain", "decay": "constant", "write_gate": False},
    "gla": {"rule": "plain", "decay": "channel"},
    "mamba's decay": {"rule": "plain", "decay": "head"},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recurrence(case):
    fields = {"num_heads": 2, "key_dim": 5, "value_dim": 6, "chunk_len": 4, **CASES[case]}
    layer = LinearAttention(LinearConfig(**fields), WIDTH, dtype="float32", rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, NUM_TOKENS, WIDTH))
    positions = jnp.arange(NUM_TOKENS, dtype=jnp.int32)[None]
    (memory,) = whole([layer.states()], 1, NUM_TOKENS)
    y, _ = jax.jit(lambda x: layer(x, positions, memory))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y[0], by_hand(layer, x[0]), atol=2e-5)


def test_state_bytes_of_qwen3_next():
    """METHODS A.1: 36 layers of 32 value heads of 128 x 128 float32 numbers, and 3 columns of 8,192 channels in 16
    bits."""
    config = LinearConfig(num_heads=16, num_value_heads=32, key_dim=128, value_dim=128)
    layer = nnx.eval_shape(lambda: LinearAttention(config, 2048, dtype="bfloat16", rngs=nnx.Rngs(0)))
    assert sum(spec.unit_bytes for spec in layer.states().values()) == 2_146_304


NAMED = {
    "gated_deltanet": ("delta", "head"),
    "deltanet": ("delta", "none"),
    "kda": ("delta", "channel"),
    "linear_attention": ("plain", "none"),
    "retnet": ("plain", "constant"),
    "gla": ("plain", "channel"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_config_makes_the_layer_of_its_name(name):
    lab = Laboratory.of(compose([f"mixer={name}", "debug=tiny"]), abstract=True)
    config = lab.config.mixer.layers["L"].config
    assert (config.rule, config.decay) == NAMED[name]
    assert all(not spec.per_token for layer in lab.model.states for spec in layer.values())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_value_heads": 3}, "num_value_heads = 3: must be 0, or a multiple of 2"),
        ({"conv_len": 1}, "conv_len = 1: must be 0 (none) or a width in [2, 64]"),
        (
            {"rule": "plain", "negative_eigenvalues": True},
            "must be false without rule = delta and a write_gate",
        ),
        ({"write_gate": False, "negative_eigenvalues": True}, "must be false without rule = delta and a write_gate"),
        ({"dt_range": (0.1, 0.01)}, "dt_range = [0.1, 0.01]: must be two numbers [low, high] with low <= high"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(ConfigError) as found:
        LinearConfig(**fields).check()
    assert said in str(found.value)
