"""What methods note and score, and what is chosen by it, against plain loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.schema import ConfigError
from kvlab.selection import SELECTIONS, Candidates, Selection, choose
from kvlab.selection.quest import Quest, outward

B, T, K, G, D, N, S = 2, 3, 2, 2, 5, 6, 4


@pytest.fixture(scope="module")
def drawn():
    """Queries, and keys of pages of which the last is used in part; what is not used is zero."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((B, N, K, S, D)).astype(np.float32)
    used = np.ones((B, N, S), bool)
    used[0, -1, 1:] = used[1, -1, 3:] = False
    keys *= used[:, :, None, :, None]
    return rng.standard_normal((B, T, K, G, D)).astype(np.float32), keys, used


def candidates(queries, keys, used, method, dtype=jnp.float32, weigh=None, layer=0):
    index = method.note(jnp.asarray(keys), jnp.asarray(used), dtype) if method.arrays(K, D, "float32") else {}
    index = {name: array.astype(jnp.float32) for name, array in index.items()}
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    numbers = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
    return Candidates(jnp.asarray(queries), positions, index, numbers, layer, weigh)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_bound_is_one_and_is_what_was_published(drawn, dtype):
    queries, keys, used = drawn
    found = np.asarray(Quest(group="max").score(candidates(queries, keys, used, Quest(), dtype)))
    for b, t, k, n in np.ndindex(B, T, K, N):
        mine = keys[b, n, k][used[b, n]].astype(np.float64)
        asked = queries[b, t, k].astype(np.float64)
        assert found[b, t, k, n] >= (asked @ mine.T).max() - 1e-5
        if dtype == jnp.float32:
            bound = np.maximum(asked * mine.min(0), asked * mine.max(0)).sum(axis=1)
            assert found[b, t, k, n] == pytest.approx(bound.max(), abs=1e-5)


def test_bounds_are_rounded_outwards():
    values = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    values = np.concatenate([values, [0.0, 1.0, -1.0]]).astype(np.float32)
    up, down = (np.asarray(outward(jnp.asarray(values), jnp.bfloat16, to), np.float32) for to in (np.inf, -np.inf))
    assert (down <= values).all()
    assert (values <= up).all()
    assert (up - down <= np.abs(values) * 2.0**-7 + 1e-38).all()
    assert (up[-3:] == values[-3:]).all()


def test_means_over_slots_and_over_groups(drawn):
    queries, keys, used = drawn
    found = {
        group: np.asarray(
            SELECTIONS["mean_key"](group=group).score(candidates(queries, keys, used, SELECTIONS["mean_key"]()))
        )
        for group in ("max", "mean")
    }
    bounds = np.asarray(Quest(group="mean").score(candidates(queries, keys, used, Quest())))
    for b, t, k, n in np.ndindex(B, T, K, N):
        mine, asked = keys[b, n, k][used[b, n]].astype(np.float64), queries[b, t, k].astype(np.float64)
        products = asked @ mine.mean(axis=0)
        assert found["max"][b, t, k, n] == pytest.approx(products.max(), abs=1e-5)
        assert found["mean"][b, t, k, n] == pytest.approx(products.mean(), abs=1e-5)
        bound = np.maximum(asked * mine.min(0), asked * mine.max(0)).sum(axis=1)
        assert bounds[b, t, k, n] == pytest.approx(bound.mean(), abs=1e-5)


def brute_force(scores, numbers, newest, count, first, last):
    """Entries of one query and head that are read, by sorting tuples."""
    may = [n for n in range(len(numbers)) if numbers[n] <= newest]
    always = [n for n in may if numbers[n] < first or numbers[n] > newest - last]
    clean = {n: -np.inf if np.isnan(scores[n]) else scores[n] for n in may}
    rest = sorted((n for n in may if n not in always), key=lambda n: (clean[n], numbers[n]), reverse=True)
    always.sort(key=lambda n: numbers[n], reverse=True)
    return sorted([*always, *rest][:count])


@pytest.mark.parametrize("seed", range(3))
def test_what_is_chosen(seed):
    """Pages in any order, unused entries, scores that are equal, infinite and NaN, and counts beyond what there is."""
    rng = np.random.default_rng(seed)
    numbers = np.stack([rng.permutation(N) for _ in range(B)]).astype(np.int32)
    numbers[0, :2] = 2**20  # unused
    newest = rng.integers(0, N, (B, T)).astype(np.int32)
    counts = rng.integers(1, N + 2, (B, T)).astype(np.int32)
    scores = rng.integers(0, 3, (B, T, K, N)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = np.nan
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    first, last = seed % 3, 1 + seed % 2
    chosen = choose(*map(jnp.asarray, (scores, numbers, newest, counts)), first=first, last=last)
    for b, t, k in np.ndindex(B, T, K):
        expected = brute_force(scores[b, t, k], numbers[b], newest[b, t], counts[b, t], first, last)
        assert np.flatnonzero(np.asarray(chosen.is_read[b, t, k])).tolist() == expected
        entries = np.asarray(chosen.entries[b, t, k])
        assert entries[: len(expected)].tolist() == expected
        assert (entries[len(expected) :] == N).all()


def test_the_oracle_and_the_controls(drawn):
    queries, keys, used = drawn
    mass = jax.nn.softmax(
        jnp.asarray(queries).sum(axis=-1)[..., None] * jnp.arange(N, dtype=jnp.float32)[None, None, None, None], axis=-1
    )
    asked = [
        candidates(queries, keys, used, SELECTIONS["random"](), weigh=lambda: mass, layer=layer) for layer in (0, 1)
    ]
    np.testing.assert_allclose(SELECTIONS["oracle"]().score(asked[0]), np.asarray(mass).sum(axis=3), rtol=1e-6)
    assert np.asarray(SELECTIONS["recency"]().score(asked[0]))[1, 2, 1].tolist() == list(range(N))
    drawn_by = {
        (layer, seed): np.asarray(SELECTIONS["random"](seed=seed).score(asked[layer]))
        for layer in (0, 1)
        for seed in (0, 1)
    }
    again = np.asarray(SELECTIONS["random"]().score(asked[0]))
    assert (again == drawn_by[0, 0]).all()
    assert (again[0] == again[1]).all()  # whoever shares the batch
    flat = [*(array[0].ravel() for array in drawn_by.values())]
    assert len(np.unique(np.round(np.concatenate(flat), 6))) == 4 * T * K * N  # layers, seeds, tokens, heads, pages


def test_every_method_is_registered_under_its_name_and_has_a_file():
    from kvlab.compose import RUN

    assert [method.name for method in SELECTIONS.values()] == list(SELECTIONS)
    assert {*SELECTIONS, "all"} == set(RUN.options("selection"))
    assert all(issubclass(method, Selection) for method in SELECTIONS.values())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pages": 1}, "pages = 1: must be at least 2, which first_pages = 1 and last_pages = 1 always read"),
        ({"fraction": 0.0}, "fraction = 0.0: must be a finite number in (0, 1]"),
        ({"last_pages": 0}, "last_pages = 0: must be an integer in"),
        ({"prefill": "half"}, "prefill = 'half': must be one of dense, sparse"),
        ({"group": "sum"}, "group = 'sum': must be one of max, mean"),
    ],
)
def test_wrong_fields(fields, sentence):
    with pytest.raises(ConfigError) as caught:
        Quest(**fields)
    assert str(caught.value).startswith(sentence)
