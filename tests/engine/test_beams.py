"""Beam search: forks, pauses, stops and its stream."""

import pytest

from kvlab.engine.sampling import Sampling
from tests.engine.families import (
    PROMPTS,
    VOCAB,
    engine_of,
    shared,
)
from tests.weights.random_checkpoint import prompt


@pytest.mark.parametrize("preemption", [pytest.param("recompute", marks=pytest.mark.slow), "swap"])
def test_beams_that_pause_make_room_for_each_other(preemption):
    asked = [prompt(20, VOCAB, seed=i) for i in range(2)]
    sampling = Sampling(max_tokens=20, beam_width=4)
    expected = shared("llama_gqa").generate(asked, sampling)
    engine = engine_of(
        "llama_gqa",
        page_size=4,
        chunk_len=8,
        max_len=48,
        pool_len=48,
        preemption=preemption,
        host_len=60,
        prefix_cache=False,
    )
    names = [engine.submit(ids, sampling) for ids in asked]
    for _ in range(2000):
        engine.step()
        if not engine.requests:
            break
    assert not engine.requests
    assert [engine.answers[name].tokens for name in names] == [answer.tokens for answer in expected]


def test_beams_may_all_stop_at_once_and_be_cancelled():
    engine = engine_of("llama_gqa")
    (answer,) = engine.generate([PROMPTS[1]], Sampling(max_tokens=4, beam_width=2, stop_tokens=tuple(range(VOCAB))))
    assert [len(completion.tokens) for completion in answer.completions] == [1, 1]
    assert {completion.finish_reason for completion in answer.completions} == {"stop"}
    name = engine.submit(PROMPTS[2], Sampling(max_tokens=20, beam_width=3))
    for _ in range(7):
        engine.step()
    engine.cancel(name)
    found = engine.answers.pop(name).completions
    assert len(found) == 3
    assert [answer.score for answer in found] == sorted((answer.score for answer in found), reverse=True)
    assert {event.finish_reason for event in found} == {"cancelled"}
    assert not engine.ledger.sequences


@pytest.mark.parametrize("way", [{}, {"prefix_cache": False}, {"max_batch": 3}])
def test_beams_are_forked_and_nothing_of_them_is_computed_twice(way):
    engine = engine_of("llama_gqa", **{"max_batch": 4, **way})
    forked, fork = [], engine.ledger.fork
    engine.ledger.fork = lambda parent, child: (forked.append(child), fork(parent, child))
    engine.generate([PROMPTS[4]], Sampling(max_tokens=20, beam_width=3))
    assert len(forked) >= 10
    assert engine.stats.prefilled_tokens == len(PROMPTS[4])


def test_a_beam_search_streams_its_best_beam_when_it_has_ended():
    sampling = Sampling(max_tokens=6, beam_width=2)
    events = list(engine_of("llama_gqa").stream([PROMPTS[1]], sampling))
    (answer,) = shared("llama_gqa").generate([PROMPTS[1]], sampling)
    assert [event.token for event in events] == answer.tokens
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["length"]
