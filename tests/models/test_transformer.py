"""Patterns, tied heads, parameters held once, and a printed model that tells shapes and bytes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.memory.views import whole
from kvlab.mixers.attention import AttentionConfig
from kvlab.models.model import Model
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


def test_a_model_is_one_value():
    transformer = model_of(mlp_dim=8)
    model = Model.of(transformer)
    params = jax.tree.leaves(split(transformer)[1])
    assert model.num_params == sum(leaf.size for leaf in params)
    assert model.num_bytes == 4 * model.num_params
    assert model.states == transformer.states()
    tokens = jnp.arange(5, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(model.merge().parallel(tokens), transformer.parallel(tokens))
    shapes = Model.of(nnx.eval_shape(lambda: model_of(mlp_dim=8)))
    assert (shapes.num_bytes, shapes.states) == (model.num_bytes, model.states)


def test_printing_shows_shapes_and_bytes():
    printed = str(model_of())
    assert "blocks.1.mixer.key.kernel" in printed
    assert "16x8" in printed
    assert "512 B" in printed
    assert "blocks.0 state kv" in printed
    assert "64 B/token" in printed  # one KV head of 8, keys and values, float32


@pytest.mark.parametrize("norms", ["before", "after", "both"])
def test_norms_stand_where_they_are_said_to(norms):
    """With gelu and biases in the MLP and half of what a layer adds; all but the mixer in float64."""
    config = replace(LAYER.config, norms=norms)
    model = ModelConfig(model_dim=16, mlp_dim=24, mlp_bias=True, activation="gelu", residual_scale=0.5)
    structure, state = nnx.split(Block(LayerConfig("attention", config), model, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), state)
    block, params = nnx.merge(structure, state), nnx.to_pure_dict(state)
    x, positions = rng.standard_normal((1, 7, 16)), jnp.arange(7, dtype=jnp.int32)[None]
    (memory,) = whole([block.states()], 1, 7)

    def normed(h, name):
        if name not in params:
            return h
        return h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * np.asarray(params[name]["scale"], np.float64)

    h = normed(x, "mixer_norm")
    mixed = np.asarray(block.mixer(jnp.asarray(h, jnp.float32), positions, memory)[0], np.float64)
    expected = x + 0.5 * normed(mixed, "mixer_norm_after")
    h = normed(expected, "mlp_norm")
    mlp = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["mlp"])
    gate, up = np.split(h @ mlp["gate_up"]["kernel"] + mlp["gate_up"]["bias"], 2, axis=-1)
    gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    added = (gate * up) @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    expected = expected + 0.5 * normed(added, "mlp_norm_after")
    assert ("mixer_norm" in params, "mlp_norm_after" in params) == (norms != "after", norms != "before")
    y, _ = block(jnp.asarray(x, jnp.float32), positions, memory)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_embeddings_and_logits_are_scaled_and_capped():
    tokens, hidden = jnp.arange(5, dtype=jnp.int32)[None], jnp.asarray(np.arange(32.0).reshape(1, 2, 16), jnp.float32)
    plain, scaled = model_of(), model_of(embed_scale=4.0, logit_divisor=0.01, logit_cap=3.0)
    np.testing.assert_allclose(scaled.embedded(tokens), 4 * plain.embedded(tokens), rtol=1e-6)
    expected = 3 * np.tanh(np.asarray(plain.logits(hidden), np.float64) / 0.01 / 3)
    np.testing.assert_allclose(scaled.logits(hidden), expected, rtol=1e-5)
    assert abs(expected).max() > 2.9


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
