"""Bigrams that came before, against a search through all of what came before."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from kvlab.tasks.bigrams import BigramCounts, repeats


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 40, 50_000])
def test_repeats_against_a_search(vocab_size):
    rng = np.random.default_rng(vocab_size)
    seen = set()
    for num_rows, seq_len, num_labels in ((3, 17, 17), (1, 2, 1), (4, 1, 1), (2, 60, 9)):
        whole = rng.integers(0, vocab_size, (num_rows, seq_len + 1)).astype(np.int32)
        tokens = whole[:, :-1]
        positions = rng.permuted(np.tile(np.arange(seq_len), (num_rows, 1)), axis=1)[:, :num_labels]
        found = repeats(tokens, positions, np.take_along_axis(whole, positions + 1, axis=1))
        for row in range(num_rows):
            for label, position in enumerate(positions[row]):
                text = whole[row].tolist()
                before = list(pairwise(text[: position + 1]))  # up to the token there, and not its label
                assert found[row, label] == ((text[position], text[position + 1]) in before)
        seen |= set(found.ravel().tolist())
    assert (True in seen, False in seen) == (vocab_size <= 5, True) or vocab_size == 40


def test_the_third_a_is_a_repeat_and_rows_are_apart():
    tokens = np.array([[1, 1, 1], [1, 1, 2]])
    found = repeats(tokens, np.array([[0, 1, 2], [0, 1, 2]]), np.array([[1, 1, 1], [1, 2, 1]]))
    assert found.tolist() == [[False, True, True], [False, False, False]]


def test_counts_against_a_counter():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 9, 200).astype(np.uint8)
    counts, expected = BigramCounts.of(text, 10), Counter(pairwise(text.tolist()))
    first, second = (each.ravel().astype(np.uint8) for each in np.meshgrid(np.arange(10), np.arange(10)))
    assert counts(first, second).tolist() == [
        expected[pair] for pair in zip(first.tolist(), second.tolist(), strict=True)
    ]
