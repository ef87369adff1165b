"""Patterns, tied heads, parameters held once, and a printed model that tells shapes and bytes."""

import jax
import pytest
from flax import nnx

from kvlab.mixers.attention import AttentionConfig
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer, merge, parse_pattern, split

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
    assert "blocks.0.mixer state kv" in printed
    assert "64 B/token" in printed  # one KV head of 8, keys and values, float32
