"""Keys and values that several layers read: what methods note of them, and that nothing of a run differs otherwise."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compression import COMPRESSIONS
from kvlab.engine.step import MemoryStep
from kvlab.evaluation.session import Session
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.views import whole
from kvlab.models.transformer import merge
from tests.compression.harness import TOLERANCE, assert_equivalent, memory_of, model_of, run
from tests.contracts import VOCAB


@pytest.mark.parametrize(
    ("model", "method", "fields"),
    [
        ("cla", "h2o", {"at": "chunks", "every": 3}),
        ("cla", "snapkv", {"every": 3}),
        ("cla", "kvzip", {}),
        ("cla", "keydiff", {"heads": "ada"}),
        ("yoco", "tova", {"at": "chunks", "every": 1}),
        ("yoco", "expected", {"format": "int8"}),
        ("yoco", "keydiff", {"format": "kivi4", "page_size": 8, "budget": 16}),
        ("shared_windows", "rkv", {"every": 4}),
    ],
    ids=str,
)
def test_logits_are_those_of_the_mask(model, method, fields):
    assert_equivalent(run(model, memory_of(method, **fields)))


def test_heads_that_stream_do_so_for_every_layer_that_reads():
    duo = {"type": "duo", "sinks": 1, "streaming": [[1], [0]]}
    ran = run("cla", MemoryConfig(page_size=4, chunk_len=5, compression=duo, budget=4))  # pyright: ignore
    assert ran.worst <= TOLERANCE
    assert [held["kv"][0].sum(axis=1).tolist() for held in ran.held() if held] == [[31, 4], [4, 31]]


class Recorder:
    """A complete sequence whose keys [B, T, K, D] and queries [B, T, H, D], of each layer that reads it, are kept."""

    def __init__(self, view: Any, log: dict[str, Any]):
        self.view, self.log = view, log

    def append(self, **tokens: Any) -> "Recorder":
        self.log |= {"keys": np.asarray(tokens["keys"], np.float64), "queries": []}
        return Recorder(self.view.append(**tokens), self.log)

    def attend(self, queries: Any, positions: Any, **options: Any) -> Any:
        self.log["queries"].append(np.asarray(queries, np.float64))
        outputs, view = self.view.attend(queries, positions, **options)
        return outputs, Recorder(view, self.log)


def recorded(model: str, tokens: np.ndarray) -> dict[int, dict[str, Any]]:
    """What the layers of a model really read, by the layer that holds it."""
    states, structure, params = model_of(model)
    logs = {layer: {} for layer, mine in enumerate(states) if "kv" in mine}
    memory = [
        {name: Recorder(view, logs[layer]) if name == "kv" else view for name, view in mine.items()}
        for layer, mine in enumerate(whole(states, *tokens.shape))
    ]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    merge(structure, params).hidden(jnp.asarray(tokens), positions, memory)
    return logs


def noted(model: str, method: str, tokens: np.ndarray) -> list[dict[int, dict[str, np.ndarray]]]:
    """What a method has noted of each sequence, by layer; fed in ragged chunks, and token by token."""
    states, structure, params = model_of(model)
    layout = MemoryLayout.of(states, memory_of(method, every=1), max_sequences=2, max_len=tokens.shape[1])
    session = Session(MemoryStep.of(structure, layout), params, layout.allocate(float("nan")))
    for start, end, width in ((0, 5, 5), (5, 8, 5), (8, 9, 1), (9, 10, 1), (10, 14, 5), (14, 15, 1)):
        session.advance({row: tokens[row, start:end] for row in range(2)}, width)
    found = []
    for row in range(2):
        mine = dict[int, dict[str, np.ndarray]]()
        for layer, held in enumerate(layout.states):
            if "kv.noted" in held:
                (slot,) = session.ledger.pages(row, held["kv.noted"])
                pool = session.pools[layer]["kv.noted"]
                mine[layer] = {name: np.asarray(array[slot]) for name, array in pool.items()}
        found.append(mine)
    return found


def weights_of(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Softmax weights [T, H, T] of one sequence, causal."""
    group = queries.shape[1] // keys.shape[1]
    scores = np.einsum("thd,shd->ths", queries, np.repeat(keys, group, axis=1)) / np.sqrt(keys.shape[-1])
    scores[~np.tril(np.ones((len(keys), len(keys)), bool))[:, None].repeat(scores.shape[1], axis=1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


TOKENS = np.random.default_rng(5).integers(0, VOCAB, (2, 15)).astype(np.int32)


@pytest.mark.parametrize("model", ["cla", "yoco"])
def test_attention_is_summed_over_all_layers_that_read(model):
    """H2O: of every slot what the queries of every layer gave it, and how many there were."""
    logs, found = recorded(model, TOKENS), noted(model, "h2o", TOKENS)
    assert {layer: len(log["queries"]) for layer, log in logs.items()} == ({0: 2, 2: 2} if model == "cla" else {1: 3})
    for row, mine in enumerate(found):
        assert mine.keys() == logs.keys()
        for layer, log in logs.items():
            each = [weights_of(log["keys"][row], queries[row]) for queries in log["queries"]]
            by_head = np.sum([weights.reshape(15, 2, 2, 15).mean(axis=2).sum(axis=0) for weights in each], axis=0)
            np.testing.assert_allclose(mine[layer]["mass"][:15], by_head.T, atol=1e-4)
            readers = len(each) * (15 - np.arange(15))
            np.testing.assert_array_equal(mine[layer]["readers"][:15], readers[:, None].repeat(2, axis=1))


@pytest.mark.parametrize("method", ["snapkv", "rkv", "tova"])
def test_the_last_queries_are_those_of_the_last_layer_that_reads(method):
    """Not the layers' in turn, of which a window would hold a few tokens less."""
    window = 1 if method == "tova" else 3
    logs, found = recorded("yoco", TOKENS), noted("yoco", method, TOKENS)
    for row, mine in enumerate(found):
        last = logs[1]["queries"][-1][row, -window:] / np.sqrt(8)
        np.testing.assert_allclose(mine[1]["queries"], last, atol=1e-4)
        assert mine[1]["count"] == window


def test_every_method_that_keeps_queries_says_whose():
    """A method whose statistics are the last queries would mix those of several layers."""
    for name, kind in COMPRESSIONS.items():
        keeps = kind.uses_readers and not kind.weighs and name not in ("expected", "kvzip", "oracle")
        assert kind.of_last_layer == keeps, name
