"""Patterns, tied heads, parameters held once, and a printed model that tells shapes and bytes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.memory.views import whole
from kvlab.mixers.attention import AttentionConfig
from kvlab.models.transformer import Block, LayerConfig, ModelConfig, Transformer, merge, parse_pattern, split

LAYER = LayerConfig("attention", AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8))


def model_of(**fields) -> Transformer:
    return Transformer([LAYER, LAYER], ModelConfig(model_dim=16, **fields), 40, rngs=nnx.Rngs(0))


def test_patterns_tile():
    assert parse_pattern("M M A", ["M", "A"], None) == ["M", "M", "A"]
    assert parse_pattern("W A", ["W", "A"], 4) == ["W", "A", "W", "A"]
    with pytest.raises(ValueError, match="must divide"):
        parse_pattern("W A", ["W", "A"], 3)
    with pytest.raises(ValueError, match="unknown layer 'X'"):
        parse_pattern("W X", ["W", "A"], None)


def test_a_tied_head_is_held_once():
    tied, separate = (sum(x.size for x in jax.tree.leaves(split(model_of(tie_embeddings=t))[1])) for t in (True, False))
    assert separate - tied == 40 * 16
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16
    assert tied == 40 * 16 + 2 * (attention + 16) + 16


def test_split_and_merge_are_inverse():
    model = model_of(mlp_dim=8)
    structure, params = split(model)
    again = split(merge(structure, params))[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


def test_printing_shows_shapes_and_bytes():
    printed = str(model_of())
    assert "blocks.1.mixer.key.kernel" in printed
    assert "16x8" in printed
    assert "512 B" in printed
    assert "blocks.0 state kv" in printed
    assert "64 B/token" in printed  # one KV head of 8, keys and values, float32


def test_a_short_convolution_stands_before_the_mixer():
    """Block output = x + mixer(h + conv(h)) with the convolution written out in numpy."""
    block = Block(
        LayerConfig("attention", replace(LAYER.config, short_conv=3)), ModelConfig(model_dim=16), rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).standard_normal((1, 7, 16)).astype(np.float32)
    positions = jnp.arange(7, dtype=jnp.int32)[None]
    (memory,) = whole([block.states()], 1, 7)
    outputs, _ = block(jnp.asarray(x), positions, memory)
    h = x[0] / np.sqrt((x[0] ** 2).mean(-1, keepdims=True) + 1e-6)
    kernel = np.asarray(block.short_conv.kernel[...])
    padded = np.concatenate([np.zeros((2, 16), np.float32), h])
    h = h + sum(kernel[lag] * padded[2 - lag : 9 - lag] for lag in range(3))
    mixed, _ = block.mixer(jnp.asarray(h)[None], positions, memory)
    np.testing.assert_allclose(outputs, x + np.asarray(mixed), atol=1e-5)
    assert set(block.states()) == {"kv", "short_conv"}
