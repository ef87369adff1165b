"""Linear attention and delta rules against a float64 rewrite of their recurrence, and their bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.compose import compose
from kvlab.lab.laboratory import Laboratory
from kvlab.memory.views import whole
from kvlab.mixers.linear import LinearAttention, LinearConfig, divided
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


def heads_of(layer: LinearAttention, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [T, num_heads, N], keys [T, n, num_heads, N] and values [T, n, heads, P] of n householders as projected
    and convolved, of any length."""
    config, tokens = layer.config, len(x)
    channels = x @ param(layer.split.kernel)
    if config.conv_len:
        kernel, before = param(layer.conv.kernel), config.conv_len - 1
        padded = np.concatenate([np.zeros((before, channels.shape[1])), channels])
        lagged = [kernel[lag] * padded[before - lag : before - lag + tokens] for lag in range(config.conv_len)]
        channels = silu(sum(lagged) + (param(layer.conv.bias) if config.conv_bias else 0))
    inner, num_steps = config.num_heads * config.key_dim, config.householders
    queries, keys, values = np.split(channels, [inner, (1 + num_steps) * inner], axis=-1)
    queries = queries.reshape(tokens, config.num_heads, config.key_dim)
    keys = keys.reshape(tokens, num_steps, config.num_heads, config.key_dim)
    return queries, keys, values.reshape(tokens, num_steps, config.heads, config.value_dim)


def forward(layer: LinearAttention, x: np.ndarray) -> np.ndarray:
    """Outputs [T, E] of the parallel form for inputs [1, T, E]."""
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    (memory,) = whole([layer.states()], 1, x.shape[1])
    return jax.jit(lambda x: layer(x, positions, memory)[0])(jnp.asarray(x, jnp.float32))[0]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def by_hand(layer: LinearAttention, x: np.ndarray) -> np.ndarray:
    """Outputs [T, E] for inputs [T, E], token by token and head by head."""
    config, tokens, heads = layer.config, len(x), layer.config.heads
    queries, keys, values = heads_of(layer, x)
    beta = np.ones((tokens, config.householders, heads))
    if config.write_gate:
        beta = sigmoid(x @ param(layer.beta.kernel)).reshape(beta.shape) * (2 if config.negative_eigenvalues else 1)
    decay = np.zeros((tokens, heads, 1))
    if config.decay == "constant":
        decay = np.log(1 - 2.0 ** -(5 + np.arange(heads)))[None, :, None] * np.ones((tokens, 1, 1))
    elif config.decay == "slopes":
        decay = -np.array([[[2 ** (-8 * h / heads)] for h in range(1, heads + 1)]]) * np.ones((tokens, 1, 1))
    elif config.decay != "none":
        step = x if config.decay == "head" else x @ param(layer.step_in.kernel)
        step = (step @ param(layer.step.kernel)).reshape(tokens, heads, -1)
        step = np.log1p(np.exp(step + param(layer.dt_bias).reshape(heads, -1)))
        decay = -np.exp(param(layer.log_rate))[None, :, None] * step
    outputs = np.zeros((tokens, heads, config.value_dim))
    for head in range(heads):
        shared, state = head * config.num_heads // heads, np.zeros((config.key_dim, config.value_dim))
        for t in range(tokens):
            state = np.exp(decay[t, head])[:, None] * state
            for i in range(config.householders):
                key = unit(keys[t, i, shared])
                found = state.T @ key if config.rule == "delta" else 0
                state = state + beta[t, i, head] * np.outer(key, values[t, i, head] - found)
            outputs[t, head] = state.T @ unit(queries[t, shared]) / np.sqrt(config.key_dim)
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
    "kda, convolved without a bias": {"decay": "channel", "gate": "low_rank", "conv_bias": False},
    "linear attention": {"rule": "plain", "decay": "none", "write_gate": False, "conv_len": 0, "gate": "none"},
    "linear attention, gated": {"rule": "plain", "decay": "none"},
    "retnet": {"rule": "plain", "decay": "constant", "write_gate": False},
    "lightning": {"rule": "plain", "decay": "slopes", "write_gate": False, "gate": "sigmoid"},
    "gla": {"rule": "plain", "decay": "channel"},
    "mamba's decay": {"rule": "plain", "decay": "head"},
    "deltaproduct": {"householders": 2, "decay": "none", "negative_eigenvalues": True},
    "gated deltaproduct, grouped": {"householders": 3, "negative_eigenvalues": True, "num_value_heads": 4},
    "kda's decay, twice": {"householders": 2, "decay": "channel", "conv_len": 0, "write_gate": False},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recurrence(case):
    fields = {"num_heads": 2, "key_dim": 5, "value_dim": 6, "chunk_len": 4, **CASES[case]}
    layer = LinearAttention(LinearConfig(**fields), WIDTH, dtype="float32", rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, NUM_TOKENS, WIDTH))
    assert_close(forward(layer, x), by_hand(layer, x[0]))


