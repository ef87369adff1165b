"""Trials as one program: each comes to what it comes to alone, up to rounding, whatever happens to the others."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compose import compose
from kvlab.interrupt import Interrupted, StopRequest
from kvlab.lab.laboratory import Laboratory
from kvlab.random import named_key
from kvlab.training.checkpoint import CheckpointError, tree_sha256
from kvlab.training.loop import train, train_together
from kvlab.training.stack import Programs
from kvlab.training.step import init_state
from kvlab.training.trial import Member, NotFinite

TINY = ["model.model_dim=16", "mixer.A.head_dim=4", "task.vocab_size=32", "task.train=[16:2]", "task.train_weights=[1]",
        "task.test=[16:2]", "measure.decode_steps=4", "train.batch_size=4", "train.num_steps=16",
        "train.steps_per_call=2", "train.eval_every=4", "train.checkpoint_every=8", "train.stop_at=null"]  # fmt: skip
PLACES = [(0, 0.01), (0, 0.003), (1, 0.01), (2, 0.003)]
"""Seeds and rates."""
TOLERANCE = 5e-6
"""By how much a parameter of about 1 may differ after 16 steps, of AdamW and of Muon: rounding adds up."""


class Bench:
    """A step, what is compiled of it, and what trials come to alone."""

    def __init__(self, *words):
        self.labs = [Laboratory.of(compose([*TINY, *words, f"seed={seed}"])) for seed in range(3)]
        self.config, self.step_fn = self.labs[0].config.train, self.labs[0].train_step()
        self.programs = Programs.of_task(self.step_fn, self.config)
        self.alone = {}


class Trained:
    """Members on a bench, and what they write in a folder."""

    def __init__(self, bench, folder, validate=lambda place, params: 0.5, **fields):
        self.bench, self.folder, self.validate = bench, folder, validate
        self.config, self.stop = replace(bench.config, **fields), StopRequest()

    def member(self, place, name):
        seed, rate = PLACES[place]
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)

        def validate(params):
            return self.validate(place, params)

        params = jax.tree.map(jnp.copy, self.bench.labs[seed].model.params)
        return Member(params, rate, seed, validate, folder / str(place), folder / f"{place}.jsonl")

    def alone(self, place, name="alone"):
        fields = {field: value for field, value in vars(self.member(place, name)).items() if field != "params"}
        params = jax.tree.map(jnp.copy, self.bench.labs[PLACES[place][0]].model.params)
        return train(self.bench.step_fn, params, self.config, **fields, label=name, stop=self.stop)

    def together(self, name="together", places=range(4), change=lambda members: members):
        members = change([self.member(place, name) for place in places])
        return train_together(self.bench.programs, self.config, members, label=name, stop=self.stop)

    def rows(self, place, name="together"):
        return [json.loads(line) for line in (self.folder / name / f"{place}.jsonl").read_text().splitlines()]

    def check(self, place, outcome):
        """An outcome is what it is alone, and so are its rows."""
        if place not in self.bench.alone:
            alone = Trained(self.bench, self.folder / "calm")
            self.bench.alone[place] = alone.alone(place), alone.rows(place, "alone")
        expected, expected_rows = self.bench.alone[place]
        close(outcome.params, expected.params)
        assert comparable(outcome) == comparable(expected)
        assert len(expected_rows) == 8
        for found, row in zip(self.rows(place), expected_rows, strict=True):
            assert found == {name: pytest.approx(value, rel=1e-4) for name, value in row.items()}
            assert (found["step"], found["tokens"]) == (row["step"], row["tokens"])


def close(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.fixture
def trained(bench, tmp_path):
    return Trained(bench, tmp_path)


def comparable(outcome):
    """What must be equal exactly."""
    return outcome.validation, outcome.num_steps, outcome.num_tokens


def test_each_comes_to_what_it_comes_to_alone(trained):
    for place, outcome in enumerate(trained.together()):
        trained.check(place, outcome)


def test_so_it_does_with_muon_and_sequences_of_several_lengths(tmp_path):
    lengths = ["task.train=[16:2,24:3]", "task.train_weights=[2,1]"]
    trained = Trained(Bench("optimizer.name=muon", *lengths), tmp_path)
    for place, outcome in zip((0, 2), trained.together(places=[0, 2]), strict=True):
        trained.check(place, outcome)


def test_who_does_not_move_stays_as_it_is_to_the_bit(trained):
    step_fn, places = trained.bench.step_fn, range(3)
    states = [init_state(trained.member(place, "x").params, step_fn.optimizer, 0.01) for place in places]
    before = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    keys = jnp.stack([named_key(place, "train") for place in places])
    knobs, moves = jnp.asarray([2, 2], jnp.int32), jnp.asarray([True, False, True])
    after, _ = step_fn.together(jax.tree.map(jnp.copy, before), (), keys, knobs, 16, moves)
    assert np.asarray(after.step).tolist() == [2, 0, 2]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.array_equal(old[1], new[1])


def test_one_that_meets_a_nan_fails_as_alone_and_the_others_go_on(trained):
    def poisoned(members):
        kernel = members[1].params["blocks"][0]["mixer"]["key"]
        kernel["kernel"] = kernel["kernel"].at[0, 0].set(jnp.nan)
        return members

    outcomes = trained.together(change=poisoned)
    assert isinstance(outcomes[1], NotFinite)
    assert str(outcomes[1]) == "step 0: parameter blocks.0.mixer.key.kernel is not finite"
    for place in (0, 2, 3):
        trained.check(place, outcomes[place])
    assert trained.rows(1) == []


def test_each_stops_when_it_would_alone(bench, tmp_path):
    """Accuracies by place and validation: the first has reached its goal at step 4, the second and third at 8, the
    last never. The stack becomes smaller behind the second validation."""
    said = {0: [0.9], 1: [0.1, 0.9], 2: [0.2, 0.9], 3: [0.1, 0.2, 0.3, 0.4]}
    counts = dict.fromkeys(range(4), 0)

    def validate(place, params):
        counts[place] += 1
        return said[place][counts[place] - 1]

    trained = Trained(bench, tmp_path, validate, stop_at=0.8)
    outcomes = trained.together()
    assert [outcome.num_steps for outcome in outcomes] == [4, 8, 8, 16]
    counts.update(dict.fromkeys(range(4), 0))
    for place, outcome in enumerate(outcomes):
        alone = trained.alone(place)
        close(outcome.params, alone.params)
        assert comparable(outcome) == comparable(alone)


def stopped_after(trained, num_validations):
    """Makes the members ask to stop at some validation of any of them."""
    seen = []

    def validate(place, params):
        seen.append(place)
        if len(seen) == num_validations:
            trained.stop.signal_name = "SIGTERM"
        return 0.5

    trained.validate = validate


def go_on(trained):
    trained.stop, trained.validate = StopRequest(), lambda place, params: 0.5


def test_a_group_that_is_cut_goes_on_in_other_company_and_alone(trained):
    """The second is ahead when the first three meet, and the last is resumed alone."""
    stopped_after(trained, 2)
    with pytest.raises(Interrupted):
        trained.alone(1, "together")
    go_on(trained)
    stopped_after(trained, 1)
    with pytest.raises(Interrupted):
        trained.together(places=[0, 2, 3])
    go_on(trained)
    outcomes = trained.together(places=[0, 1, 2])
    outcomes.append(trained.alone(3, "together"))
    for place, outcome in enumerate(outcomes):
        trained.check(place, outcome)
    again = trained.together()
    assert [comparable(outcome) for outcome in again] == [comparable(outcome) for outcome in outcomes]


def test_the_same_group_resumes_bit_for_bit(trained):
    calm = trained.together("calm")
    stopped_after(trained, 1)
    with pytest.raises(Interrupted):
        trained.together()
    assert [len(trained.rows(place)) for place in range(4)] == [3] * 4  # the call after the request is the last
    go_on(trained)
    for place, outcome in enumerate(trained.together()):
        assert tree_sha256(outcome.params) == tree_sha256(calm[place].params)
        assert trained.rows(place) == trained.rows(place, "calm")


def test_what_is_asked_to_save_goes_on(trained):
    """As Slurm's SIGTERM asks, at step 4: the next call, of step 6, is saved, and the numbers stay what they are."""
    saved = []

    def validate(place, params):
        folder = trained.folder / "together" / "0"
        saved.append({path.name for path in folder.iterdir() if path.name.isdigit()})
        trained.stop.asks_to_save = len(saved) == 1
        return 0.5

    trained.validate = validate
    trained.check(0, trained.alone(0, "together"))
    assert saved == [{"0"}, {"0", "6"}, {"6", "8"}, {"6", "8"}]


@pytest.mark.filterwarnings("ignore:damaged checkpoint:RuntimeWarning")
def test_one_whose_checkpoints_are_damaged_says_so_and_the_others_train(trained):
    stopped_after(trained, 1)
    with pytest.raises(Interrupted):
        trained.together()
    go_on(trained)
    for path in (trained.folder / "together" / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    outcomes = trained.together()
    assert isinstance(outcomes[2], CheckpointError)
    assert [outcomes[place].num_steps for place in (0, 1, 3)] == [16] * 3


def test_no_more_are_one_program_than_fit(trained):
    programs, params = trained.bench.programs, trained.bench.labs[0].model.params
    like = jax.eval_shape(lambda: init_state(params, trained.bench.step_fn.optimizer, 1.0))

    def needed(num_trials):
        account = programs.of(like, num_trials, 16).memory_analysis()
        return 2 * account.argument_size_in_bytes + account.temp_size_in_bytes

    assert programs.num_fitting(params, 4, needed(4)) == 4
    fitting = programs.num_fitting(params, 4, needed(4) - 1)
    assert fitting in (2, 3)
    assert needed(fitting) < needed(4)
    assert programs.num_fitting(params, 4, 1) == 1
