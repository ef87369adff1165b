"""The indexed mixer against a float64 rewrite of its formula: what it selects, what it computes, how it is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.memory.views import whole
from kvlab.mixers.indexed import Indexed, IndexedConfig
from kvlab.schema import ConfigError
from tests.mixers.test_attention import formula, rotary_matrix

NUM_TOKENS = 13
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "index_dim": 6}


def built(**fields) -> tuple[Indexed, np.ndarray]:
    """A layer of which no weight is small, and inputs."""
    layer = Indexed(IndexedConfig(**{**SMALL, **fields}), 16, dtype="float32", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for leaf in jax.tree.leaves(nnx.state(layer), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        leaf[...] = leaf[...] + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)
    return layer, rng.standard_normal((NUM_TOKENS, 16))


def run(layer: Indexed, x: np.ndarray, progress: float | None = None):
    """Outputs [T, E] of one sequence, and the view afterwards."""
    share = None if progress is None else jnp.asarray(progress, jnp.float32)
    (memory,) = whole([layer.states()], 1, len(x), share)
    y, after = layer(jnp.asarray(x, jnp.float32)[None], jnp.arange(len(x), dtype=jnp.int32)[None], memory)
    return np.asarray(y[0]), after["kv"]


def weight(layer: Indexed, name: str) -> np.ndarray:
    return np.asarray(getattr(layer, name).kernel[...], np.float64)


def turned(x: np.ndarray, rotary_dim: int) -> np.ndarray:
    """Rows at positions 0, 1, ... through the explicit rotation."""
    return np.stack([row @ rotary_matrix(t, x.shape[-1], rotary_dim, 10_000.0).T for t, row in enumerate(x)])


def index_scores(layer: Indexed, x: np.ndarray) -> np.ndarray:
    """I [T, S], from the published formula."""
    config = layer.config
    keys = x @ weight(layer, "index_key")
    keys = (keys - keys.mean(1, keepdims=True)) / np.sqrt(keys.var(1, keepdims=True) + 1e-6)
    keys = keys * np.asarray(layer.index_norm.scale[...]) + np.asarray(layer.index_norm.bias[...])
    queries = (x @ weight(layer, "index_query")).reshape(len(x), config.index_heads, -1)
    if config.index_rotary_dim:
        keys = turned(keys, config.index_rotary_dim)
        queries = turned(queries, config.index_rotary_dim)
    weights = x @ weight(layer, "index_weight") / np.sqrt(config.index_heads * config.index_dim)
    return np.einsum("tj,tjs->ts", weights, np.maximum(queries @ keys.T, 0))


def read_by(config: IndexedConfig, scores: np.ndarray) -> list[list[int]]:
    """Which tokens each query attends to."""
    found = []
    for t in range(len(scores)):
        if not config.index_block:
            found.append(sorted(range(t + 1), key=lambda p: (-scores[t, p], -p))[: config.num_selected])
            continue
        size, own = config.index_block, t // config.index_block
        best = [scores[t, b * size : min(t + 1, (b + 1) * size)].max() for b in range(own + 1)]
        order = sorted(range(own + 1), key=lambda b: (b not in (0, own), -best[b], -b))
        taken = order[: config.num_selected // size]
        found.append([p for p in range(t + 1) if p // size in taken])
    return found


def attention_weights(layer: Indexed, x: np.ndarray, read: list[list[int]]) -> np.ndarray:
    """[H, T, S] over what is read."""
    config = layer.config
    heads = {name: (x @ weight(layer, name)).reshape(len(x), -1, 8) for name in ("query", "key")}
    heads = {name: turned(rows, config.rotary_dim) if config.rope else rows for name, rows in heads.items()}
    found = np.zeros((config.num_heads, len(x), len(x)))
    for head, t in np.ndindex(config.num_heads, len(x)):
        kv = head // (config.num_heads // config.num_kv_heads)
        scores = heads["key"][read[t], kv] @ heads["query"][t, head] / np.sqrt(8)
        found[head, t, read[t]] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return found


def outputs(layer: Indexed, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    values = (x @ weight(layer, "value")).reshape(len(x), -1, 8)
    group = layer.config.num_heads // layer.config.num_kv_heads
    by_head = np.stack([weights[head] @ values[:, head // group] for head in range(len(weights))], axis=1)
    return by_head.reshape(len(x), -1) @ weight(layer, "out")


FIELDS = [
    {"num_selected": 4, "index_heads": 4},
    {"num_selected": 3, "index_heads": 1, "index_rope_fraction": 1.0},  # one head: many scores are zero
    {"num_selected": 5, "index_heads": 2, "rope": False, "num_kv_heads": 4},
    {"num_selected": 9, "index_heads": 2, "index_block": 3},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_equals_the_formula(fields):
    layer, x = built(**fields)
    scores = index_scores(layer, x)
    expected = outputs(layer, x, attention_weights(layer, x, read_by(layer.config, scores)))
    np.testing.assert_allclose(run(layer, x)[0], expected, atol=1e-4)


def test_with_room_for_all_it_is_attention():
    layer, x = built(num_selected=NUM_TOKENS)
    np.testing.assert_allclose(run(layer, x)[0], formula(layer, layer.config, x), atol=1e-4)


def test_one_index_head_ties_and_later_tokens_change_nothing():
    layer, x = built(num_selected=3, index_heads=1)
    scores = index_scores(layer, x)
    ties = [t for t in range(4, NUM_TOKENS) if (scores[t, : t + 1] == 0).sum() > 1]
    assert len(ties) > 2
    complete, _ = run(layer, x)
    for length in (4, 7, 12):
        np.testing.assert_allclose(run(layer, x[:length])[0], complete[:length], atol=1e-5)


@pytest.mark.parametrize(("progress", "is_dense"), [(0.0, True), (0.49, True), (0.5, False), (0.9, False)])
@pytest.mark.parametrize("block", [0, 2])
def test_training_attends_densely_and_then_to_what_is_selected(progress, is_dense, block):
    """And its loss is the divergence from all heads' attention, over what was attended to."""
    layer, x = built(num_selected=4, index_block=block, dense_share=0.5, index_loss=0.25)
    scores = index_scores(layer, x)
    read = [list(range(t + 1)) for t in range(NUM_TOKENS)] if is_dense else read_by(layer.config, scores)
    weights = attention_weights(layer, x, read)
    y, view = run(layer, x, progress)
    np.testing.assert_allclose(y, outputs(layer, x, weights), atol=1e-4)
    target, divergences = weights.mean(axis=0), []
    for t in range(NUM_TOKENS):
        guess = np.exp(scores[t, read[t]] - scores[t, read[t]].max())
        guess, wanted = guess / guess.sum(), target[t, read[t]]
        divergences.append((wanted * np.log(wanted / guess)).sum())
    assert float(view.loss) == pytest.approx(0.25 * np.mean(divergences), rel=1e-4)
    assert run(layer, x)[1].loss is None


