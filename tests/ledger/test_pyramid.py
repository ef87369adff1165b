"""Budgets dealt to layers: PyramidKV's line in whole slots, of a fixed sum, and what a ledger must know of it."""

import itertools

import pytest

from kvlab.ledger.pyramid import Pyramid, shares
from kvlab.ledger.retention import Retention

CASES = list(itertools.product((0, 1, 5, 37, 256), (1, 40, 300, 10**6), (1, 2, 3, 7, 32), (1, 2, 20, 1000)))


@pytest.mark.parametrize(("mean", "most", "num_layers", "beta"), CASES)
def test_whole_slots_of_a_fixed_sum_that_never_rise(mean, most, num_layers, beta):
    counts = shares(mean, most, num_layers, beta)
    assert sum(counts) == num_layers * mean
    assert list(counts) == sorted(counts, reverse=True)
    assert all(0 <= count <= max(mean, most) for count in counts)


def test_the_papers_line():
    """With s = mean / beta in the last layer and 2 * mean - s in the first, every layer is within a slot of the line
    between them; where the first would hold more than there is, the rest goes to the last."""
    for mean, num_layers, beta in ((256, 32, 20), (100, 7, 5)):
        last = mean / beta
        first = 2 * mean - last
        line = [first + (last - first) * layer / (num_layers - 1) for layer in range(num_layers)]
        assert max(abs(a - b) for a, b in zip(shares(mean, 10**6, num_layers, beta), line, strict=True)) < 1
    assert shares(100, 150, 3, 20) == (150, 100, 50)
    assert shares(100, 90, 3, 20) == (100, 100, 100)
    assert shares(4, 100, 3, 1) == (4, 4, 4)


def retentions(num_layers: int, beta: int = 20, **fields) -> list[Retention]:
    """The retention of every layer."""
    return [Retention(pyramid=Pyramid(layer, num_layers, beta), **fields) for layer in range(num_layers)]


@pytest.mark.parametrize("fields", [{"slots": 24, "protected": 6}, {"fraction": 0.3, "protected": 6}, {"slots": 3}])
def test_layers_hold_what_they_would_uniformly(fields):
    for prompt_len in (1, 5, 24, 30, 61, 200):
        uniform = Retention(**fields).keep(prompt_len)
        counts = [layer.keep(prompt_len) for layer in retentions(5, **fields)]
        assert sum(counts) == 5 * uniform
        assert min(counts) >= max(1, fields.get("protected", 0))


@pytest.mark.parametrize("fields", [{"slots": 24}, {"slots": 24, "protected": 6}, {"fraction": 0.4, "protected": 3}])
@pytest.mark.parametrize("beta", [1, 3, 20])
def test_the_most_of_any_prompt_bounds_all(fields, beta):
    """Against every prompt in turn: of a short prompt the last layers keep more than of a long one. The bound is no
    more than what a layer may hold uniformly, or than what the longest prompt gives it."""
    for layer in retentions(5, beta, at="chunks", chunk_len=4, every=2, **fields):
        for max_len in (7, 33, 80):
            kept = max(layer.keep(prompt_len) for prompt_len in range(1, max_len + 1))
            bound = layer.most_of_any(max_len, 4)
            uniform = Retention(**fields).keep(max_len)
            assert min(max_len, kept + 4) <= bound <= min(max_len, max(kept, uniform) + 4)


@pytest.mark.parametrize(("layer", "beta", "reason"), [(3, 20, "layer = 3: must be in"), (0, 0, "beta = 0: must be")])
def test_a_pyramid_says_what_is_legal(layer, beta, reason):
    with pytest.raises(ValueError, match=reason):
        Pyramid(layer, 3, beta)