TAYLOR = {"rule": "plain", "decay": "none", "feature_map": "taylor"}
BASED = {
    "published": {"write_gate": False, "conv_len": 0, "gate": "none"},
    "gated, grouped": {"num_value_heads": 4, "conv_len": 3},
    "decayed": {"decay": "constant", "conv_len": 2, "write_gate": False, "gate": "sigmoid"},
}


def by_pairs(layer: LinearAttention, x: np.ndarray) -> np.ndarray:
    """Based [T, E]: means over all pairs of tokens with weights 1 + s + s^2 / 2; no features and no state."""
    config, tokens = layer.config, len(x)
    queries, keys, values = heads_of(layer, x)
    beta = sigmoid(x @ param(layer.beta.kernel)) if config.write_gate else np.ones((tokens, config.heads))
    outputs = np.zeros((tokens, config.heads, config.value_dim))
    for head in range(config.heads):
        shared = head * config.num_heads // config.heads
        kept = 1 - 2.0 ** -(5 + head) if config.decay == "constant" else 1.0
        for t in range(tokens):
            scores = keys[: t + 1, 0, shared] @ queries[t, shared] / np.sqrt(config.key_dim)
            weights = (1 + scores + scores**2 / 2) * beta[: t + 1, head] * kept ** np.arange(t, -1, -1)
            outputs[t, head] = weights @ values[: t + 1, 0, head] / weights.sum()
    outputs = outputs.reshape(tokens, -1)
    if config.gate != "none":
        outputs = outputs * {"silu": silu, "sigmoid": sigmoid}[config.gate](x @ param(layer.gate.kernel))
    return outputs @ param(layer.out.kernel)


@pytest.mark.parametrize("case", BASED)
def test_based_is_the_mean_over_all_pairs(case):
    fields = {"num_heads": 2, "key_dim": 5, "value_dim": 6, "chunk_len": 4, **TAYLOR, **BASED[case]}
    layer = LinearAttention(LinearConfig(**fields), WIDTH, dtype="float32", rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, NUM_TOKENS, WIDTH))
    assert_close(forward(layer, x), by_pairs(layer, x[0]))


def test_tokens_of_padding_alone_are_no_nan():
    """A row without any token has a state of zeros, and nothing to divide by."""
    assert bool((divided(jnp.zeros((1, 2, 2, 4))) == 0).all())
    gradient = jax.grad(lambda x: divided(x).sum())(jnp.zeros((1, 2, 2, 4)))
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize(
    "case", ["gated deltanet, grouped", "negative eigenvalues", "kda", "gated deltaproduct, grouped", "based"]
)
def test_gradients_are_finite_for_one_key_over_a_chunk(case):
    """The same token again and again, as padding and newlines give it."""
    fields = {"num_heads": 2, "key_dim": 5, "value_dim": 6, "chunk_len": 32, **CASES.get(case, TAYLOR)}
    layer = LinearAttention(LinearConfig(**fields), WIDTH, dtype="float32", rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    (memory,) = whole([layer.states()], 1, 64)
    positions = jnp.arange(64, dtype=jnp.int32)[None]
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (WIDTH,)), (1, 64, WIDTH))
    grads = jax.jit(jax.grad(lambda params: (nnx.merge(graph, params)(x, positions, memory)[0] ** 2).sum()))(params)
    assert all(bool(jnp.isfinite(grad).all()) for grad in jax.tree.leaves(grads))


def test_householders_cost_no_state():
    """What grows is the work and, by their keys and values, the convolution."""
    once, twice = (LinearAttention(LinearConfig(householders=n), 8, dtype="float32", rngs=nnx.Rngs(0)) for n in (1, 2))
    assert once.states()["matrix"] == twice.states()["matrix"]


def test_state_bytes_of_based():
    """1 + 16 + 256 features, and the denominator beside 64 values: the published feature dimension of 16."""
    config = LinearConfig(num_heads=16, key_dim=16, value_dim=64, conv_len=0, **TAYLOR)
    layer = nnx.eval_shape(lambda: LinearAttention(config, 1024, dtype="bfloat16", rngs=nnx.Rngs(0)))
    assert sum(spec.unit_bytes for spec in layer.states().values()) == 16 * 273 * 65 * 4


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
    "lightning": ("plain", "slopes"),
    "gla": ("plain", "channel"),
    "based": ("plain", "none"),
    "deltaproduct": ("delta", "none"),
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
        ({"feature_map": "taylor"}, "feature_map = 'taylor': must be unit, unless rule = plain and decay is not by"),
        ({"feature_map": "taylor", "rule": "plain", "decay": "channel"}, "feature_map = 'taylor': must be unit"),
        ({"rule": "plain", "householders": 2}, "householders = 2: must be 1 without rule = delta"),
        ({"dt_range": (0.1, 0.01)}, "dt_range = [0.1, 0.01]: must be two numbers [low, high] with low <= high"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(ConfigError) as found:
        LinearConfig(**fields).check()
    assert said in str(found.value)
