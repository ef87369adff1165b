"""Streams, embeddings by layer, Laurel and cut-off gates against plain numpy in float64; and that a stack of them is
trained, run layer by layer and decoded from pages as it is in parallel."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.layerwise import Blockwise, layers_of
from kvlab.evaluation.session import Session
from kvlab.lab.flops import flops_of
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.mixers.attention import AttentionConfig
from kvlab.models.altup import AltUpBlock, StreamEnds, Streams
from kvlab.models.config import LayerConfig, ModelConfig
from kvlab.models.experts import ExpertsConfig
from kvlab.models.laurel import Laurel
from kvlab.models.mlp import gaussian_top_k
from kvlab.models.model import Model
from kvlab.models.transformer import Block, Transformer, split
from kvlab.schema import ConfigError

MODEL = ModelConfig(
    model_dim=16,
    mlp_dim=24,
    activation="gelu",
    num_streams=3,
    active_stream=1,
    layer_embed_dim=5,
    layer_embed_vocab=30,
    laurel_rank=4,
)
ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, value_norm=True, window=6)
LAYERS = [
    LayerConfig("attention", ATTENTION, mlp_sparsity=0.8),
    LayerConfig("attention", ATTENTION, mlp_sparsity=0.8),
    LayerConfig("attention", replace(ATTENTION, shares_kv=True, value_norm=False), mlp_dim=40),
]
VOCAB = 40


class Recorder(nnx.Module):
    """A block that returns a constant and keeps what it was given."""

    def __init__(self, y):
        self.y, self.given = nnx.data(y), nnx.data([])

    def __call__(self, x, positions, memory):
        self.given.append(x)
        return self.y, memory


def drawn(module: nnx.Module, seed: int = 0):
    """The module with normal numbers added to every parameter, and those parameters in float64."""
    structure, state = nnx.split(module)
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda leaf: leaf + 0.5 * rng.standard_normal(leaf.shape).astype(np.float32), state)
    return nnx.merge(structure, state), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(state))


def normed(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def length(x):
    return np.sqrt((x * x).mean(-1, keepdims=True))


def test_a_block_is_predicted_and_corrected():
    """Token by token and stream by stream, the second of three being active."""
    rng = np.random.default_rng(1)
    values, y = rng.standard_normal((3, 2, 4, 16)), rng.standard_normal((2, 4, 16))
    rows = rng.standard_normal((2, 2, 4, 5))
    inner = Recorder(jnp.asarray(y, jnp.float32))
    model = replace(MODEL, activation="gelu")
    block, _ = drawn(AltUpBlock(nnx.Module(), model, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(block)))
    block.block = inner
    streams = Streams(jnp.asarray(values, jnp.float32), jnp.asarray(rows, jnp.float32), jnp.asarray(1, jnp.int32))
    found, _ = block(streams, jnp.zeros((2, 4), jnp.int32), {})

    def routed(x):
        return np.tanh(normed(x, params["router_norm"]["scale"]) / 16 @ params["router"]["kernel"])

    expected, guess = np.empty_like(values), np.empty_like(values)
    for b in range(2):
        for t in range(4):
            weights = (routed(values[1, b, t]) @ params["prediction"]["kernel"]).reshape(3, 3)
            for i in range(3):
                guess[i, b, t] = values[i, b, t] + sum(weights[i, j] * values[j, b, t] for j in range(3))
            shares = 1 + routed(y[b, t]) @ params["correction"]["kernel"]
            for i in range(3):
                expected[i, b, t] = guess[i, b, t] + shares[i] * (y[b, t] - guess[1, b, t])
            gate = gelu(expected[1, b, t] * params["scale_of_active"] @ params["gate"]["kernel"])
            added = normed((gate * rows[1, b, t]) @ params["out"]["kernel"], params["out_norm"]["scale"])
            expected[1:, b, t] += added
    np.testing.assert_allclose(inner.given[0], guess[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5)
    assert found.layer == 2


def test_streams_begin_and_end_as_long_as_the_first():
    rng = np.random.default_rng(2)
    ends, params = drawn(StreamEnds(MODEL, 2, VOCAB, rngs=nnx.Rngs(0)))
    x, tokens = rng.standard_normal((1, 4, 16)), np.asarray([[0, 29, 30, 39]], np.int32)
    opened = ends.opened(jnp.asarray(x, jnp.float32), jnp.asarray(tokens))
    made = x @ params["projection"]["kernel"] / np.sqrt(16)
    made = normed(made.reshape(1, 4, 2, 5), params["norm"]["scale"])
    rows = params["embedding"]["embedding"][[0, 29, 0, 0]].reshape(1, 4, 2, 5)  # tokens 30 and 39 have no row
    expected = (made + np.sqrt(5) * rows) / np.sqrt(2)
    np.testing.assert_allclose(np.moveaxis(opened.embeddings, 0, 2), expected, rtol=1e-4, atol=1e-5)
    for index in range(2):
        spread = x @ params["spread"][index]["kernel"]
        expected = spread / length(spread) * length(x)
        np.testing.assert_allclose(opened.values[1 + index], expected, rtol=1e-4, atol=1e-5)
    values = rng.standard_normal((3, 1, 4, 16))
    back = [values[1 + index] @ params["gather"][index]["kernel"] for index in range(2)]
    expected = (values[0] + sum(each / length(each) * length(values[0]) for each in back)) / 3
    closed = ends.closed(Streams(jnp.asarray(values, jnp.float32), None, jnp.zeros((), jnp.int32)))
    np.testing.assert_allclose(closed, expected, rtol=1e-4, atol=1e-5)


def test_laurel():
    rng = np.random.default_rng(3)
    laurel, params = drawn(Laurel(MODEL, rngs=nnx.Rngs(0)))
    x, h = rng.standard_normal((2, 1, 3, 16))
    product = normed(h @ params["down"]["kernel"] @ params["up"]["kernel"], params["norm"]["scale"])
    found = laurel(jnp.asarray(x, jnp.float32), jnp.asarray(h, jnp.float32))
    np.testing.assert_allclose(found, (x + h + product) / np.sqrt(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sparsity", "quantile"), [(0.95, 1.6448536269514722), (0.5, 0.0), (0.1, -1.2815515655446004)])
def test_gates_below_the_cut_off_are_nothing(sparsity, quantile):
    """Quantiles of the normal distribution are those of printed tables; of normal gates that share is cut off."""
    gate = 3 + 2 * np.random.default_rng(4).standard_normal((2, 3, 4000)).astype(np.float32)
    wide = gate.astype(np.float64)
    cut_off = wide.mean(-1, keepdims=True) + quantile * np.sqrt(wide.var(-1, keepdims=True))
    found = np.asarray(gaussian_top_k(jnp.asarray(gate), sparsity))
    np.testing.assert_allclose(found, np.maximum(wide - cut_off, 0), rtol=1e-4, atol=1e-5)
    assert (found == 0).mean() == pytest.approx(sparsity, abs=0.01)
    assert gaussian_top_k(jnp.asarray(gate, jnp.bfloat16), sparsity).dtype == jnp.bfloat16


def test_an_mlp_has_its_own_width_and_cuts_its_gates_before_the_activation():
    layer = replace(LAYERS[2], mlp_sparsity=0.8)
    mlp, params = drawn(Block(layer, MODEL, rngs=nnx.Rngs(0)).mlp)
    x = np.random.default_rng(5).standard_normal((1, 3, 16))
    gate, up = np.split(x @ params["gate_up"]["kernel"], 2, axis=-1)
    assert gate.shape[-1] == 40
    cut = np.maximum(gate - gate.mean(-1, keepdims=True) - 0.8416212335729143 * gate.std(-1, keepdims=True), 0)
    expected = (gelu(cut) * up) @ params["down"]["kernel"]
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_streams": 1}, r"num_streams = 1: must be 0 .* or in \[2, 64\]"),
        ({"num_streams": 2, "active_stream": 2}, r"active_stream = 2: must be in \[0, 1\]"),
        ({"active_stream": 1}, r"active_stream = 1: must be in \[0, 0\], with num_streams = 0"),
        ({"layer_embed_dim": 4}, "layer_embed_dim = 4: must be 0 without num_streams"),
        ({"num_streams": 2, "layer_embed_vocab": 4}, "layer_embed_vocab = 4: must be null without layer_embed_dim"),
    ],
)
def test_what_cannot_be_is_said(fields, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**fields)


def test_values_of_others_are_not_normed():
    with pytest.raises(ConfigError, match="value_norm = True: must be false with shares_kv"):
        AttentionConfig(shares_kv=True, value_norm=True)


@pytest.fixture(scope="module")
def stack() -> Transformer:
    return drawn(Transformer(LAYERS, MODEL, VOCAB, rngs=nnx.Rngs(0)))[0]


TOKENS = np.random.default_rng(6).integers(0, VOCAB, (1, 19)).astype(np.int32)


def test_decoding_from_pages_is_the_parallel_form(stack):
    """Five tokens prefilled, the others one by one, from pools that hold NaN where nothing was written; and the layer
    that shares holds no byte. A change of parameters by 1e-7 changes a logit here by 1.5e-4."""
    assert [list(states) for states in stack.states()] == [["kv"], ["kv"], []]
    assert [state.unit_bytes for states in stack.states() for state in states.values()] == [64, 64]
    structure, params = split(stack)
    layout = MemoryLayout.of(
        stack.states(), MemoryConfig("paged", page_size=4, chunk_len=5), max_sequences=1, max_len=19
    )
    session = Session(MemoryStep.of(structure, layout), params, layout.allocate(float("nan")))
    found = [np.asarray(session.advance({"a": TOKENS[0, :5]}, 5))[0]]
    found += [np.asarray(session.advance({"a": TOKENS[0, at : at + 1]}, 1))[0] for at in range(5, 19)]
    expected = jax.jit(lambda ids: stack.logits(stack.parallel(ids)))(jnp.asarray(TOKENS))
    np.testing.assert_allclose(np.concatenate(found), expected[0], atol=1e-3)


def test_layers_apart_are_the_whole_program(stack):
    """And the two layers that are alike share a program: which of them reads its embeddings is traced."""
    blockwise = Blockwise(Model.of(stack))
    hidden, _ = layers_of(blockwise, TOKENS, lambda layer, state, view: view)
    np.testing.assert_allclose(hidden, jax.jit(stack.parallel)(jnp.asarray(TOKENS)), atol=1e-3)
    structures = [structure for structure, _ in blockwise.blocks]
    assert structures[0] == structures[1] != structures[2]


def test_every_parameter_is_trained(stack):
    structure, params = split(stack)

    def loss(params):
        model = nnx.merge(structure, params)
        return jnp.mean(model.logits(model.parallel(jnp.asarray(TOKENS))) ** 2)

    for path, slope in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert jnp.isfinite(slope).all(), path
        assert jnp.abs(slope).max() > 0, path


def test_a_token_that_is_embedded_as_nothing_has_a_gradient(stack):
    """Streams that are 0 have no length, and their gates no deviation."""
    structure, params = split(stack)
    rows = params["embedding"]["embedding"].at[3].set(0)

    def loss(rows):
        model = nnx.merge(structure, {**params, "embedding": {"embedding": rows}})
        return jnp.sum(model.parallel(jnp.asarray([[3, 5]], jnp.int32)) ** 2)

    assert jnp.isfinite(jax.jit(jax.grad(loss))(rows)).all()


def test_products_of_the_streams_are_counted():
    """What streams, embeddings and Laurel multiply beside the blocks' own products, by hand; E 16, A 3, F 5, 3
    layers."""

    def products(model: ModelConfig) -> float:
        built = Transformer(LAYERS, model, VOCAB, rngs=nnx.Rngs(0))
        return flops_of(jax.jit(built.parallel).trace(jnp.asarray(TOKENS)).jaxpr, only=["dot_general"])

    plain = replace(MODEL, num_streams=0, active_stream=0, layer_embed_dim=0, layer_embed_vocab=None, laurel_rank=0)
    ends = 4 * 16 * 16 + 16 * 15
    block = 2 * 16 * 3 + 3 * 9 + 9 * 16 + 3 * 3 + 2 * 16 * 5 + 2 * 16 * 4
    assert products(MODEL) - products(plain) == 2 * 19 * (ends + 3 * block)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_sparsity": 1.0}, "mlp_sparsity = 1.0: must be in"),
        ({"mlp_sparsity": -0.5}, "mlp_sparsity = -0.5: must be in"),
        ({"mlp_dim": 8, "mlp": ExpertsConfig()}, "mlp_dim = 8: must be null beside mlp"),
        ({"mlp_sparsity": 0.5, "mlp": ExpertsConfig()}, "mlp_sparsity = 0.5: must be 0 beside mlp"),
    ],
)
def test_an_mlp_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LayerConfig("attention", ATTENTION, **fields)
