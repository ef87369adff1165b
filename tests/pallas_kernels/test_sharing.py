"""Sharing out pages and putting parts together: what every kernel relies on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import sharing

LISTS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
cut = jax.jit(sharing.split, static_argnums=(1, 2, 3))


@settings(max_examples=200, deadline=None)
@given(counts=LISTS, block_pages=st.sampled_from([1, 4]), num_pieces=st.sampled_from([1, 3, 8, 100]))
def test_pieces_cover_every_page_once_and_nearly_equally(counts, block_pages, num_pieces):
    counts += [0] * (12 - len(counts))  # one shape, so that it compiles once
    made = np.asarray(cut(jnp.array(counts, jnp.int32), block_pages, num_pieces, 40))
    covered = [[] for _ in counts]
    for item, begin, count in made.tolist():
        assert begin % block_pages == 0
        covered[item] += range(begin, begin + count)
    assert covered == [list(range(count)) for count in counts]
    if len(made) > len(counts):
        blocks = -(-np.array(counts) // block_pages)
        share = max(1, -(-int(blocks.sum()) // num_pieces))
        assert (-(-made[:, 2] // block_pages)).max() <= share + share // sharing.LONGER
        assert (np.diff(made[:, 0]) >= 0).all(), "merging relies on the order"


def test_lists_that_are_hardly_longer_than_a_share_stay_whole():
    made = np.asarray(cut(jnp.full(32, 64, jnp.int32), 1, 33, 64))  # whose share is 63 blocks
    assert made[:32].tolist() == [[item, 0, 64] for item in range(32)]
    assert not made[32:, 2].any()


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 6), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_parts_merge_to_the_softmax_over_all(cuts, seed):
    """One list of 6 scores cut at random places; empty pieces hold NaN, which nobody reads."""
    rng = np.random.default_rng(seed)
    scores, values = 30 * rng.standard_normal(6), rng.standard_normal((6, 4))
    edges = [0, *sorted(cuts), 6]
    outputs, sums, made = [], [], []
    for begin, end in itertools.pairwise(edges):
        made.append([0, begin, end - begin])
        weights = np.exp(scores[begin:end] - scores.max())
        empty = begin == end
        outputs.append(np.full(4, np.nan) if empty else weights @ values[begin:end] / weights.sum())
        sums.append(np.nan if empty else np.log(weights.sum()) + scores.max())
    merged, log_sum_exp = sharing.merge(
        jnp.array(outputs, jnp.float32)[:, None, None],
        jnp.array(sums, jnp.float32)[:, None, None],
        jnp.array(made, jnp.int32),
        1,
    )
    weights = np.exp(scores - scores.max())
    np.testing.assert_allclose(merged[0, 0, 0], weights @ values / weights.sum(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_sum_exp[0, 0, 0], np.log(weights.sum()) + scores.max(), rtol=1e-6)


def test_lists_of_nothing_give_nothing():
    made = cut(jnp.zeros(3, jnp.int32), 1, 4, 8)
    assert not made[:, 2].any()
    outputs = jnp.full((len(made), 1, 1, 2), jnp.nan)
    merged, log_sum_exp = sharing.merge(outputs, outputs[..., 0], made, 3)
    assert not merged.any()
    assert (log_sum_exp == -jnp.inf).all()
