"""Selecting by an index, against sorting: equal scores, zeros of both signs, NaN where nobody looks."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.memory.lightning import IndexQueries, index_scores, select, select_blocks


def test_scores_are_the_formula():
    rng = np.random.default_rng(0)
    queries, weights, index = (rng.standard_normal(shape) for shape in ((2, 5, 3, 4), (2, 5, 3), (2, 7, 4)))
    expected = np.einsum("btj,btjs->bts", weights, np.maximum(np.einsum("btji,bsi->btjs", queries, index), 0))
    asked = IndexQueries(jnp.asarray(queries, jnp.float32), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(index_scores(asked, jnp.asarray(index, jnp.float32)), expected, atol=1e-5)


@pytest.mark.parametrize("num_selected", [1, 2, 3, 7, 12, 20])
def test_of_equal_scores_the_newer_one_is_selected(num_selected):
    rng = np.random.default_rng(num_selected)
    scores = rng.integers(-1, 2, (3, 12, 12)).astype(np.float32)
    scores = np.where((scores == 0) & (rng.random(scores.shape) < 0.5), np.float32(-0.0), scores)
    seen = np.tril(np.ones((12, 12), bool)) & (rng.random((3, 12, 12)) < 0.8)
    hidden = np.where(seen, scores, np.nan)
    found = np.asarray(select(jnp.asarray(hidden), jnp.asarray(seen), num_selected))
    for row, t in np.ndindex(3, 12):
        order = sorted(np.flatnonzero(seen[row, t]), key=lambda p: (-scores[row, t, p], -p))
        assert set(np.flatnonzero(found[row, t])) == set(order[:num_selected])


@pytest.mark.parametrize(("num_selected", "block"), [(4, 2), (6, 3), (9, 3), (10, 5), (2, 1)])
def test_blocks_are_selected_by_their_best_token(num_selected, block):
    rng = np.random.default_rng(block)
    scores = rng.integers(-3, 1, (3, 13, 13)).astype(np.float32)
    seen = np.broadcast_to(np.tril(np.ones((13, 13), bool)), scores.shape)
    hidden = np.where(seen, scores, np.nan)
    found = np.asarray(select_blocks(jnp.asarray(hidden), jnp.asarray(seen), num_selected, block))
    for row, t in np.ndindex(3, 13):
        own = t // block
        best = [scores[row, t, b * block : min(t + 1, (b + 1) * block)].max() for b in range(own + 1)]
        others = sorted(range(1, own), key=lambda b: (-best[b], -b))
        taken = [*dict.fromkeys([0, own]), *others][: max(num_selected // block, 1)]
        assert set(np.flatnonzero(found[row, t])) == {p for p in range(t + 1) if p // block in taken}
