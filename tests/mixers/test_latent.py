"""Latent attention against its unabsorbed form in float64: keys and values of every head are expanded and attended to
one by one, as the paper writes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.compose import compose
from kvlab.lab.laboratory import Laboratory
from kvlab.memory.views import whole
from kvlab.mixers.latent import LatentAttention, LatentConfig
from kvlab.schema import ConfigError
from tests.mixers.test_attention import rotary_matrix

NUM_TOKENS, WIDTH = 11, 16
SMALL = {"num_heads": 3, "rank": 6, "rope_dim": 4, "head_dim": 5, "value_dim": 7}
CASES = {
    "queries as they are": {},
    "compressed queries": {"query_rank": 8},
    "nothing turned": {"rope": False, "rope_dim": 3},
    "another base, stretched": {"rope_base": 50.0, "rope_scaling": (4.0,)},
    "stretched in part": {"rope_scaling": (8.0, 1.0, 4.0, 32.0)},
    "YaRN, and its own scale": {"rope_dim": 8, "rope_scaling": (8.0, 0.3, 4.0, 32.0, 1.3), "scale": 0.6},
    "a coarse epsilon": {"norm_eps": 0.1, "query_rank": 8},
    "near tokens first": {"local_start": 1.5, "rope_base": 50.0},
}


def layer_of(**fields):
    """A layer whose norms scale, so that a norm left out shows."""
    layer = LatentAttention(LatentConfig(**SMALL | fields), WIDTH, dtype="float32", rngs=nnx.Rngs(0))
    norms = [layer.row_norm, *([layer.query_norm] if layer.config.query_rank else [])]
    for seed, norm in enumerate(norms):
        norm.scale[...] = 1 + 0.3 * jax.random.normal(jax.random.key(seed), norm.scale.shape)
    if layer.config.local_start:
        layer.query_start[...] = layer.query_start[...] + jnp.linspace(-1, 1, layer.config.rope_dim)
        layer.key_start[...] = layer.key_start[...] - jnp.linspace(0, 2, layer.config.rope_dim)
    return layer


def kernel(linear):
    return np.asarray(linear.kernel[...], np.float64)


def normed(x, norm, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(norm.scale[...], np.float64)


def turn(config, position):
    """The rotation of the last numbers of keys and queries, as a matrix."""
    if not config.rope:
        return np.eye(config.rope_dim)
    if not config.rope_scaling:
        return rotary_matrix(position, config.rope_dim, config.rope_dim, config.rope_base)
    half, matrix = config.rope_dim // 2, np.zeros((config.rope_dim, config.rope_dim))
    for i in range(half):
        frequency = config.rope_base ** (-2 * i / config.rope_dim)
        share = 0.0  # of the frequency as it is
        if len(config.rope_scaling) >= 4:
            _, low, high, original_len = config.rope_scaling[:4]
            share = min(max((original_len * frequency / (2 * np.pi) - low) / (high - low), 0), 1)
        if len(config.rope_scaling) == 5:  # arXiv 2309.00071, equations 20 to 23, over pairs as its code counts them
            pairs = half * np.log(original_len / (2 * np.pi * np.array([high, low]))) / np.log(config.rope_base)
            first, last = max(np.floor(pairs[0]), 0), min(np.ceil(pairs[1]), config.rope_dim - 1)
            share = 1 - min(max((i - first) / (last - first), 0), 1)
        angle = position * frequency * (share + (1 - share) / config.rope_scaling[0])
        matrix[i, i] = matrix[half + i, half + i] = np.cos(angle)
        matrix[half + i, i], matrix[i, half + i] = np.sin(angle), -np.sin(angle)
    return matrix * (config.rope_scaling[4] if len(config.rope_scaling) == 5 else 1)


def unabsorbed(layer, x):
    """Outputs [T, E] for inputs [T, E]."""
    config, tokens = layer.config, len(x)
    heads, dim = config.num_heads, config.head_dim
    asked = normed(x @ kernel(layer.compress), layer.query_norm, config.norm_eps) if config.query_rank else x
    queries = (asked @ kernel(layer.query)).reshape(tokens, heads, dim + config.rope_dim)
    rows = x @ kernel(layer.row)
    if config.local_start:
        queries[:, :, dim:] += np.asarray(layer.query_start[...], np.float64)
        rows[:, config.rank :] += np.asarray(layer.key_start[...], np.float64)
    compressed = normed(rows[:, : config.rank], layer.row_norm, config.norm_eps)
    expanded = (compressed @ kernel(layer.expand)).reshape(tokens, heads, dim + config.value_dim)
    outputs = np.zeros((tokens, heads, config.value_dim))
    for t in range(tokens):
        for head in range(heads):
            query = np.concatenate([queries[t, head, :dim], turn(config, t) @ queries[t, head, dim:]])
            keys = [np.concatenate([expanded[s, head, :dim], turn(config, s) @ rows[s, config.rank :]])
                    for s in range(t + 1)]  # fmt: skip
            scores = np.array(keys) @ query * (config.scale or (dim + config.rope_dim) ** -0.5)
            weights = np.exp(scores - scores.max())
            outputs[t, head] = weights @ expanded[: t + 1, head, dim:] / weights.sum()
    return outputs.reshape(tokens, -1) @ kernel(layer.out)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_unabsorbed_form(case):
    layer = layer_of(**CASES[case])
    x = 2 * np.random.default_rng(0).standard_normal((1, NUM_TOKENS, WIDTH))
    positions = jnp.arange(NUM_TOKENS, dtype=jnp.int32)[None]
    (memory,) = whole([layer.states()], 1, NUM_TOKENS)
    y, _ = jax.jit(lambda x: layer(x, positions, memory))(jnp.asarray(x, jnp.float32))
    expected = unabsorbed(layer, np.asarray(x[0], np.float32).astype(np.float64))
    np.testing.assert_allclose(y[0], expected, atol=1e-5)
    assert np.abs(expected).max() > 0.3


def test_a_start_near_by_is_a_pair_of_equal_numbers_and_needs_positions():
    layer = LatentAttention(LatentConfig(**SMALL, local_start=1.5), WIDTH, dtype="float32", rngs=nnx.Rngs(0))
    assert layer.query_start[...].tolist() == layer.key_start[...].tolist() == [1.5, 1.5, 0, 0]
    with pytest.raises(ConfigError, match=r"local_start = 2\.0: must be 0 without rope"):
        LatentConfig(rope=False, local_start=2)


def test_bytes_of_deepseek_v3():
    """METHODS A.1: 61 layers of 512 + 64 numbers in 16 bits, 70,272 bytes a token, whatever the heads."""
    for heads in (1, 128):
        config = LatentConfig(num_heads=heads, rank=512, rope_dim=64, head_dim=128, value_dim=128, query_rank=1536)
        layer = nnx.eval_shape(lambda c=config: LatentAttention(c, 7168, dtype="bfloat16", rngs=nnx.Rngs(0)))
        assert 61 * sum(state.unit_bytes for state in layer.states().values()) == 70_272


def test_readers_know_the_scale_and_which_numbers_are_turned():
    (state,) = layer_of().states().values()
    assert state.scale(10) == 9**-0.5, "of head_dim + rope_dim, not of the row"
    assert (state.readers.rotary.start, state.readers.rotary.dim) == (6, 4)
    (state,) = layer_of(rope=False).states().values()
    assert state.readers.rotary is None


def test_a_config_makes_the_layer_of_its_name():
    lab = Laboratory.of(compose(["mixer=mla", "debug=tiny", "model.dtype=float32"]), abstract=True)
    config = lab.config.mixer.layers["A"].config
    assert isinstance(config, LatentConfig)
    states = [state for layer in lab.model.states for state in layer.values() if state.per_token]
    assert {state.unit_bytes for state in states} == {4 * (config.rank + config.rope_dim)}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_dim": 3}, "rope_dim = 3: must be even to be turned, or rope false"),
        ({"rope_scaling": (2.0, 1.0)}, "rope_scaling = [2.0, 1.0]: must be [], [factor] or"),
        ({"rank": 0}, "rank = 0"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(ConfigError) as found:
        LatentConfig(**fields).check()
    assert said in str(found.value)
