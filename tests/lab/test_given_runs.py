"""A finished run as given weights: `weights=RUN` for tasks, and for `kvlab generate`."""

import json

import jax
import numpy as np
import pytest

from kvlab.compose import compose, expand
from kvlab.evaluation.score import Scorer
from kvlab.lab.execute import execute, load_params
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.plan import predict
from kvlab.lab.runs import Run
from kvlab.lab.source import load_source
from kvlab.lab.trained import save_params
from kvlab.random import named_key
from kvlab.schema import ConfigError
from kvlab.tasks.mqar import Mqar
from kvlab.training.checkpoint import CheckpointError
from tests.lab.small import MEASURED, SMALL, small

TASK = [word for word in SMALL if not word.startswith(("model.", "mixer.", "train.", "optimizer."))]


@pytest.fixture
def run(results):
    """The folder of a finished run."""
    return small(results, *MEASURED).run_dir


def given(run, tmp_path, *words):
    """A run that is given its weights, and trains nothing."""
    return compose([*TASK, f"weights={run}", "train.num_steps=0", f"results_dir={tmp_path / 'given'}", *words])


def test_a_runs_parameters_are_given_to_another_run(run, tmp_path):
    """Scored on other lengths as the run's own model scores them; the variant is the run's, and so is the identity of
    its parameters."""
    config = given(run, tmp_path, "task.test=[32:4]")
    base, params = load_params(small(run.parents[1], *MEASURED))
    assert config.weights.path == str(run)
    assert (config.mixer, config.model) == (base.config.mixer, base.config.model)
    assert execute(config) == "done", Run(config).record
    record = Run(config).record
    task = base.config.as_dict()["task"] | {"test": ["32:4"]}
    del task["type"]
    scorer = Scorer(base.model.structure, Mqar(Mqar.Config.build(task)), named_key(0, "eval"), 4)
    assert record.quality.parallel_value == base.task.metric.mean(scorer.parallel(params, "test"))
    assert record.training.params_sha256 == Run(base.config).record.training.params_sha256
    loaded = load_source(config.run_dir).model.params
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_window_and_another_type_lie_over_a_run(run, tmp_path):
    """Scores are those of the same parameters in a model that is built with the window."""
    config = given(run, tmp_path, "weights.window=4", "weights.num_sinks=1", "weights.dtype=bfloat16")
    assert config.mixer.name == "mha-window4-sinks1"
    layer = config.mixer.layers["A"].config
    assert (layer.window, layer.num_sinks, config.model.dtype) == (4, 1, "bfloat16")
    lab = Laboratory.of(config)
    own = Laboratory.of(small(run.parents[1], "mixer.A.window=4", "mixer.A.num_sinks=1", "model.dtype=bfloat16"))
    _, params = load_params(small(run.parents[1], *MEASURED))
    ours, theirs, other = (
        Scorer(structure, lab.task, named_key(0, "eval"), 4).parallel(held, "test")
        for structure, held in (
            (lab.model.structure, lab.model.params),
            (own.model.structure, params),
            (Laboratory.of(given(run, tmp_path)).model.structure, params),
        )
    )
    assert ours == theirs
    assert ours != other


def test_training_goes_on_from_a_run(run, tmp_path):
    words = ["train.num_steps=8", "train.steps_per_call=2", "train.eval_every=8", "train.checkpoint_every=4"]
    config = given(run, tmp_path, *words, "train.batch_size=4")
    _, params = load_params(small(run.parents[1], *MEASURED))
    jax.tree.map(np.testing.assert_array_equal, Laboratory.of(config).model.params, params)
    assert config.training_id != given(run, tmp_path).training_id


def test_a_plan_holds_what_the_run_holds(run, tmp_path):
    plan = predict(Laboratory.of(given(run, tmp_path), abstract=True))
    assert plan.num_params == Laboratory.of(small(run.parents[1], *MEASURED), abstract=True).model.num_params


@pytest.mark.parametrize(
    ("words", "field", "said"),
    [
        (["mixer=mqa"], "mixer", "weights.path says what the model is"),
        (["model.model_dim=32"], "model.model_dim", "weights.path says what the model is"),
        (["task.vocab_size=64"], "task.type", "has a vocabulary of Mqar with 64 tokens, and the model was trained on"),
        (["weights.window=0"], "weights.window", "must be an integer"),
    ],
)
def test_what_a_run_cannot_do_is_refused(run, tmp_path, words, field, said):
    with pytest.raises(ConfigError) as caught:
        expand([*TASK, f"weights={run}", "train.num_steps=0", f"results_dir={tmp_path}", *words], multirun=False)
    assert caught.value.name == field
    assert said in str(caught.value)


def test_folders_that_are_no_finished_run_are_refused(run, tmp_path):
    whole = (run / "record.json").read_bytes()
    config = given(run, tmp_path)
    for damaged, said in (
        (whole[:100], "not JSON"),
        (b'{"status": "failed"}', "this run has not finished: it is 'failed'"),
        (b'{"status": "done"}', "is damaged: KeyError"),
        (b'{"status": "done", "config": [], "training": {"params_sha256": ""}}', "is damaged"),
        (None, "this run has not finished: it has no record.json"),
    ):
        (run / "record.json").unlink() if damaged is None else (run / "record.json").write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"weights.path = ") as caught:
            given(run, tmp_path)
        assert said in str(caught.value)
    (run / "record.json").write_bytes(whole)
    params = small(run.parents[1], *MEASURED).training_dir / "params"
    save_params(params, jax.tree.map(lambda leaf: leaf + 1, Laboratory.of(small(run.parents[1])).model.params))
    with pytest.raises(CheckpointError, match="not the parameters that were trained"):
        Laboratory.of(config)


def test_a_run_that_was_itself_given_its_weights_names_them(run, tmp_path):
    config = given(run, tmp_path)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text("")
    record = (run / "record.json").read_text()
    data = json.loads(record) | {"config": config.as_dict()}
    (config.run_dir / "record.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="was itself given its weights, from"):
        given(config.run_dir, tmp_path)
