"""What is turned comes back, however far frequencies are stretched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compression.base import Attended
from kvlab.compression.expected import unrotated
from kvlab.ledger.readers import Readers, Rotary
from kvlab.mixers.attention import AttentionConfig
from kvlab.rotary import rotary_angles, rotate
from kvlab.schema import ConfigError

BETWEEN = (8.0, 0.5, 4.0, 32.0, 1.4, 1.0)


@pytest.mark.parametrize("scaling", [(), (4.0,), (8.0, 1.0, 4.0, 32.0), (8.0, 0.5, 4.0, 32.0, 1.4), BETWEEN])
def test_queries_that_were_turned_are_known_as_they_were(scaling):
    """YaRN makes them longer, too."""
    queries = jax.random.normal(jax.random.key(0), (2, 5, 3, 16))
    positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) * 7
    turned = rotate(queries, *rotary_angles(positions, 12, 100.0, scaling))
    longer = scaling[4] if len(scaling) >= 5 else 1.0
    lengths = np.linalg.norm(turned[..., :12], axis=-1), np.linalg.norm(queries[..., :12], axis=-1)
    np.testing.assert_allclose(lengths[0], longer * lengths[1], rtol=1e-5)
    readers = Readers(3, rotary=Rotary(12, 100.0, scaling))
    seen = Attended(turned, positions, positions, jnp.ones((2, 5), bool), None, readers)
    np.testing.assert_allclose(unrotated(seen), queries, atol=1e-5)


@pytest.mark.parametrize("scaling", [[8.0, 4.0], [8.0, 4.0, 1.0, 32.0, 1.0], [1.0] * 6, [*BETWEEN[:5], 2.0], [1.0] * 7])
def test_what_is_no_stretching_is_refused(scaling):
    with pytest.raises(ConfigError, match=r"rope_scaling = .*: must be \[\], \[factor\] or"):
        AttentionConfig(rope_scaling=tuple(scaling))


def test_yarn_wants_frequencies_that_differ():
    with pytest.raises(ConfigError, match=r"rope_base = 1.0: must be above 1 for YaRN"):
        AttentionConfig(rope_base=1.0, rope_scaling=(8.0, 1.0, 4.0, 32.0, 1.0))


def test_yarns_ramp_may_begin_and_end_between_pairs():
    """The share of pair i that is kept falls from 1 to 0 between the pairs that turn `high` and `low` times in
    original_len tokens: of base b and a head of d, d log(original_len / (2 pi turns)) / (2 log b)."""
    dim, base, (factor, low, high, original_len) = 16, 100.0, BETWEEN[:4]
    first, last = (dim * np.log(original_len / (2 * np.pi * turns)) / (2 * np.log(base)) for turns in (high, low))
    assert 0 < first < 1
    plain = base ** (-np.arange(0, dim, 2) / dim)
    kept = 1 - np.clip((np.arange(dim // 2) - first) / (last - first), 0, 1)
    one = jnp.ones((1, 1), jnp.int32)
    for scaling, expected in (
        (BETWEEN, kept),
        (BETWEEN[:5], 1 - np.clip((np.arange(dim // 2) - np.floor(first)) / (np.ceil(last) - np.floor(first)), 0, 1)),
    ):
        cos, sin = rotary_angles(one, dim, base, scaling)
        angles = np.arctan2(sin, cos)[0, 0, 0]
        np.testing.assert_allclose(angles, plain * (expected + (1 - expected) / factor), rtol=1e-5)