def test_the_loss_beside_trains_the_indexer_and_nothing_else_does():
    layer, x = built(num_selected=4)
    structure, params = nnx.split(layer)

    def losses(params):
        y, view = _traced(nnx.merge(structure, params), x)
        return (y**2).sum(), view.loss

    of_outputs = jax.grad(lambda params: losses(params)[0])(params)
    beside = jax.grad(lambda params: losses(params)[1])(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(beside):
        name = jax.tree_util.keystr(path)
        is_index = "index_" in name
        assert bool((leaf != 0).any()) == is_index, name
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_outputs):
        name = jax.tree_util.keystr(path)
        assert bool((leaf != 0).any()) == ("index_" not in name), name


def _traced(layer, x):
    (memory,) = whole([layer.states()], 1, len(x), jnp.asarray(0.9, jnp.float32))
    y, after = layer(jnp.asarray(x, jnp.float32)[None], jnp.arange(len(x), dtype=jnp.int32)[None], memory)
    return y, after["kv"]


def test_gradients_of_the_divergence_agree_with_finite_differences():
    """Along the gradient itself, where the slope is its length."""
    layer, x = built(num_selected=4, dense_share=1.0)
    structure, params = nnx.split(layer)

    def loss(params):
        return _traced(nnx.merge(structure, params), x)[1].loss

    grads = jax.grad(loss)(params)
    length = float(jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads))))
    ends = [
        float(loss(jax.tree.map(lambda leaf, slope, way=way: leaf + way * slope / length, params, grads)))
        for way in (1e-3, -1e-3)
    ]
    assert length == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 4}, "window = 4: must be null: the indexer says what is read"),
        ({"num_selected": 6, "index_block": 4}, "num_selected = 6: must be a multiple of index_block = 4, and at le"),
        (
            {"num_selected": 4, "index_block": 4},
            "num_selected = 4: must be a multiple of index_block = 4, and at least 8",
        ),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError) as caught:
        IndexedConfig(**fields)
    assert message in str(caught.value)
