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


@pytest.mark.parametrize("scaling", [(), (4.0,), (8.0, 1.0, 4.0, 32.0), (8.0, 0.5, 4.0, 32.0, 1.4)])
def test_queries_that_were_turned_are_known_as_they_were(scaling):
    """YaRN makes them longer, too."""
    queries = jax.random.normal(jax.random.key(0), (2, 5, 3, 16))
    positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) * 7
    turned = rotate(queries, *rotary_angles(positions, 12, 100.0, scaling))
    longer = scaling[4] if len(scaling) == 5 else 1.0
    lengths = np.linalg.norm(turned[..., :12], axis=-1), np.linalg.norm(queries[..., :12], axis=-1)
    np.testing.assert_allclose(lengths[0], longer * lengths[1], rtol=1e-5)
    readers = Readers(3, rotary=Rotary(12, 100.0, scaling))
    seen = Attended(turned, positions, positions, jnp.ones((2, 5), bool), None, readers)
    np.testing.assert_allclose(unrotated(seen), queries, atol=1e-5)


@pytest.mark.parametrize("scaling", [[8.0, 4.0], [8.0, 4.0, 1.0, 32.0, 1.0], [1.0] * 6])
def test_what_is_no_stretching_is_refused(scaling):
    with pytest.raises(ConfigError, match=r"rope_scaling = .*: must be \[\], \[factor\] or"):
        AttentionConfig(rope_scaling=tuple(scaling))


def test_yarn_wants_frequencies_that_differ():
    with pytest.raises(ConfigError, match=r"rope_base = 1.0: must be above 1 for YaRN"):
        AttentionConfig(rope_base=1.0, rope_scaling=(8.0, 1.0, 4.0, 32.0, 1.0))
