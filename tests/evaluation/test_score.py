"""Scores of every example and turn, against numpy in float64; prompts that are cut where a memory may compress."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.evaluation.score import Scorer, steps
from kvlab.evaluation.session import Session
from kvlab.interrupt import Interrupted
from kvlab.lab.laboratory import Laboratory
from kvlab.models.transformer import logits_at, merge
from kvlab.random import named_key
from kvlab.tasks import EvalSlice
from kvlab.tasks.mqar import Mqar
from tests.lab.test_execute import small

TURN, COMPRESS_AT = 10, 4


class TwoTurns(Mqar):
    """Queries from token 10 on are a second turn; what is stored may be compressed before the last pair."""

    def slices(self, split):
        return tuple(replace(part, compress_at=COMPRESS_AT, turns=(TURN,)) for part in super().slices(split))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    config = small(tmp_path_factory.mktemp("score"))
    return replace(Laboratory.of(config), task=TwoTurns(config.task))


@pytest.fixture(scope="module")
def scored(lab):
    scorer = Scorer(lab.model.structure, lab.task, named_key(0, "eval"), 4)
    return {
        "parallel": scorer.parallel(lab.model.params, "test"),
        "memory": scorer.through_memory(lab.model.params, "test", lab.layout(lab.task.context_len, 4)),
    }


def expected(lab, part):
    """nll, correct, weight and right of each example and turn, by numpy in float64 from the logits of each example."""
    key = jax.random.fold_in(named_key(0, "eval"), 1)
    batch = lab.task.eval_batch(key, "test", part, 0, part.num_examples)
    model = merge(lab.model.structure, lab.model.params)
    everywhere = jnp.broadcast_to(jnp.arange(part.seq_len, dtype=jnp.int32), batch.tokens.shape)
    logits = np.asarray(logits_at(model, model.parallel(batch.tokens), everywhere), np.float64)
    sums, right = np.zeros((3, part.num_examples, 2)), []
    for row in range(part.num_examples):
        order = np.argsort(np.asarray(batch.label_positions[row]))
        for place, label, weight in zip(
            *(np.asarray(each[row])[order] for each in (batch.label_positions, batch.labels, batch.weights)),
            strict=True,
        ):
            if weight:
                at = logits[row, place]
                nll = np.log(np.exp(at).sum()) - at[label]
                sums[:, row, int(place >= TURN)] += [nll, at.argmax() == label, 1]
                right.append(at.argmax() == label)
    return sums, np.array(right)


@pytest.mark.parametrize("form", ["parallel", "memory"])
def test_every_example_and_turn_is_what_numpy_says(lab, scored, form):
    for part, found in zip(lab.task.slices("test"), scored[form], strict=True):
        (nll, correct, weight), right = expected(lab, part)
        examples = found.examples
        assert (examples.num_examples, examples.num_turns) == (6, 2)
        np.testing.assert_allclose(examples.nll, nll, atol=2e-5)
        np.testing.assert_array_equal(examples.correct, correct)
        np.testing.assert_array_equal(examples.weight, weight)
        np.testing.assert_array_equal(examples.num_labels, weight)
        np.testing.assert_array_equal(examples.right, right)
        assert weight.min(axis=0).tolist() != weight.max(axis=0).tolist(), "turns have other labels in each example"
        assert found.weight == weight.sum()
        assert found.nll == pytest.approx(nll.sum(), abs=1e-4)
        assert examples.sums(1).correct == correct[:, 1].sum()


def test_the_data_are_told_apart_and_not_their_batches(lab, scored):
    params, layout = lab.model.params, lab.layout(lab.task.context_len, 5)
    by_five = Scorer(lab.model.structure, lab.task, named_key(0, "eval"), 5).through_memory(params, "test", layout)
    other = Scorer(lab.model.structure, lab.task, named_key(1, "eval"), 5).through_memory(params, "test", layout)
    for ours, same, different in zip(scored["memory"], by_five, other, strict=True):
        assert ours.data_sha256 == same.data_sha256
        np.testing.assert_allclose(ours.examples.nll, same.examples.nll, atol=1e-5)
        assert ours.data_sha256 != different.data_sha256
    assert len({part.data_sha256 for part in scored["memory"]}) == 2


def test_no_chunk_straddles_the_place_of_compression(lab, monkeypatch):
    ends, advance, release = [0], Session.advance, Session.release_all

    def watched(self, chunks, width):
        ends.append(ends[-1] + len(chunks[0]))
        return advance(self, chunks, width)

    def released(self):
        ends.append(0)
        release(self)

    monkeypatch.setattr(Session, "advance", watched)
    monkeypatch.setattr(Session, "release_all", released)
    scorer = Scorer(lab.model.structure, lab.task, named_key(0, "eval"), 4)
    scorer.through_memory(lab.model.params, "test", lab.layout(lab.task.context_len, 4))
    to_16 = [3, 4, *range(5, 17)]  # 4 tokens of 2 pairs are the prompt, in chunks of 3
    to_24 = [3, 4, 6, *range(7, 25)]
    assert ends == [0, *[*to_16, 0] * 2, *[*to_24, 0] * 2]


@pytest.mark.parametrize("form", ["parallel", "memory"])
def test_a_stop_need_not_wait_for_the_end_of_a_slice(lab, form):
    """What comes between batches comes before every one of both slices, 6 examples in batches of 4, and may end it."""
    scorer, came = Scorer(lab.model.structure, lab.task, named_key(0, "eval"), 4), []

    def between():
        came.append(form)
        if len(came) == 5:
            raise Interrupted("a test")

    def score():
        if form == "parallel":
            return scorer.parallel(lab.model.params, "test", between=between)
        return scorer.through_memory(lab.model.params, "test", lab.layout(lab.task.context_len, 4), between=between)

    assert len(score()) == 2
    assert len(came) == 4
    with pytest.raises(Interrupted):
        score()


@pytest.mark.parametrize("compress_at", [None, 1, 8, 13, 16])
@pytest.mark.parametrize("chunk_len", [1, 5, 8, 64])
def test_steps_take_every_token_once(compress_at, chunk_len):
    part = EvalSlice("s", 20, 16, 1, 0, compress_at=compress_at)
    taken = list(steps(part, chunk_len))
    assert [token for start, end, _ in taken for token in range(start, end)] == list(range(20))
    for start, end, width in taken:
        assert width == (chunk_len if start < 16 else 1)
        assert end - start <= width
        assert not any(start < border < end for border in (compress_at or 16, 16))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"compress_at": 17}, "compress_at = 17: must be in \\[1, 16\\]"),
        ({"compress_at": 0}, "compress_at = 0"),
        ({"turns": (18, 17)}, "turns = \\(18, 17\\): must ascend within \\[1, 19\\]"),
        ({"turns": (20,)}, "turns"),
        ({"turns": (0,)}, "turns"),
    ],
)
def test_a_slice_that_cannot_be_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        EvalSlice("s", 20, 16, 1, 0, **fields)
