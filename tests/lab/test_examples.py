"""The scores by example beside a record: written, read, missing, damaged."""

import hashlib
import io
import shutil
from dataclasses import replace

import numpy as np
import pytest

from kvlab.evaluation.score import SliceScore
from kvlab.lab.examples import FILE, ExamplesError, read_examples, write_examples
from kvlab.lab.record import Done
from kvlab.lab.runs import Run
from kvlab.tasks.metrics import ACCURACY, BITS_PER_BYTE, METRICS, PERPLEXITY, ExampleScores
from tests.lab.test_results import record


def made(seed=0, num_examples=7, num_turns=2) -> ExampleScores:
    rng = np.random.default_rng(seed)
    num_labels = rng.integers(1, 4, (num_examples, num_turns)).astype(np.int32)
    right = rng.random(num_labels.sum()) < 0.6
    owner = np.repeat(np.arange(num_labels.size), num_labels.ravel())
    correct = np.bincount(owner, right, num_labels.size).reshape(num_labels.shape)
    nll = rng.random(num_labels.shape)
    weight = num_labels.astype(np.float64)
    return ExampleScores(nll=nll, correct=correct, weight=weight, num_labels=num_labels, right=right)


@pytest.fixture
def run(tmp_path):
    scores = [SliceScore(name=name, nll=1.0, correct=1.0, weight=1.0, examples=made(i), data_sha256=name)
              for i, name in enumerate(("64:4", "a/b"))]  # fmt: skip
    written = write_examples(tmp_path, scores)
    assert written.data_sha256 == {"64:4": "64:4", "a/b": "a/b"}
    return replace(record(), directory=str(tmp_path), examples=written)


def test_scores_come_back_as_they_were(run, tmp_path):
    found = read_examples(run)
    assert list(found) == ["64:4", "a/b"]
    for index, examples in enumerate(found.values()):
        for name, expected in vars(made(index)).items():
            np.testing.assert_array_equal(getattr(examples, name), expected, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    with np.load(tmp_path / FILE) as arrays:  # any reader of numpy's files reads it
        assert arrays["nll.1"].shape == (7, 2)


def test_what_is_missing_or_damaged_is_a_sentence(run, tmp_path):
    with pytest.raises(ExamplesError, match=r"examples of run mha0mqar = .*: the run is from before"):
        read_examples(replace(run, examples=None))
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:-1])
    with pytest.raises(ExamplesError, match="is damaged: not what the record says"):
        read_examples(run)
    for content in (b"no file of numpy's", _npz(names=np.array(["a"])), _npz(**_columns(right=np.zeros(1, np.uint8)))):
        (tmp_path / FILE).write_bytes(content)
        forged = replace(run.examples, sha256=hashlib.sha256(content).hexdigest())
        with pytest.raises(ExamplesError, match="is no file of scores"):
            read_examples(replace(run, examples=forged))
    (tmp_path / FILE).unlink()
    with pytest.raises(ExamplesError, match="cannot be read"):
        read_examples(run)


def _npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _columns(**changed):
    columns = {f"{name}.0": value for name, value in vars(made()).items()} | {"names": np.array(["a"])}
    return columns | {f"{name}.0": value for name, value in changed.items()}


def test_a_run_keeps_its_examples_and_its_record_sums_them(tmp_path):
    from kvlab.lab.execute import execute
    from kvlab.lab.results import read_records
    from tests.lab.test_execute import small

    config = small(tmp_path, "train.num_steps=2", "train.checkpoint_every=2", "train.eval_every=2")
    assert execute(config) == "done"
    (found,) = read_records(tmp_path)
    assert isinstance(found, Done)
    assert found.quality.chance == 1 / 16
    assert found.quality.turns == {}
    scores = read_examples(found)
    assert {name: each.correct.sum() / each.weight.sum() for name, each in scores.items()} == found.quality.slices
    assert {name: each.num_examples for name, each in scores.items()} == {"16:2": 6, "24:3": 6}
    (config.run_dir / FILE).unlink()
    (still,) = read_records(tmp_path)
    assert still == found
    assert Run(config).state == "done"


def test_the_record_of_a_task_with_turns_has_each(tmp_path):
    from kvlab.lab.execute import quality_of
    from kvlab.tasks import TASKS
    from tests.tasks.contracts import make

    assert {name: make(name).chance for name in TASKS if name in ("mqar", "needle", "text", "perplexity")} == {
        "mqar": 1 / 16, "needle": 0.1, "text": 8.0, "perplexity": 256.0,
    }  # fmt: skip
    examples = made()
    silent = replace(examples, weight=examples.weight * [1, 0])
    parts = [
        SliceScore(name=name, **vars(each.sums()), examples=each)
        for name, each in (("a", examples), ("b", silent), ("c", made(num_turns=1)))
    ]
    quality = quality_of(make("mqar"), parts, parts, validation=0.5, verified_by="the parallel form")
    turns = [examples.correct[:, turn].sum() / examples.weight[:, turn].sum() for turn in (0, 1)]
    assert quality.turns == {"a": turns, "b": [turns[0], None]}
    assert quality.slices["a"] == examples.correct.sum() / examples.weight.sum()


def test_a_cell_tells_something_between_floor_and_chance():
    assert ACCURACY.is_discriminative(0.9, 0.01) is True
    assert ACCURACY.is_discriminative(0.35, 0.01) is False  # METHODS: a ceiling of 35% is noise
    assert ACCURACY.is_discriminative(0.9, 0.8) is False
    assert ACCURACY.is_discriminative(0.9, None) is True
    assert ACCURACY.is_discriminative(0.9, 0.01, floor=0.95) is False
    assert BITS_PER_BYTE.is_discriminative(2.0, 8.0) is True
    assert BITS_PER_BYTE.is_discriminative(8.5, 8.0) is False
    assert BITS_PER_BYTE.is_discriminative(2.0, 8.0, floor=1.5) is False
    assert PERPLEXITY.is_discriminative(20.0, None) is None
    assert {name: metric.chance(4) for name, metric in METRICS.items()} == {
        "accuracy": 0.25, "bits_per_byte": 2.0, "perplexity": 4.0,
    }  # fmt: skip


def test_leftovers_of_a_run_that_is_begun_again_go(tmp_path):
    from tests.lab.test_execute import small

    run = Run(small(tmp_path))
    run.directory.mkdir(parents=True)
    (run.directory / FILE).write_bytes(b"old")
    shutil.copy(run.directory / FILE, run.directory / "kept")
    run.begin(record().provenance)
    assert not (run.directory / FILE).exists()
    assert (run.directory / "kept").exists()
