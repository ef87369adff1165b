"""The training call: gradients against finite differences, accumulation, schedules, masks, and what a NaN does."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.lab.laboratory import Laboratory
from kvlab.models.transformer import merge
from kvlab.random import named_key
from kvlab.training.step import init_state, weighted_nll

TINY = ["model.model_dim=16", "mixer.A.head_dim=4", "task.vocab_size=32", "train.batch_size=8",
        "task.train=[16:2,24:3]", "task.train_weights=[2,1]", "task.test=[16:2]", "measure.decode_steps=4"]  # fmt: skip


@pytest.fixture
def lab(config_of):
    return Laboratory.of(config_of(*TINY))


def run_calls(lab, num_calls=1, steps=4, state=None, learning_rate=1e-2):
    step_fn = lab.train_step()
    state = state or init_state(jax.tree.map(jnp.copy, lab.model.params), step_fn.optimizer, learning_rate)
    key, losses = named_key(0, "train"), []
    for call in range(num_calls):
        seq_len, knobs = lab.task.train_call(call, steps)
        state, metrics = step_fn(state, (), key, jnp.asarray(knobs, jnp.int32), seq_len)
        losses.extend(np.asarray(metrics["loss"]).tolist())
    return state, losses, metrics


def test_loss_is_the_mean_over_labels_only(lab):
    batch = lab.task.train_batch((), named_key(0, "x"), 4, 24, jnp.asarray(2, jnp.int32))
    model = lab.model.merge()
    logits = np.asarray(model.logits(model.parallel(batch.tokens)), np.float64)
    expected = 0.0
    for row in range(4):
        for place, label, weight in zip(batch.label_positions[row], batch.labels[row], batch.weights[row], strict=True):
            scores = logits[row, place]
            expected -= float(weight) * (scores[label] - np.log(np.exp(scores).sum()))
    nll, _ = weighted_nll(model, batch)
    assert float(nll.sum()) == pytest.approx(expected, rel=1e-5)
    assert float(batch.weights.sum()) == 8


@pytest.mark.ci
def test_gradients_agree_with_finite_differences(lab):
    step_fn = lab.train_step()
    state = init_state(lab.model.params, step_fn.optimizer, 1e-2)
    key, knob = named_key(0, "train"), jnp.asarray(2, jnp.int32)
    _, grads = step_fn.gradients(state, (), key, knob, 16)
    batch = lab.task.train_batch((), jax.random.fold_in(key, 0), 8, 16, knob)

    def loss(params):
        return float(weighted_nll(merge(lab.model.structure, params), batch)[0].sum() / batch.weights.sum())

    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), lab.model.params)
    slope = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    step = 1e-3
    ahead = jax.tree.map(lambda p, d: p + step * d, lab.model.params, direction)
    behind = jax.tree.map(lambda p, d: p - step * d, lab.model.params, direction)
    assert slope == pytest.approx((loss(ahead) - loss(behind)) / (2 * step), rel=0.03)


def test_accumulation_changes_nothing_but_memory(config_of):
    whole, _, _ = run_calls(Laboratory.of(config_of(*TINY)))
    parts, _, _ = run_calls(Laboratory.of(config_of(*TINY, "train.accumulation=4")))
    chex.assert_trees_all_close(whole.params, parts.params, atol=1e-4)


def test_several_steps_per_call_equal_single_steps(lab):
    many, losses, _ = run_calls(lab, steps=4)
    state, single = None, []
    step_fn = lab.train_step()
    state = init_state(jax.tree.map(jnp.copy, lab.model.params), step_fn.optimizer, 1e-2)
    seq_len, knobs = lab.task.train_call(0, 4)
    for knob in knobs:
        state, metrics = step_fn(state, (), named_key(0, "train"), jnp.asarray([knob], jnp.int32), seq_len)
        single.append(float(metrics["loss"][0]))
    assert single == pytest.approx(losses, rel=1e-6)
    assert int(state.step) == int(many.step) == 4


INDEXED = [*TINY, "mixer=indexed", "mixer.A.num_selected=3", "mixer.A.index_loss=0.5", "train.num_steps=20"]


def test_an_indexer_is_warmed_up_in_training_and_scoring_knows_nothing_of_it(config_of):
    """The first .8 of the steps attend to everything, the others to what is selected, as scoring does. What is asked
    for beside the labels is reported apart."""
    lab, key, knob = Laboratory.of(config_of(*INDEXED)), named_key(0, "train"), jnp.asarray(2, jnp.int32)
    everything = Laboratory.of(config_of(*INDEXED, "mixer.A.num_selected=64")).model.structure
    step_fn = lab.train_step()
    at = init_state(lab.model.params, step_fn.optimizer, 1e-2)
    for step, structure in ((0, everything), (15, everything), (16, lab.model.structure), (19, lab.model.structure)):
        losses, _ = step_fn.gradients(replace(at, step=jnp.asarray(step, jnp.int32)), (), key, knob, 16)
        batch = lab.task.train_batch((), jax.random.fold_in(key, step), 8, 16, knob)
        nll, _ = weighted_nll(merge(structure, lab.model.params), batch)
        assert float(losses.labels) == pytest.approx(float(nll.sum() / batch.weights.sum()), rel=1e-5)
        assert float(losses.beside) > 0


def test_accumulation_changes_nothing_of_what_is_asked_beside_labels(config_of):
    found = []
    for words in ([], ["train.accumulation=4"]):
        lab = Laboratory.of(config_of(*INDEXED, *words))
        step_fn = lab.train_step()
        state = init_state(lab.model.params, step_fn.optimizer, 1e-2)
        found.append(step_fn.gradients(state, (), named_key(0, "train"), jnp.asarray(2, jnp.int32), 16))
    chex.assert_trees_all_close(*found, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_lowers_the_loss(config_of, name):
    _, losses, _ = run_calls(Laboratory.of(config_of(*TINY, f"optimizer.name={name}")), num_calls=30)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_a_nan_stops_at_its_step_and_names_the_leaf(lab):
    poisoned = jax.tree.map(jnp.copy, lab.model.params)
    key_layer = poisoned["blocks"][0]["mixer"]["key"]
    key_layer["kernel"] = key_layer["kernel"].at[0, 0].set(jnp.nan)
    step_fn = lab.train_step()
    state = init_state(poisoned, step_fn.optimizer, 1e-2)
    seq_len, knobs = lab.task.train_call(0, 4)
    after, metrics = step_fn(state, (), named_key(0, "train"), jnp.asarray(knobs, jnp.int32), seq_len)
    assert not bool(metrics["ok"])
    assert int(after.step) == 0
    leaf = step_fn.first_bad_leaf(after, (), named_key(0, "train"), jnp.asarray(knobs[0], jnp.int32), seq_len)
    assert leaf == "parameter blocks.0.mixer.key.kernel"
