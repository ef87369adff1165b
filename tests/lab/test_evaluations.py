"""`kvlab eval`: a finished run's parameters scored otherwise, without training, as runs beside it."""

import hashlib
import json
import shutil

import jax
import pytest

from kvlab import load
from kvlab.cli import main
from kvlab.compose import compose
from kvlab.config import Config
from kvlab.evaluation.score import Scorer
from kvlab.lab import evaluations, parameters, trials
from kvlab.lab import execute as executing
from kvlab.lab.evaluations import evaluations_of
from kvlab.lab.execute import execute, load_params
from kvlab.lab.labels import point_labels, run_labels
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.results import points, read_records
from kvlab.lab.runs import Run
from kvlab.lab.trained import save_params
from kvlab.random import named_key
from kvlab.schema import ConfigError
from kvlab.tasks.mqar import Mqar
from kvlab.training.checkpoint import CheckpointError
from tests.lab.small import MEASURED, small


@pytest.fixture
def run(results):
    """The folder of a finished run."""
    return small(results, *MEASURED).run_dir


@pytest.fixture
def nothing_trains(monkeypatch):
    """Fails where anything is trained."""

    def trained(*_, **__):
        raise AssertionError("an evaluation trains nothing")

    monkeypatch.setattr(trials, "train", trained)
    monkeypatch.setattr(parameters, "train_all", trained)


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["kvlab", *map(str, words)])
    status = main()
    return status, *capsys.readouterr()


def digests(folder):
    """What lies in a folder, but for locks."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_another_memory_is_the_run_that_kvlab_run_would_have_made(run, results, monkeypatch, capsys, nothing_trains):
    """Its identity is that of `kvlab run` with the same words; the parameters are said, and used; a second command
    skips it, and nothing that was there is written."""
    before = digests(results)
    status, out, err = call(monkeypatch, capsys, "eval", run, "format=int8", "memory.page_size=8")
    assert status == 0, err
    same = small(results, *MEASURED, "format=int8", "memory.page_size=8")
    assert f"done, in {same.run_dir}" in err
    record, base = Run(same).record, Run(small(results, *MEASURED)).record
    assert record.training == base.training
    assert record.quality.parallel_value == base.quality.parallel_value
    assert record.config["memory"]["format"] == "int8"
    said = f"the best of 2 learning rates on validation, {base.training.learning_rate:g}: "
    assert f"after 16 steps, {said}" in err
    assert f"{same.training_dir / 'params'} (sha256 {base.training.params_sha256[:10]}...)" in err
    assert "mha int8" in out
    after = digests(results)
    assert {path: after[path] for path in before} == before
    assert call(monkeypatch, capsys, "eval", run, "format=int8", "memory.page_size=8")[0] == 0
    assert digests(results) == after


def test_other_test_lengths_are_scored_as_they_are(run, results, nothing_trains):
    """The reference scores the run's parameters on the same examples, drawn without any of this."""
    lengths = ("32:4", "48:8")
    (config,) = evaluations_of(run, [f"task.test=[{','.join(lengths)}]", "task.num_test=5"]).configs
    assert config.trained_on is not None
    assert execute(config) == "done", Run(config).record
    record = Run(config).record
    base = small(results, *MEASURED)
    assert record.training == Run(base).record.training
    assert config.run_dir.parent == run.parent
    lab, params = load_params(base)
    changed = {**base.as_dict()["task"], "test": list(lengths), "num_test": 5}
    del changed["type"]
    scorer = Scorer(lab.model.structure, Mqar(Mqar.Config.build(changed)), named_key(0, "eval"), 4)
    expected = scorer.parallel(params, "test")
    assert record.quality.parallel_value == lab.task.metric.mean(expected)
    assert set(record.quality.slices) == set(lengths)
    assert record.memory.context_len == 40, "measured where the run says"
    frame = load(results)
    assert sorted(frame.status) == ["done", "done"]
    assert len(points(read_records(results))) == 2


