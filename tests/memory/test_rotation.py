"""Keys and values that are turned before they are rounded: exact where nothing is rounded, undone everywhere, and what
it does to the error of each way of quantising."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.ledger.states import LatentState, RecurrentState, RetrievalState, TokenState
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.pools import as_stored, write_tokens
from kvlab.memory.rotation import turn, turned, turned_back
from kvlab.memory.views import view_of
from kvlab.memory.views.weights import gathered
from kvlab.schema import ConfigError
from pallas_kernels.formats import Scheme, quantised

PLAIN = TokenState(2, 8, 4)


@pytest.mark.parametrize("dim", [2, 4, 12, 64, 80, 96, 128])
def test_a_turn_keeps_lengths_and_spreads_one_channel_over_its_block(dim):
    """Against the definition, in float64: orthogonal, and a single channel becomes equal magnitudes over the largest
    power of two that divides the dim."""
    matrix, block = turn(dim).astype(np.float64), dim & -dim
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-6)
    for channel in range(dim):
        first = channel // block * block
        expected = np.zeros(dim)
        expected[first : first + block] = block**-0.5
        np.testing.assert_allclose(np.abs(matrix[channel]), expected, atol=1e-6)
    if dim > 4:
        assert len({tuple(np.sign(row)) for row in matrix[:block, :block]}) == block
        assert (np.sign(matrix[:, 0]) < 0).any(), "signs are random"


def test_scores_and_outputs_are_those_of_what_was_not_turned():
    state = PLAIN.stored("rotated8")
    keys, queries, values = (np.random.default_rng(n).standard_normal((5, d)) for n, d in ((0, 8), (1, 8), (2, 4)))
    scores = np.asarray(turned(state, jnp.asarray(queries))) @ np.asarray(turned(state, jnp.asarray(keys))).T
    np.testing.assert_allclose(scores, queries @ keys.T, atol=1e-5)
    outputs = turned_back(state, jnp.asarray(scores @ np.asarray(turned(state, jnp.asarray(values)))))
    np.testing.assert_allclose(np.asarray(outputs), queries @ keys.T @ values, atol=1e-4)
    assert turned(PLAIN.stored("int8"), keys) is keys, "exact where it is off"


@pytest.mark.parametrize("format", ["rotated8", "rotated4"])
def test_what_is_stored_is_what_rounding_the_turned_tokens_gives(format):
    """Pages hold the rounded turn; everybody who reads them finds keys as the mixer knows them."""
    state, number = PLAIN.stored(format), {"rotated8": "int8", "rotated4": "int4"}[format]
    pool = view_of(state, "paged").allocate(state, 3, 4)
    rows = {name: jax.random.normal(jax.random.key(dim), (1, 4, 2, dim)) for name, dim in (("keys", 8), ("values", 4))}
    slots = jnp.arange(4, dtype=jnp.int32)[None] + 4
    pool = write_tokens(state, pool, slots, rows)
    for name, array in rows.items():
        exact = np.asarray(array, np.float64)[0]
        matrix = turn(array.shape[-1]).astype(np.float64)
        largest = np.abs(exact @ matrix).max(axis=-1, keepdims=True)
        scale = largest / {"int8": 127, "int4": 7}[number]
        expected = np.round(exact @ matrix / scale) * scale @ matrix.T
        found = np.asarray(gathered(state, pool, name, jnp.array([[1]])))[0].swapaxes(0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(np.asarray(as_stored(state, name, array))[0], expected, atol=1e-5)


def test_what_is_not_turned_is_refused_by_name():
    for state in (LatentState(4, 2), RetrievalState(1, 4, 4, 2, 3)):
        with pytest.raises(ValueError, match=f"{type(state).__name__} is not rotated: only keys and values"):
            state.stored("rotated8")
    with pytest.raises(ValueError, match="key_dim = 7, value_dim = 4: must be even to be rotated"):
        TokenState(1, 7, 4).stored("rotated8")
    with pytest.raises(ConfigError, match=r"memory.format = 'rotated8': key_dim = 7.*; legal: model, int8, fp8$"):
        MemoryLayout.of([{"kv": TokenState(1, 7, 7)}], MemoryConfig(format="rotated8"), max_sequences=1, max_len=16)
    conv = RecurrentState(PLAIN.arrays)
    assert conv.stored("rotated4") is conv
    assert PLAIN.stored("rotated4").stored("model") == PLAIN
    assert PLAIN.stored("rotated4").unit_bytes == PLAIN.stored("int4").unit_bytes


# What METHODS' synthetic keys say of the axes: 256 keys of 64 dims, two channels shifted by `ratio` deviations.

WAYS = {
    "channel, page 16": (Scheme("int4", "channel", has_zeros=True), 16, False),
    "channel, page 32": (Scheme("int4", "channel", has_zeros=True), 32, False),
    "token, groups of 32": (Scheme("int4", "token", 32, has_zeros=True), 16, False),
    "token": (Scheme("int4", "token", has_zeros=True), 16, False),
    "token, rotated": (Scheme("int4", "token", has_zeros=True), 16, True),
}
RATIOS = (1, 4, 10, 30)


@functools.cache
def errors() -> dict[str, list[float]]:
    """Half the L1 distance of attention rows, by way of quantising and ratio: means over draws."""
    found = {name: [] for name in WAYS}
    for ratio in RATIOS:
        rows = dict.fromkeys(WAYS, 0.0)
        for seed in range(4):
            rng = np.random.default_rng(seed)
            keys, queries = rng.standard_normal((256, 64)), rng.standard_normal((64, 64))
            if ratio > 1:
                keys[:, [5, 40]] += ratio
            exact = _attention(queries, keys)
            for name, (scheme, page, is_rotated) in WAYS.items():
                matrix = turn(64).astype(np.float64) if is_rotated else np.eye(64)
                tiles = jnp.asarray((keys @ matrix).reshape(-1, page, 64), jnp.float32)
                rounded = np.asarray(quantised(tiles, scheme).values(), np.float64).reshape(256, 64) @ matrix.T
                rows[name] += np.abs(_attention(queries, rounded) - exact).sum(axis=1).mean() / 2 / 4
        for name, error in rows.items():
            found[name].append(error)
    return found


def _attention(queries, keys):
    scores = queries @ keys.T / 8
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def test_by_channel_the_error_does_not_depend_on_outliers():
    for name in ("channel, page 16", "channel, page 32"):
        assert max(errors()[name]) < 1.1 * min(errors()[name]), errors()[name]


def test_by_token_it_grows_with_them():
    for name in ("token", "token, groups of 32"):
        assert all(after > 1.3 * before for before, after in zip(errors()[name], errors()[name][1:], strict=False))
        assert errors()[name][-1] > 5 * errors()[name][0]


def test_rotation_lies_between():
    by_channel, by_token, rotated = (errors()[name] for name in ("channel, page 16", "token", "token, rotated"))
    assert all(low < mid < high for low, mid, high in zip(by_channel[1:], rotated[1:], by_token[1:], strict=True))
    assert abs(rotated[0] - by_token[0]) < 0.1 * by_token[0], "without outliers it does nothing"


def test_without_outliers_the_axes_tie_at_equal_group_size():
    pages, groups = errors()["channel, page 32"][0], errors()["token, groups of 32"][0]
    assert abs(pages - groups) < 0.1 * pages
