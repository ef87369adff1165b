"""MQAR against its definition: pairs first, each key once more, its value the label; and the window's closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.random import named_key
from kvlab.schema import ConfigError
from kvlab.tasks.base import round_robin
from kvlab.tasks.mqar import Mqar, MqarConfig, kept_accuracy, window_accuracy


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (128, 32)])
def test_every_label_is_the_value_of_the_queried_key(length, pairs):
    task = Mqar(MqarConfig())
    batch = jax.tree.map(np.asarray, task.train_batch((), named_key(0, "x"), 50, length, jnp.asarray(pairs, jnp.int32)))
    assert (batch.weights.sum(axis=1) == pairs).all()
    for row in range(50):
        tokens = batch.tokens[row]
        keys, values = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1
        assert keys.max() < 256 <= values.min()
        answers = dict(zip(keys.tolist(), values.tolist(), strict=True))
        real = batch.weights[row] > 0
        places = batch.label_positions[row, real]
        assert len(set(places)) == pairs
        assert places.min() >= 2 * pairs
        assert (places % 2 == 0).all()
        assert [answers[key] for key in tokens[places].tolist()] == batch.labels[row, real].tolist()
        assert sorted(tokens[places]) == sorted(keys)


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (128, 32)])
def test_a_key_that_is_written_twice_has_its_newer_value(length, pairs):
    task = Mqar(MqarConfig(writes=2))
    batch = jax.tree.map(np.asarray, task.train_batch((), named_key(0, "x"), 50, length, jnp.asarray(pairs, jnp.int32)))
    assert (batch.weights.sum(axis=1) == pairs // 2).all()
    for row in range(50):
        tokens, places = batch.tokens[row], batch.label_positions[row]
        labels, weights = batch.labels[row], batch.weights[row]
        held, versions = {}, {}
        for key, value in tokens[: 2 * pairs].reshape(-1, 2).tolist():
            held[key] = value
            versions.setdefault(key, []).append(value)
        assert [len(set(values)) for values in versions.values()] == [2] * (pairs // 2)
        asked = tokens[places[weights > 0]].tolist()
        assert sorted(asked) == sorted(held)
        assert [held[key] for key in asked] == labels[weights > 0].tolist()
        assert places[weights > 0].min() >= 2 * pairs


def test_keys_that_are_written_twice_want_an_even_number_of_pairs():
    with pytest.raises(ConfigError, match="must have an even number of pairs with writes = 2"):
        MqarConfig(train=("64:5",), train_weights=(1,), writes=2)
    with pytest.raises(ValueError, match="writes = 2: must be 1"):
        window_accuracy(MqarConfig(writes=2), "64:4", 16)


@pytest.mark.parametrize("query_aware", [False, True])
def test_a_second_turn_is_the_later_half_of_the_places(query_aware):
    """No token, label or weight changes; where every place has a query, half of the queries are in each turn."""
    names = ("64:4", "64:16", "128:32", "63:10", "13:3")
    plain = Mqar(MqarConfig(test=names))
    task = Mqar(MqarConfig(test=names, num_turns=2, query_aware=query_aware))
    for old, part in zip(plain.slices("test"), task.slices("test"), strict=True):
        batches = [which.eval_batch(named_key(0, "eval"), "test", old, 0, 40) for which in (plain, task)]
        jax.tree.map(np.testing.assert_array_equal, *batches)
        (turn,), pairs = part.turns, part.knob
        queries = np.arange(2 * pairs, part.seq_len - 1, 2)
        early, late = queries[queries < turn], queries[queries >= turn]
        assert len(early) - len(late) in (0, 1)
        assert (old.prompt_len, old.compress_at, old.turns) == (2 * pairs, 2 * pairs, ())
        assert part.compress_at == part.prompt_len == (turn if query_aware else 2 * pairs)
        if part.seq_len == 4 * pairs:
            places = np.asarray(batches[0].label_positions)[np.asarray(batches[0].weights) > 0]
            assert (places >= turn).sum() == 40 * pairs // 2


def test_query_places_follow_the_power_law():
    """Near gaps are likelier: P(first draw = gap) is proportional to (gap + 1) ** (power - 1)."""
    task = Mqar(MqarConfig(train=("64:1",), train_weights=(1,), test=("64:1",)))
    batch = task.train_batch((), named_key(0, "x"), 20_000, 64, jnp.asarray(1, jnp.int32))
    gaps = (np.asarray(batch.label_positions)[:, 0] - 2) // 2
    weights = (np.arange(31) + 1.0) ** (0.01 - 1)
    expected = weights / weights.sum()
    found = np.bincount(gaps, minlength=31) / len(gaps)
    np.testing.assert_allclose(found, expected, atol=0.012)


def test_splits_and_slices_do_not_share_examples():
    task = Mqar(MqarConfig())
    eval_slice = task.slices("test")[0]
    key = named_key(0, "eval")
    test = task.eval_batch(jax.random.fold_in(key, 1), "test", eval_slice, 0, 64)
    validation = task.eval_batch(jax.random.fold_in(key, 0), "validation", eval_slice, 0, 64)
    rows = {bytes(row) for row in np.asarray(test.tokens)}
    assert len(rows) == 64
    assert not rows & {bytes(row) for row in np.asarray(validation.tokens)}
    other = task.eval_batch(jax.random.fold_in(key, 1), "test", eval_slice, 3, 5)
    np.testing.assert_array_equal(other.tokens, np.asarray(test.tokens)[3:8])  # whatever batch an example comes in
    again = task.eval_batch(jax.random.fold_in(key, 1), "test", eval_slice, 0, 64)
    np.testing.assert_array_equal(test.tokens, again.tokens)


def test_an_example_is_the_same_whatever_batch_it_comes_in():
    task, key = Mqar(MqarConfig()), named_key(0, "x")
    part = task.slices("test")[1]
    whole, rest = (jax.tree.map(np.asarray, task.eval_batch(key, "test", part, *of)) for of in ((0, 6), (4, 2)))
    jax.tree.map(lambda all_rows, rows: np.testing.assert_array_equal(all_rows[4:], rows), whole, rest)
    assert len({row.tobytes() for row in whole.tokens}) == 6


def test_the_mixture_has_its_weights():
    task = Mqar(MqarConfig())
    counts: dict[tuple[int, int], int] = {}
    for call in range(90):
        length, pairs = task.train_call(call, 4)
        for num_pairs in pairs:
            counts[length, num_pairs] = counts.get((length, num_pairs), 0) + 1
    assert counts == {(64, 4): 160, (64, 8): 80, (64, 16): 80, (128, 32): 40}


def test_round_robin_spreads_evenly():
    assert round_robin((2, 1, 1)) == (0, 1, 2, 0)
    assert sorted(round_robin((8, 1))) == [0] * 8 + [1]


def test_closed_form_of_the_window_matches_based_figure_2():
    """FIGURES, mean over seven slices; published values were read off the figure, the closed form computed
    elsewhere."""
    slices = ("64:4", "64:8", "64:16", "128:32", "256:64", "512:128", "1024:256")
    config = MqarConfig(vocab_size=8192, train=slices, train_weights=(1,) * 7, test=slices)
    for window, expected in ((16, 0.146), (64, 0.514), (256, 0.797), (1024, 1.0)):
        mean = np.mean([window_accuracy(config, text, window, num_examples=1000) for text in slices])
        assert mean == pytest.approx(expected, abs=0.01)


def test_closed_form_describes_the_sampler():
    """The share of pairs whose value a window sees, counted on the task's own examples."""
    task = Mqar(MqarConfig())
    for eval_slice in task.slices("test"):
        batch = task.eval_batch(named_key(0, "eval"), "test", eval_slice, 0, 2000)
        distance = np.asarray(batch.label_positions)[:, : eval_slice.knob] - (
            2 * np.arange(eval_slice.knob)[None, :] + 1
        )
        expected = window_accuracy(task.config, eval_slice.name, 32)
        assert (distance < 32).mean() == pytest.approx(expected, abs=0.02)


def test_what_stays_of_the_pairs_is_what_is_recalled():
    """The closed form of compacted prompts, against drawn sets of slots."""
    config, rng = MqarConfig(), np.random.default_rng(0)
    guess = 1 / 256
    assert kept_accuracy(config, "128:32", 32, 0, 0) == pytest.approx(0.5 + 0.5 * guess)
    assert kept_accuracy(config, "128:32", 16, 4, 8) == pytest.approx(0.25 + 0.75 * guess), "2 of the sinks, 6 behind"
    assert kept_accuracy(config, "64:4", 99, 4, 0) == 1
    drawn = []
    for _ in range(4000):
        kept = np.zeros(64, bool)
        kept[:3] = kept[64 - 5 :] = True
        kept[rng.choice(np.arange(3, 59), 20 - 8, replace=False)] = True
        drawn.append(kept[1::2].mean())
    seen = float(np.mean(drawn))
    found = kept_accuracy(config, "128:32", 20, 3, 5, by="random")
    assert found == pytest.approx(seen + (1 - seen) * guess, abs=4 * np.std(drawn) / 4000**0.5)
    with pytest.raises(ValueError, match="must be recency or random"):
        kept_accuracy(config, "128:32", 20, 3, 5, by="luck")
