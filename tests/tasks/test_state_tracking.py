"""State tracking against permutations that are applied one by one."""

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.random import named_key
from kvlab.schema import ConfigError
from kvlab.tasks.state_tracking import GROUPS, StateTracking, StateTrackingConfig

ORDERS = {"parity": 2, "s3": 6, "s5": 120}


@pytest.mark.parametrize("group", GROUPS)
def test_every_label_is_where_all_moves_so_far_have_led(group):
    task = StateTracking(StateTrackingConfig(group=group))
    assert task.vocab_size == ORDERS[group]
    elements = list(permutations(range(GROUPS[group])))
    zero = jnp.zeros((), jnp.int32)
    batch = jax.tree.map(np.asarray, task.train_batch((), named_key(0, "x"), 20, 40, zero))
    for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
        things = list(range(GROUPS[group]))
        for token, label in zip(tokens, labels, strict=True):
            things = [elements[token][thing] for thing in things]  # each thing moves as the token says
            assert tuple(things) == elements[label]
    assert (batch.weights == 1).all()


def test_parity_is_parity():
    task = StateTracking(StateTrackingConfig())
    batch = jax.tree.map(np.asarray, task.train_batch((), named_key(0, "x"), 20, 40, jnp.zeros((), jnp.int32)))
    np.testing.assert_array_equal(batch.labels, np.cumsum(batch.tokens, axis=1) % 2)


def test_what_lies_behind_the_training_length_is_scored_alone():
    task = StateTracking(StateTrackingConfig(seq_len=10, test_len=24))
    near, far = task.slices("test")
    assert [part.seq_len for part in (near, far)] == [10, 24]
    batch = task.eval_batch(named_key(0, "x"), "test", far, 3, 5)
    assert batch.weights.sum(axis=1).tolist() == [14] * 5
    assert (np.asarray(batch.weights)[:, :10] == 0).all()
    alone = task.eval_batch(named_key(0, "x"), "test", far, 4, 1)
    np.testing.assert_array_equal(batch.tokens[1], alone.tokens[0])
    assert len(task.slices("validation")) == 1, "training sees nothing of other lengths"
    with pytest.raises(ConfigError, match="must exceed seq_len = 10"):
        StateTrackingConfig(seq_len=10, test_len=10)
