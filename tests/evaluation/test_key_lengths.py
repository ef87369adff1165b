"""Whether a model attends to short keys or to long ones, against float64 and against attention made to do either."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.evaluation.key_lengths import KeyLengths, correlation_of, key_lengths, knorm_keep
from kvlab.ledger.states import TokenState
from tests.compression.driven import tokens_of, true_weights
from tests.contracts import VOCAB, build


def spearman(x, y):
    """By its definition, of numbers that are all different."""
    ranks = [np.argsort(np.argsort(each)) for each in (x, y)]
    return np.corrcoef(ranks[0], ranks[1])[0, 1]


def halves(num_tokens=24, sign=1.0):
    """One head whose queries all point along the first axis, and keys along it of lengths that are attended to most
    where they are longest (sign 1) or shortest (-1)."""
    lengths = np.random.default_rng(0).uniform(0.5, 3, num_tokens)
    keys = np.zeros((1, num_tokens, 1, 4), np.float32)
    keys[0, :, 0, 0] = sign * lengths
    queries = np.zeros_like(keys)
    queries[..., 0] = 2
    return jnp.asarray(queries), jnp.asarray(keys)


@pytest.mark.parametrize(("sign", "keep"), [(1.0, "long"), (-1.0, "short")])
def test_attention_made_to_prefer_either(sign, keep):
    found = correlation_of(TokenState(1, 4, 4), *halves(sign=sign))
    np.testing.assert_allclose(found, sign, atol=1e-6)
    assert knorm_keep([KeyLengths(0, 0, float(found[0, 0]))]) == keep


def test_every_head_of_a_model_against_float64():
    """No token comes twice: two keys of the first layer would be of the same length, to rounding."""
    _, structure, params, _ = build("norms_cap_bias")
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.permutation(VOCAB)[:26] for _ in range(2)]).astype(np.int32)
    found = key_lengths(structure, params, jnp.asarray(tokens))
    assert [(each.layer, each.head) for each in found] == [(0, 0), (0, 1)]
    log: list[dict] = []
    (weights,) = true_weights("norms_cap_bias", tokens, log)
    half = tokens.shape[1] // 2
    for each in found:
        attention = weights[:, each.head, :, half:, :half].mean(axis=(1, 2))
        lengths = np.linalg.norm(log[0]["keys"][:, :half, each.head], axis=-1)
        wanted = np.mean([spearman(*row) for row in zip(attention, lengths, strict=True)])
        assert each.correlation == pytest.approx(wanted, abs=1e-5)
    assert abs(found[0].correlation) > 0.01


def test_what_cannot_be_measured_says_why():
    _, structure, params, _ = build("mamba2")
    with pytest.raises(ValueError, match="no layer of this model attends to everything"):
        key_lengths(structure, params, jnp.asarray(tokens_of()))
    with pytest.raises(ValueError, match="at least 8 tokens"):
        key_lengths(structure, params, jnp.zeros((1, 7), jnp.int32))