def test_a_record_reads_back_as_the_run_that_it_is(run):
    (config,) = evaluations_of(run, ["task.test=[32:4]"]).configs
    again = Config.build(json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert again.run_id == config.run_id
    assert again.training_id == config.training_id == small(run.parents[1], *MEASURED).training_id


def test_another_batch_of_validation_is_of_the_same_training(run):
    (config,) = evaluations_of(run, ["measure.batch_size=2"]).configs
    base = small(run.parents[1], *MEASURED)
    assert (config.training_id, config.measure.batch_size) == (base.training_id, 2)
    assert config.run_id != base.run_id
    assert run_labels([base.as_dict(), config.as_dict()])[1].startswith("mha/mqar/seed0 validated by 4")


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("seed=1", "seed", 1),
        ("mixer=mqa", "mixer", "mqa"),
        ("mixer.A.head_dim=8", "mixer.A.head_dim", 8),
        ("model.mlp_dim=8", "model.mlp_dim", 8),
        ("model=text", "model", "text"),
        ("optimizer.eps=1e-7", "optimizer.eps", 1e-7),
        ("train.num_steps=4", "train.num_steps", 4),
        ("tune.learning_rate=[0.1]", "tune.learning_rate", [0.1]),
        ("weights.path=/models/Llama", "weights.path", "/models/Llama"),
        ("name=other", "name", "other"),
        ("experiment=demo", "experiment", "demo"),
        ("results_dir=elsewhere", "results_dir", "elsewhere"),
        ("task.train=[16:4]", "task.train", ["16:4"]),
        ("task.num_validation=5", "task.num_validation", 5),
        ("debug=tiny", "debug", "tiny"),
        ("task.vocab_size=64", "task.type", "mqar"),
        ("task=text", "task.type", "text"),
        ("task=mqa", "task", "mqa"),
        ("memory.pagesize=8", "memory.pagesize", 8),
        ("memory.page_size=4,8", "memory.page_size", "4,8"),
        ("compression=h2o", "memory.budget", None),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(run, results, word, field, value):
    before = digests(results)
    with pytest.raises(ConfigError) as caught:
        evaluations_of(run, [word])
    assert (caught.value.name, caught.value.value) == (field, value), caught.value
    assert len(str(caught.value)) < 2000
    assert digests(results) == before


def test_what_the_run_was_trained_with_may_be_said_again(run):
    (config,) = evaluations_of(run, ["seed=0", "train.num_steps=16", "memory=dense", "memory.chunk_len=5"]).configs
    assert (config.memory.name, config.memory.chunk_len) == ("dense", 5)


def test_runs_that_are_none_or_unfinished_are_refused_with_a_sentence(run, tmp_path, monkeypatch, capsys):
    def refused(folder, words, *overrides):
        status, _, err = call(monkeypatch, capsys, "eval", folder, *overrides)
        assert status == 2, err
        assert words in err
        assert err.count("\n") == 1

    refused(tmp_path / "nowhere", "not a run's folder (no config.yaml)")
    refused(run.parent, f"it holds runs, such as {run}")
    refused(next((run.parent / "trained").iterdir()), "this is a training; give a run's folder")
    alone = shutil.copytree(run, tmp_path / "alone" / run.name)
    refused(alone, "not beside it: results are moved as a whole")
    record = (run / "record.json").read_bytes()
    (run / "record.json").write_bytes(record[:100])
    refused(run, "its record.json is damaged")
    (run / "record.json").unlink()
    refused(run, "has not finished")
    data = json.loads(record)
    failed = {name: data[name] for name in ("run_id", "experiment", "config", "seed", "schema")}
    (run / "record.json").write_text(json.dumps(failed | {"status": "failed", "reason": "no room"}))
    refused(run, "has failed: no room")
    (run / "record.json").write_bytes(record)
    (run / "config.yaml").write_text("mixer: [")
    refused(run, "is damaged")


def test_bytes_that_only_the_mixer_could_be_solved_for_are_refused(tmp_path, monkeypatch):
    base = compose(["mixer=swa", f"results_dir={tmp_path}"])
    monkeypatch.setattr(evaluations, "base_of", lambda run: (base, None))
    words = ["budget=9KiB", "memory.allow_underfill=true"]
    assert compose(["mixer=swa", *words]).mixer != base.mixer, "as `kvlab run` solves it"
    with pytest.raises(ConfigError, match=r"memory.budget = '9KiB': without a compression bytes are solved for"):
        evaluations_of(tmp_path, words)


def test_damaged_parameters_are_refused_and_left_as_they_are(run, results):
    """Before anything is written; and where they are damaged meanwhile the evaluation has failed, and says so."""
    (config,) = evaluations_of(run, ["memory=dense"]).configs
    params = Laboratory.of(config).model.params
    save_params(config.training_dir / "params", jax.tree.map(lambda leaf: leaf + 1, params))
    before = digests(results)
    with pytest.raises(CheckpointError, match="not the parameters that were trained"):
        evaluations_of(run, ["memory=dense"])
    assert digests(results) == before
    assert execute(config, trains=False) == "failed"
    assert "not the parameters that were trained" in Run(config).record.reason
    after = digests(results)
    assert {path: after[path] for path in before} == before


def test_data_that_have_changed_since_are_named(run, monkeypatch):
    monkeypatch.setattr(Mqar, "fingerprint", lambda self: "other data")
    with pytest.raises(ConfigError, match=r"its data, or what reads them, have changed since"):
        evaluations_of(run, ["memory=dense"])


def test_a_sweep_goes_on_after_a_failure_and_tries_it_again(run, results, monkeypatch, capsys, nothing_trains):
    right = executing.verify

    def verify(*arguments, **given):
        if given["memory"].name == "dense":
            raise ValueError("it does not agree")
        return right(*arguments, **given)

    words = ["eval", run, "-m", "memory=dense,paged", "memory.chunk_len=5"]
    with monkeypatch.context() as patch:
        patch.setattr(executing, "verify", verify)
        status, out, _ = call(monkeypatch, capsys, *words)
    assert status == 1
    assert "failed: mha/mqar/seed0" in out
    assert "ValueError: it does not agree" in out
    assert sorted(record.status for record in read_records(results)) == ["done", "done", "failed"]
    status, _, err = call(monkeypatch, capsys, *words)
    assert status == 0
    assert (err.count("] done, in"), err.count("] skipped, in")) == (1, 1)


def test_fields_of_methods_are_for_those_that_have_them(run):
    """As in sweeps of `kvlab run`; a compression that is chosen anew has its own defaults."""
    shared = ["budget=12", "memory.compression.sinks=1", "memory.compression.recent=2"]
    words = ["compression=snapkv,h2o", *shared, "memory.compression.window=2"]
    configs = evaluations_of(run, words, multirun=True).configs
    found = {config.memory.compression.name: config.memory.compression for config in configs}
    assert (found["snapkv"].window, found["h2o"].recent) == (2, 2)
    assert not hasattr(found["h2o"], "window")


def test_cfg_prints_what_would_be_scored_and_scores_nothing(run, results, monkeypatch, capsys):
    before = digests(results)
    status, out, _ = call(monkeypatch, capsys, "eval", run, "--cfg", "job", "memory.page_size=8")
    assert status == 0
    assert "page_size: 8" in out
    assert digests(results) == before
    for words in ([], ["memory=dense"]):
        status, _, err = call(monkeypatch, capsys, "eval", *words)
        assert (status, err) == (2, "kvlab eval: give a finished run's folder first; see kvlab eval --help\n")


def test_seeds_scored_on_something_else_are_one_point_with_a_name_of_its_own(results):
    """Beside the run that was trained on it, whatever its test is."""
    base = [small(results, *MEASURED, f"seed={seed}") for seed in (0, 1)]
    other = [replaced(config, "task.test=[32:4]") for config in base]
    own = small(results, *MEASURED, "task.test=[32:4]")
    names = point_labels([config.as_dict() for config in (*base, *other, own)])
    assert names[0] == names[1] == "mha test=['16:2', '24:3']"
    assert names[2] == names[3] == "mha trained on another mqar test=['32:4']"
    assert names[4] == "mha test=['32:4']"


def replaced(config, word):
    """An evaluation of a run that need not be there."""
    values, (name, value) = config.as_dict(), word.split("=")
    trained_on = {"task": values["task"], "validation_batch_size": values["measure"]["batch_size"]}
    task = values["task"] | {name.split(".")[1]: value.strip("[]").split(",")}
    return Config.build(values | {"task": task, "trained_on": trained_on})


TEXT = ["task=text", "task.seq_len=64", "task.num_test=4", "task.num_validation=4", "debug=tiny", "model.model_dim=16",
        "model.num_layers=1", "mixer.A.head_dim=4", "measure.batch_size=4"]  # fmt: skip


@pytest.fixture
def reader(made_once, tmp_path):
    """A run that was trained on bytes."""

    def make(folder):
        config = compose([*TEXT, f"results_dir={folder}"])
        assert execute(config) == "done", Run(config).record

    return compose([*TEXT, f"results_dir={shutil.copytree(made_once('readers', make), tmp_path / 'results')}"]).run_dir


def test_another_task_of_the_same_vocabulary(reader, monkeypatch, capsys, nothing_trains):
    words = ["task=needle", "task.contexts=[80]", "task.depths=[50]", "task.num_test=3"]
    status, out, err = call(monkeypatch, capsys, "eval", reader, *words)
    assert status == 0, err
    assert "mha/needle/seed0 trained on text" in err
    (record,) = (record for record in read_records(reader.parent) if record.config["task"]["type"] == "needle")
    assert record.quality.metric == "accuracy"
    assert set(record.quality.slices) == {"80@50"}
    assert record.quality.chance == 0.1
    assert (
        record.training.data_sha256
        == Run(compose([*TEXT, f"results_dir={reader.parents[1]}"])).record.training.data_sha256
    )
    assert {"needle", "text"} <= set(out.replace(":", " ").split())


def test_a_text_that_was_trained_on_is_not_what_a_whole_text_is_scored_on(reader, tmp_path):
    with pytest.raises(ConfigError, match=r"task.whole = True: must be false: the model was trained on a part"):
        evaluations_of(reader, ["task=perplexity"])
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    (config,) = evaluations_of(reader, ["task=perplexity", f"task.path={tmp_path}/book.txt"]).configs
    assert config.task.whole
    (tmp_path / "note.txt").write_text("It was short.")
    with pytest.raises(ConfigError, match=r"task.seq_len"):
        evaluations_of(reader, ["task=perplexity", f"task.path={tmp_path}/note.txt"])
