"""Layers that read another layer's keys and values: the formula in float64, who reads whose, and what is refused."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.layerwise import Blockwise
from kvlab.evaluation.session import Session
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.views import whole
from kvlab.mixers.attention import AttentionConfig
from kvlab.mixers.mamba2 import Mamba2Config
from kvlab.models.model import Model
from kvlab.models.sharing import sources_of
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer, split
from kvlab.schema import ConfigError
from tests.contracts import build
from tests.mixers.test_attention import rotary_matrix

FULL = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
WINDOW = replace(FULL, window=3, num_sinks=1, qk_norm=True)
READER = replace(WINDOW, shares_kv=True, bias=True, sink_logits=True, output_gate=True, norm_eps=1e-3)


def stack(*configs) -> Transformer:
    layers = [LayerConfig("attention", config) for config in configs]
    return Transformer(layers, ModelConfig(model_dim=16, tie_embeddings=False), 31, rngs=nnx.Rngs(0))


def normed(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def brute_force(params: dict, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of a layer with a window and a sink, and of another that reads its keys and values. Norms have
    their scales; query by query, head by head."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, held = params["embedding"]["embedding"][tokens], {}

    def linear(of: dict, h: np.ndarray) -> np.ndarray:
        return h @ of["kernel"] + of.get("bias", 0.0)

    def heads(of: dict, h: np.ndarray, norm: dict | None, eps: float) -> np.ndarray:
        split = linear(of, h).reshape(len(h), -1, 8)
        if norm is None:
            return split
        split = normed(split, eps) * norm["scale"]
        return np.stack([split[t] @ rotary_matrix(t, 8, 8, 10_000.0).T for t in range(len(h))])

    for layer, config in enumerate((WINDOW, READER)):
        block = params["blocks"][layer]
        mixer, h = block["mixer"], normed(x, 1e-6) * block["mixer_norm"]["scale"]
        if layer == 0:
            held["keys"] = heads(mixer["key"], h, mixer["key_norm"], config.norm_eps)
            held["values"] = heads(mixer["value"], h, None, 0.0)
        queries = heads(mixer["query"], h, mixer["query_norm"], config.norm_eps)
        outputs = np.zeros_like(queries)
        for t, head in np.ndindex(len(x), 4):
            seen = [place for place in range(t + 1) if t - place < 3 or place < 1]
            scores = held["keys"][seen, head // 2] @ queries[t, head] / np.sqrt(8)
            weights = np.exp(scores)
            total = weights.sum() + (np.exp(mixer["sink_logits"][head]) if layer else 0.0)
            outputs[t, head] = weights @ held["values"][seen, head // 2] / total
        outputs = outputs.reshape(len(x), -1)
        if layer:
            outputs = outputs * sigmoid(linear(mixer["gate"], h))
        x = x + linear(mixer["out"], outputs)
    return normed(x, 1e-6) * params["norm"]["scale"] @ params["head"]["kernel"]


def shaken(model: Transformer):
    structure, params = split(model)
    rng = np.random.default_rng(1)
    return structure, jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("chunk_len", [1, 5])
def test_a_stack_of_two_is_the_formula(chunk_len):
    """Prompts in chunks, then token by token, through pages that hold NaN; and the parallel form."""
    structure, params = shaken(stack(WINDOW, READER))
    model, rng = nnx.merge(structure, params), np.random.default_rng(0)
    tokens = {name: rng.integers(0, 31, count).astype(np.int32) for name, count in (("a", 17), ("b", 12))}
    wanted = {name: brute_force(params, each) for name, each in tokens.items()}
    whole_form = model.logits(model.parallel(jnp.asarray(tokens["a"][None])))[0]
    np.testing.assert_allclose(whole_form, wanted["a"], atol=2e-4)
    memory = MemoryConfig(page_size=4, chunk_len=chunk_len)
    layout = MemoryLayout.of(model.states(), memory, max_sequences=2, max_len=17)
    session = Session(MemoryStep.of(structure, layout), params, layout.allocate(float("nan")))
    for start in range(0, 12, chunk_len):
        chunks: dict[Any, np.ndarray] = {
            name: each[start : min(start + chunk_len, 12)] for name, each in tokens.items()
        }
        logits = session.advance(chunks, chunk_len)
        for row, name in enumerate(tokens):
            count = len(chunks[name])
            np.testing.assert_allclose(logits[row, :count], wanted[name][start : start + count], atol=2e-4)
    for place in range(12, 17):
        logits = session.advance({"a": tokens["a"][place : place + 1]}, 1)
        np.testing.assert_allclose(logits[0, 0], wanted["a"][place], atol=2e-4)


def test_it_has_no_projections_of_its_own_and_holds_nothing():
    model = stack(FULL, replace(FULL, shares_kv=True, qk_norm=True))
    own, reader = (block["mixer"].keys() for block in split(model)[1]["blocks"].values())
    assert {"key", "value"} <= own
    assert reader == {"query", "out", "query_norm"}
    assert model.states()[1] == {}


def test_layer_by_layer_is_the_same():
    structure, params = shaken(stack(WINDOW, FULL, READER))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    model = nnx.merge(structure, params)
    found, _ = Blockwise(Model(structure, params)).hidden(tokens, positions, whole(model.states(), 2, 9))
    np.testing.assert_allclose(found, model.parallel(tokens), atol=1e-5)


def test_each_reads_the_nearest_that_fits():
    sharing = [replace(each, shares_kv=True) for each in (FULL, WINDOW)]
    assert sources_of([FULL, sharing[0], FULL, sharing[0]]) == (None, 0, None, 2)
    assert sources_of([WINDOW, FULL, FULL, *sharing, sharing[0]]) == (None, None, None, 2, 0, 2)
    assert sources_of([FULL, Mamba2Config(), sharing[0]]) == (None, None, 0)
    plain = replace(FULL, rope=False, rope_base=7.0)
    assert sources_of([plain, replace(plain, rope_base=9.0, shares_kv=True)]) == (None, 0), "nothing is rotated"


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([replace(FULL, shares_kv=True), FULL], r"layers\.0\.shares_kv = True: must be false in layer 0: no layer"),
        ([Mamba2Config(), replace(FULL, shares_kv=True)], r"layers\.1\.shares_kv = True: must be false in layer 1"),
        (
            [FULL, WINDOW, replace(WINDOW, window=4, shares_kv=True)],
            r"layers\.2\.shares_kv = True: layer 2 .*layer 1 \(layers\.1\) it needs layers\.2\.window=3$",
        ),
        (
            [FULL, replace(FULL, num_kv_heads=4, soft_cap=2.0, shares_kv=True)],
            r"needs layers\.1\.num_kv_heads=2 layers\.1\.soft_cap=null$",
        ),
        ([FULL, replace(FULL, rope_base=500.0, shares_kv=True)], r"rope_base=10000"),
        ([FULL, replace(FULL, num_heads=2, shares_kv=True)], r"num_heads=4"),
    ],
)
def test_what_fits_nowhere_is_refused_with_what_would(layers, said):
    with pytest.raises(ConfigError, match=said):
        sources_of(layers)


def test_a_state_says_how_many_layers_read_it():
    """Bytes are held once, and read by each."""
    states = build("yoco")[0].states()
    full: Any
    (full,) = [state for layer in states for name, state in layer.items() if name == "kv"]
    assert (full.readers.num_layers, full.num_readers) == (3, 3)
    assert full.read_bytes(10) == 3 * full.logical_bytes(10) == 3 * 10 * 2 * 2 * 8 * 4
    assert [state.num_readers for layer in build("cla")[0].states() for state in layer.values() if state.per_token] == [
        2,
        2,
    ]
