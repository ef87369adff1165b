"""The memory and what it must agree with: the parallel form, or in a lossy format the parallel form rounded to it."""

from dataclasses import replace

import jax
import pytest

from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.score import Scorer, SliceScore
from kvlab.evaluation.verify import EXACT, must_agree, verify
from kvlab.lab.laboratory import Laboratory
from kvlab.memory.layout import stored_states
from kvlab.models.model import Model
from kvlab.random import named_key
from kvlab.tasks.metrics import ACCURACY, BITS_PER_BYTE, METRICS, PERPLEXITY, Sums
from tests.lab.test_execute import small


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """An untrained model with large keys, so that formats show, through memories of several formats."""
    folder = tmp_path_factory.mktemp("scored")
    base = small(folder)
    lab = Laboratory.of(base)
    params = jax.tree.map(lambda leaf: 3 * leaf, lab.model.params)
    scorer = Scorer(lab.model.structure, lab.task, named_key(0, "eval"), 4)
    parallel = scorer.parallel(params, "test")

    def through(format):
        memory = replace(base.memory, format=format)
        lab_there = replace(lab, config=replace(base, memory=memory))
        layout = lab_there.layout(lab.task.context_len, 4)
        check = None if layout.is_exact else MaskCheck(scorer.structure, params, layout)
        scores = scorer.through_memory(params, "test", layout, check)
        given = {"metric": lab.task.metric, "memory": memory, "dtype": "float32", "check": check}
        return scores, given

    return scorer, params, parallel, through


def test_an_exact_memory_agrees_with_the_parallel_form(scored):
    _, _, parallel, through = scored
    scores, given = through("model")
    assert given["check"] is None
    assert verify(scores, parallel, **given) == EXACT


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_lossy_memory_agrees_with_the_form_rounded_to_it_and_with_no_other(scored, format):
    scorer, params, parallel, through = scored
    scores, given = through(format)
    assert verify(scores, parallel, **given) == f"{EXACT} with what is stored rounded to {format}"
    assert given["check"].num_compared >= 8
    other_format = {"int8": "int4", "int4": "int8"}[format]
    states = Model(scorer.structure, params).states
    right, wrong = (
        scorer.parallel(params, "test", stored_states(states, replace(given["memory"], format=name)))
        for name in (format, other_format)
    )
    must_agree(scores, right, BITS_PER_BYTE, "float32")
    for other in (parallel, wrong):
        with pytest.raises(RuntimeError, match="they must agree within"):
            must_agree(scores, other, BITS_PER_BYTE, "float32")


def score(nll=1.0, correct=10.0, weight=200.0):
    return SliceScore(name="s", nll=nll, correct=correct, weight=weight)


@pytest.mark.parametrize(
    ("metric", "near", "far"),
    [
        (ACCURACY, score(correct=12.0), score(correct=12.5)),  # two labels may flip
        (BITS_PER_BYTE, score(nll=1.13), score(nll=1.15)),  # 1e-3 bits of 200 labels are 0.139 nats
        (PERPLEXITY, score(nll=1.19), score(nll=1.21)),  # in nats, 1e-3 a label
    ],
)
def test_a_metric_says_what_still_agrees(metric, near, far):
    must_agree([near], [score()], metric, "float32")
    must_agree([far], [score()], metric, "bfloat16")
    with pytest.raises(RuntimeError, match=f"slice s: {metric.name} through the memory is"):
        must_agree([far], [score()], metric, "float32")
    with pytest.raises(RuntimeError):
        must_agree([score(nll=float("nan"), correct=float("nan"))], [score()], metric, "float32")


def test_metrics_from_sums_and_their_directions():
    sums = Sums(nll=20.0, correct=5.0, weight=10.0)
    assert {name: metric.from_sums(sums) for name, metric in METRICS.items()} == {
        "accuracy": 0.5,
        "bits_per_byte": pytest.approx(2 / 0.6931471805599453),
        "perplexity": pytest.approx(7.38905609893065),
    }
    assert ACCURACY.is_better(0.6, 0.5)
    assert PERPLEXITY.is_better(5.0, 6.0)
    assert ACCURACY.has_reached(0.5, 0.5)
    assert not PERPLEXITY.has_reached(6.1, 6.0)
    assert not any(metric.has_reached(float("nan"), 1.0) for metric in METRICS.values())
