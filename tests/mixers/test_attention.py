"""The attention mixer against a float64 rewrite of its formula, rotary embeddings included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.memory.views import whole
from kvlab.mixers.attention import Attention, AttentionConfig
from kvlab.rotary import rotary_angles, rotate
from kvlab.schema import ConfigError


def rotary_matrix(position: int, dim: int, rotary_dim: int, base: float) -> np.ndarray:
    """The rotation as an explicit matrix: plane (i, i + r/2) turns by position * base ** (-2i/r)."""
    matrix, half = np.eye(dim), rotary_dim // 2
    for i in range(half):
        angle = position * base ** (-2 * i / rotary_dim)
        matrix[i, i] = matrix[half + i, half + i] = np.cos(angle)
        matrix[i, half + i], matrix[half + i, i] = -np.sin(angle), np.sin(angle)
    return matrix


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_rotation_is_the_published_matrix(fraction):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 9, 2, 8)).astype(np.float32)
    config = AttentionConfig(head_dim=8, rope_fraction=fraction, rope_base=100.0)
    cos, sin = rotary_angles(jnp.arange(9, dtype=jnp.int32)[None], config.rotary_dim, 100.0)
    turned = rotate(jnp.asarray(x), cos, sin)
    for t in range(9):
        matrix = rotary_matrix(t, 8, config.rotary_dim, 100.0)
        np.testing.assert_allclose(turned[0, t], x[0, t] @ matrix.T, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_kv_heads": 4},
        {"num_kv_heads": 2, "window": 3, "num_sinks": 1},
        {"num_kv_heads": 1, "qk_norm": True, "soft_cap": 2.0, "bias": True, "rope_fraction": 0.5, "scale": 0.4},
        {"num_kv_heads": 2, "qk_norm": True, "qk_norm_over": "all"},
        {"num_kv_heads": 2, "rope": False},
        {"num_kv_heads": 2, "rope": False, "out_bias": True},
        {"num_kv_heads": 2, "output_gate": True},
        {"num_kv_heads": 2, "output_gate": True, "bias": True},
        {"num_kv_heads": 2, "sink_logits": True, "window": 3},
        {"num_kv_heads": 2, "local_start": 1.5, "rope_fraction": 0.5},
        {"num_kv_heads": 2, "local_start": 1.5, "qk_norm": True},
    ],
)
def test_equals_the_formula(fields):
    config = AttentionConfig(num_heads=4, head_dim=8, **fields)
    layer = Attention(config, 16, dtype="float32", rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, 11, 16))
    for number, name in enumerate(("query", "key", "value", "out", "gate")):
        if (bias := getattr(getattr(layer, name, None), "bias", None)) is not None:
            bias[...] = jnp.sin(jnp.arange(bias.size) + number)
    if config.sink_logits:
        layer.sink_logits[...] = jnp.array([-1.0, 0.5, 2.0, 4.0])
    if config.qk_norm:
        layer.query_norm.scale[...] = jnp.linspace(0.5, 1.5, layer.query_norm.scale.size)
        layer.key_norm.scale[...] = jnp.linspace(1.2, 0.4, layer.key_norm.scale.size)
    if config.local_start:
        layer.query_start[...] = layer.query_start[...] + jnp.linspace(-1, 1, 8)
        layer.key_start[...] = layer.key_start[...] - jnp.linspace(0, 2, 8)
    positions = jnp.arange(11, dtype=jnp.int32)[None]
    (memory,) = whole([layer.states()], 1, 11)
    y, _ = jax.jit(lambda x: layer(x, positions, memory))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y[0], formula(layer, config, x[0]), atol=2e-5)


def test_a_local_start_prefers_near_tokens_by_the_sum_of_cosines():
    """Of tokens that project to nothing, the weights are a softmax of start^2 sum_i cos(base ** (-2i/r) distance)."""
    config = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=8, rope_fraction=0.5, rope_base=100.0, local_start=3)
    layer = Attention(config, 6, dtype="float32", rngs=nnx.Rngs(0))
    layer.query.kernel[...], layer.key.kernel[...] = jnp.zeros((6, 8)), jnp.zeros((6, 8))
    layer.value.kernel[...], layer.out.kernel[...] = jnp.eye(6, 8), jnp.eye(8, 6)
    (memory,) = whole([layer.states()], 1, 6)
    y, _ = layer(jnp.eye(6)[None], jnp.arange(6, dtype=jnp.int32)[None], memory)  # token t has a one at place t
    for t in range(6):
        distances = t - np.arange(t + 1)
        scores = 9 * (np.cos(distances) + np.cos(distances * 100.0**-0.5)) / np.sqrt(8)
        expected = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(y[0, t, : t + 1], expected, atol=1e-5)
        assert t == 0 or expected[t] > 1 / (t + 1)


def test_a_local_start_needs_positions():
    with pytest.raises(ConfigError, match=r"local_start = 2\.0: must be 0 without rope"):
        AttentionConfig(rope=False, local_start=2)


def test_a_bias_of_the_output_is_named_once():
    with pytest.raises(ConfigError, match="out_bias = True: must be false with bias"):
        AttentionConfig(bias=True, out_bias=True)


def formula(layer: Attention, config: AttentionConfig, x: np.ndarray) -> np.ndarray:
    weight = {
        name: np.asarray(getattr(layer, name).kernel[...], np.float64) for name in ("query", "key", "value", "out")
    }
    biased = ("query", "key", "value", "out") if config.bias else ("out",) if config.out_bias else ()
    bias = {name: np.asarray(getattr(layer, name).bias[...]) if name in biased else 0.0 for name in weight}
    heads = {name: (x @ weight[name] + bias[name]).reshape(len(x), -1, 8) for name in ("query", "key", "value")}
    if config.local_start:
        for name, moved in (("query", np.linspace(-1, 1, 8)), ("key", -np.linspace(0, 2, 8))):
            start = np.where(np.arange(8) < config.rotary_dim // 2, config.local_start, 0.0)
            heads[name] = heads[name] + start + moved
    if config.qk_norm:
        over = (-1,) if config.qk_norm_over == "head" else (-2, -1)
        for name, norm in (("query", layer.query_norm), ("key", layer.key_norm)):
            heads[name] = heads[name] / np.sqrt((heads[name] ** 2).mean(over, keepdims=True) + 1e-6)
            heads[name] = heads[name] * np.asarray(norm.scale[...], np.float64).reshape(-1, 8)
    if config.rope:
        for name in ("query", "key"):
            turned = [heads[name][t] @ rotary_matrix(t, 8, config.rotary_dim, 10_000.0).T for t in range(len(x))]
            heads[name] = np.stack(turned)
    outputs = np.zeros((len(x), 4, 8))
    for head in range(4):
        kv = head // (4 // config.num_kv_heads)
        for t in range(len(x)):
            window = config.window or len(x) + 1
            seen = [p for p in range(t + 1) if t - p < window or p < config.num_sinks]
            scores = heads["key"][seen, kv] @ heads["query"][t, head] * (config.scale or 8**-0.5)
            scores = config.soft_cap * np.tanh(scores / config.soft_cap) if config.soft_cap else scores
            probabilities = np.exp(scores - scores.max())
            sink = np.exp(layer.sink_logits[head] - scores.max()) if config.sink_logits else 0.0
            outputs[t, head] = probabilities @ heads["value"][seen, kv] / (probabilities.sum() + sink)
    outputs = outputs.reshape(len(x), -1)
    if config.output_gate:
        gate = layer.gate.bias[...] if config.bias else 0.0
        outputs = outputs / (1 + np.exp(-(x @ np.asarray(layer.gate.kernel[...], np.float64) + np.asarray(gate))))
    return outputs @ weight["out"] + bias["out"]
