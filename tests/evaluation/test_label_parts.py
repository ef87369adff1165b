"""Losses of text in two parts, tokens that complete a bigram of their window and the rest: against a search through
each window and float64 of each example's logits."""

import math
from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compose import compose
from kvlab.evaluation.score import Scorer
from kvlab.lab.execute import execute
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.protocol import protocol_rows
from kvlab.lab.record import Done
from kvlab.lab.report import frontier_frame
from kvlab.lab.results import load, points, read_records
from kvlab.lab.tables import print_records
from kvlab.models.transformer import logits_at, merge
from kvlab.random import named_key
from kvlab.schema import ConfigError
from kvlab.tasks import Text

NUM_WINDOWS, SEQ_LEN = 5, 40


@pytest.fixture
def text(tmp_path):
    """A file of words that come again, of 4,000 bytes."""
    rng = np.random.default_rng(0)
    words = ["alpha ", "beta ", "gamma\n", "delta ", "q", "zx"]
    path = tmp_path / "book.txt"
    path.write_bytes("".join(rng.choice(words, 4000)).encode()[:4000])
    return path


def words(path, *changes):
    return [
        f"task.path={path}", f"task.seq_len={SEQ_LEN}", "task.decode_len=7", f"task.num_test={NUM_WINDOWS}",
        "task.num_validation=2", "model.model_dim=16", "model.mlp_dim=16", "mixer.A.head_dim=4", "model.num_layers=1",
        "train.num_steps=0", "measure.batch_size=3", "measure.decode_steps=4", "memory.chunk_len=8",
        f"results_dir={path.parent}/results", *changes,
    ]  # fmt: skip


def expected(config, most=None):
    """nll and number of the labels of each part, from every window of the test alone."""
    lab = Laboratory.of(config)
    assert isinstance(lab.task, Text)
    (part,) = lab.task.slices("test")
    batch = lab.task.eval_batch(jax.random.fold_in(named_key(config.seed, "eval"), 1), "test", part, 0, NUM_WINDOWS)
    model = merge(lab.model.structure, lab.model.params)
    everywhere = jnp.broadcast_to(jnp.arange(SEQ_LEN, dtype=jnp.int32), batch.tokens.shape)
    logits = np.asarray(logits_at(model, model.parallel(batch.tokens, None), everywhere), np.float64)
    counts = Counter(pairwise(bytes(lab.task.corpus["train"])))
    sums = {"recall": [0.0, 0], "rest": [0.0, 0]}
    for row in range(NUM_WINDOWS):
        tokens = np.asarray(batch.tokens[row]).tolist()
        for place, label in zip(*(np.asarray(x[row]).tolist() for x in (batch.label_positions, batch.labels))):  # noqa: B905
            bigram = (tokens[place], label)
            hit = bigram in list(pairwise(tokens[: place + 1])) and (most is None or counts[bigram] <= most)
            at = logits[row, place]
            name = "recall" if hit else "rest"
            sums[name][0] += math.log(np.exp(at - at.max()).sum()) + at.max() - at[label]
            sums[name][1] += 1
    return sums


@pytest.mark.parametrize(
    ("task", "most", "changes"),
    [
        ("text", None, []),
        ("text", 150, ["task.max_bigram_count=150", "task.num_scored=30"]),
        ("text", 0, ["task.max_bigram_count=0"]),
        ("perplexity", None, ["task.num_scored=30", "memory.format=int8"]),
    ],
)
def test_a_record_has_both_parts_and_their_shares(text, task, most, changes, capsys):
    config = compose([f"task={task}", *words(text, *changes)])
    assert execute(config) == "done"
    (record,) = records = read_records(text.parent / "results")
    assert isinstance(record, Done)
    quality = record.quality
    parts = quality.parts["text"]
    sums = expected(config, most)
    total = sum(number for _, number in sums.values())
    assert total == NUM_WINDOWS * (30 if "task.num_scored=30" in changes else SEQ_LEN)
    shares = {name: part.share for name, part in parts.items()}
    assert shares == {name: number / total for name, (_, number) in sums.items()}
    nats = {"text": lambda value: value * math.log(2), "perplexity": math.log}[task]
    tolerance = 0.01 if "memory.format=int8" in changes else 1e-5
    for name, (nll, number) in sums.items():
        if number:
            assert nats(parts[name].value) == pytest.approx(nll / number, abs=tolerance)
        else:
            assert parts[name].value is None
    mean = sum(part.share * nats(part.value) for part in parts.values() if part.value is not None)
    assert mean == pytest.approx(nats(quality.value), abs=1e-12), "weighted by shares they are the whole"
    if most == 0:
        assert sums["recall"][1] == 0, "every bigram of this text is in its training split"
    else:
        assert 0.05 < shares["recall"] < 0.95

    frame, found = load(text.parent / "results"), points(records)
    for name, part in parts.items():
        assert frame[f"quality.text {name} share"].tolist() == [part.share]
        assert frame[f"quality.text {name}"].tolist() == [part.value]
    assert found[0].parts == parts
    row = frontier_frame(found, protocol_rows(found, records)).iloc[0]
    assert (row["rest"], row["rest_share"]) == (parts["rest"].value, parts["rest"].share)
    print_records(list(records))
    assert f"rest: {parts['rest'].value:.4f}" in " ".join(capsys.readouterr().out.split())


def test_tasks_of_one_kind_of_label_have_no_parts(tmp_path):
    from tests.lab.small import small

    lab = Laboratory.of(small(tmp_path))
    scorer = Scorer(lab.model.structure, lab.task, named_key(0, "eval"), 4)
    scores = scorer.through_memory(lab.model.params, "test", lab.layout(lab.task.context_len, 4))
    assert all(part.parts == {} for part in scores)


def test_a_text_that_nothing_trains_on_has_no_counts():
    with pytest.raises(ConfigError, match="max_bigram_count = 3: must be null with whole=true"):
        compose(["task=perplexity", "task.max_bigram_count=3"])
