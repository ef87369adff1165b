"""Models that run layer by layer, and what is watched or changed in them, against the whole programs and numpy."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compose import compose
from kvlab.evaluation.layerwise import Blockwise, LayerwiseCheck, LayerwiseStep, layers_of, nats
from kvlab.evaluation.rounding import Rounding, _RoundedTokens, as_rounded, rounded, turning
from kvlab.evaluation.score import Scorer
from kvlab.evaluation.sinks import sink_shares
from kvlab.lab.laboratory import Laboratory
from kvlab.ledger.states import TokenState
from kvlab.memory.layout import MemoryConfig
from kvlab.memory.views import view_of
from kvlab.random import named_key
from kvlab.schema import ConfigError
from pallas_kernels.formats import Scheme
from tests.evaluation.test_page_recall import Recording

MEMORIES = {
    "full": {},
    "kivi4": {"format": "kivi4", "page_size": 8, "residual": 5},
    "streaming": {"compression": {"type": "streaming", "sinks": 2}, "budget": 12},
    "h2o": {"compression": {"type": "h2o", "sinks": 1, "recent": 4}, "budget": 20},
}


@pytest.fixture(scope="module")
def laboratory():
    words = ["mixer=gqa", "task.num_test=2", "measure.batch_size=2", "task.test=[64:16]", "model.num_layers=2"]
    return Laboratory.of(compose(words))


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_layers_apart_score_as_the_whole_program(laboratory, memory):
    settings = MemoryConfig(chunk_len=8, **memory)
    layout = replace(laboratory, config=replace(laboratory.config, memory=settings)).layout(64, 2)
    model, blockwise = laboratory.model, Blockwise(laboratory.model)
    scorer = Scorer(model.structure, laboratory.task, named_key(0, "eval"), 2)
    (whole,) = scorer.through_memory(model.params, "test", layout)
    check, step = LayerwiseCheck(blockwise, layout), LayerwiseStep(model.structure, layout, blockwise)
    (apart,) = scorer.through_memory(model.params, "test", layout, check, step=step)
    np.testing.assert_allclose(apart.examples.nll, whole.examples.nll, rtol=1e-5)
    assert check.num_compared == 32
    assert check.worst < 1e-5


def test_nats_are_those_of_the_parallel_form(laboratory):
    tokens = np.random.default_rng(0).integers(0, 64, (2, 300)).astype(np.int32)
    model = laboratory.model.merge()
    logits = np.asarray(model.logits(model.parallel(jnp.asarray(tokens[:, :-1]))), np.float64)[:, -290:]
    labels = tokens[:, -290:]
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    blockwise = Blockwise(laboratory.model)
    hidden, _ = layers_of(blockwise, tokens[:, :-1], lambda layer, state, view: view)
    np.testing.assert_allclose(nats(blockwise, hidden, labels), expected, atol=1e-4)
    plain = rounded(blockwise, tokens, 290, Rounding(None, None))
    assert plain.perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-4)
    assert not plain.key_errors.any()


def test_what_goes_to_the_first_token(laboratory):
    tokens, seen = np.random.default_rng(1).integers(0, 64, (2, 20)).astype(np.int32), []
    model = laboratory.model.merge()
    starts, counts = jnp.zeros(2, jnp.int32), jnp.full(2, 20, jnp.int32)
    memory = [
        {
            name: Recording(view, seen) if isinstance(state, TokenState) else view
            for name, state in states.items()
            for view in [view_of(state, "whole").of(state, {}, None, starts, counts)]
        }
        for states in model.states()
    ]
    model.hidden(jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(20, dtype=jnp.int32), (2, 20)), memory)
    found = sink_shares(Blockwise(laboratory.model), tokens, 7)
    assert len(seen) == len(found) == 2
    for mine, (queries, keys, _) in zip(found, seen, strict=True):
        shares = np.zeros((2, 13, queries.shape[2]))
        for b, t, h in np.ndindex(shares.shape):
            head = h // (queries.shape[2] // keys.shape[2])
            scores = keys[b, : t + 8, head] @ queries[b, t + 7, h] * keys.shape[-1] ** -0.5
            weights = np.exp(scores - scores.max())
            shares[b, t, h] = weights[0] / weights.sum()
        np.testing.assert_allclose(mine, shares.mean(axis=(0, 1)), atol=1e-5)
    with pytest.raises(ConfigError, match=r"first = 20: must be in \[1, 19\]"):
        sink_shares(Blockwise(laboratory.model), tokens, 20)


def plainly_rounded(x, bits, axis, page, group):
    """[T, D] in float64: asymmetric, by channel in pages of tokens, or by token in groups of channels."""
    out = x.copy()
    for t in range(0, len(x), page):
        for d in range(0, x.shape[1], group):
            for part in (
                [(slice(t, t + page), slice(c, c + 1)) for c in range(d, d + group)]
                if axis == "channel"
                else [(slice(i, i + 1), slice(d, d + group)) for i in range(t, min(t + page, len(x)))]
            ):
                least, most = x[part].min(), x[part].max()
                step = (most - least) / (2**bits - 1)
                out[part] = np.round((x[part] - least) / step) * step + least
    return out


@pytest.mark.parametrize("residual", [0, 5])
@pytest.mark.parametrize("axes", [("channel", "token"), ("token", "channel")])
def test_attention_to_rounded_tokens(axes, residual):
    """Queries read what is older than the residual rounded, what is newer as it is: query by query in float64."""
    rng, bits, page, group, num_tokens, dim = np.random.default_rng(2), 2, 8, 4, 21, 8
    queries, keys, values = (rng.normal(size=(1, num_tokens, heads, dim)) for heads in (4, 2, 2))

    def scheme(axis):
        return Scheme("int2", axis, group if axis == "token" else None, has_zeros=True)

    state = TokenState(2, dim, dim, "float32")
    whole = view_of(state, "whole").of(state, {}, None, jnp.zeros(1, jnp.int32), jnp.full(1, num_tokens, jnp.int32))
    view = _RoundedTokens(whole, Rounding(scheme(axes[0]), scheme(axes[1]), page, residual))
    positions = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    given = (jnp.asarray(each, jnp.float32) for each in (keys, values))
    view = view.append(**dict(zip(("keys", "values"), given, strict=True)))
    outputs, after = view.attend(jnp.asarray(queries, jnp.float32), positions)
    for head in range(4):
        exact = keys[0, :, head // 2], values[0, :, head // 2]
        far = [plainly_rounded(each, bits, axis, page, group) for each, axis in zip(exact, axes, strict=True)]
        for t in range(num_tokens):
            is_near = (t - np.arange(t + 1) < residual)[:, None]
            k, v = (np.where(is_near, near[: t + 1], old[: t + 1]) for near, old in zip(exact, far, strict=True))
            weights = np.exp(k @ queries[0, t, head] * dim**-0.5)
            np.testing.assert_allclose(outputs[0, t, head], weights @ v / weights.sum(), atol=1e-4)
    assert 0 < float(after.errors[0]) < 1


def test_a_rotation_is_undone():
    turn = np.asarray(turning(16), np.float64)
    np.testing.assert_allclose(turn @ turn.T, np.eye(16), atol=1e-6)
    tokens = jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, 9, 16)), jnp.float32)
    given = as_rounded(tokens, Scheme("int4", "token", has_zeros=True), 4, turning(16))
    error = np.linalg.norm(given - tokens) / np.linalg.norm(tokens)
    assert 0.01 < error < 0.15
    with pytest.raises(ConfigError, match="head_dim = 12: must be a power of two"):
        turning(12)
