"""Ctrl-C at any line of any call: every request can still be ended or answered, no page is held for nobody, and who
had not begun notices nothing."""

import gc
import random
import sys
import unittest.mock

import pytest

from kvlab.engine.sampling import Sampling
from kvlab.tokenizers import ByteTokenizer
from tests.engine.deviceless import MAX_LEN, deviceless
from tests.engine.interrupts import interrupted, num_lines
from tests.engine.test_fuzz import alone, answered

ASKED = {
    "plain": ([1] * 9, Sampling(max_tokens=12)),
    "shares": ([1] * 9 + [2], Sampling(max_tokens=8)),
    "samples": ([3] * 5, Sampling(max_tokens=9, num_samples=2)),
    "beams": ([4] * 6, Sampling(max_tokens=8, beam_width=2)),
    "waits": ([5] * 7, Sampling(max_tokens=6, num_samples=2)),
    "waits too": ([6] * 3, Sampling(max_tokens=6, beam_width=2)),
}
LATER = ([7] * 6, Sampling(max_tokens=5, num_samples=3))


def busy(**fields):
    """An engine in the middle of its work: some decode, some have made room, some wait."""
    engine = deviceless(
        max_batch=5, pool_len=MAX_LEN + 16, host_len=60, tokenizer=ByteTokenizer(), **{"speculation": "none", **fields}
    )
    for name, each in ASKED.items():
        engine.submit(*each, name=name)
    for _ in range(7):
        engine.step()
    return engine


def is_whole(engine, names):
    """What must hold after interrupts: see the top. `names` are requests that were never given to the caller, who is to
    find nothing of them."""
    known = {*engine.requests, *engine.answers}
    engine.step()
    engine.ledger.check()
    assert not names & {*engine.requests, *engine.answers}
    lost = known - names - {*engine.requests, *engine.answers}
    assert lost <= {"later"}, "a request that ended without an answer; a submission that raised may be undone"
    if "shares" in engine.requests:
        engine.cancel("shares")
    for _ in range(400):
        if not engine.requests:
            break
        engine.step()
        engine.ledger.check()
    assert not engine.requests, "a request without an end"
    for name, answer in engine.answers.items():
        expected = expected_of(name)
        assert len(answer.completions) <= len(expected)
        for completion in answer.completions:
            assert len(completion.tokens) == len(completion.logprobs)
        found = [completion.tokens for completion in answer.completions]
        if not {completion.finish_reason for completion in answer.completions} & {"cancelled", "error"}:
            assert found == expected
        elif "beam" not in name and "too" not in name:
            for tokens, whole in zip(found, expected, strict=False):
                assert tokens == whole[: len(tokens)]
    assert not engine.ledger.sequences
    assert not engine.ledger.suspended
    assert not engine.ledger.hits
    assert not engine.scheduler.num_unfinished
    assert not engine.book.beams
    assert [store.num_available for store in engine.ledger.stores] == FREE
    again = engine.submit(*LATER)
    assert answered(engine, [again]) == [expected_of("later")]


FREE = [store.num_available for store in deviceless(pool_len=MAX_LEN + 16).ledger.stores]
_EXPECTED = {}


def expected_of(name):
    if name not in _EXPECTED:
        _EXPECTED[name] = alone(*ASKED.get(name, LATER))
    return _EXPECTED[name]


def take(stream, count):
    return [next(stream) for _ in range(count)]


CALLS = {
    "submit": lambda engine: engine.submit(*LATER, name="later"),
    "cancel": lambda engine: engine.cancel("plain"),
    "cancel samples": lambda engine: engine.cancel("samples"),
    "cancel beams": lambda engine: engine.cancel("beams"),
    "cancel who waits": lambda engine: engine.cancel("waits"),
    "step": lambda engine: engine.step(),
    "stream": lambda engine: take(engine.stream([LATER[0]] * 2, LATER[1]), 3),
    "generate": lambda engine: engine.generate([LATER[0]] * 2, Sampling(max_tokens=2)),
}
WAYS = {"recompute": {}, "swap": {"preemption": "swap"}, "drafts": {"speculation": "ngram", "num_drafts": 2}}


def owned(engine, call):
    """Requests that the engine would begin for the caller, and that an interrupted call leaves nobody to end."""
    return set() if call == "submit" else {name for name in engine.requests | engine.answers if name not in ASKED}


def each_place(call, way, stride):
    lines = num_lines(lambda: CALLS[call](busy(**WAYS[way]))) - num_lines(lambda: busy(**WAYS[way]))
    return range(1, lines + 1, stride)


def check_places(call, way, places):
    for place in places:
        engine = busy(**WAYS[way])
        place = (place,) if isinstance(place, int) else place
        interrupted(lambda engine=engine: CALLS[call](engine), *place)
        if len(place) == 1:
            engine.ledger.check()
        is_whole(engine, owned(engine, call))


@pytest.fixture(autouse=True)
def unraisable_is_forgotten(monkeypatch):
    """What is raised where Python lets go of a stream is raised no further. Python prints it; pytest would keep it, and
    the stream with it."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_line(call):
    stride = {"step": 41, "stream": 401, "generate": 401}.get(call, 3)
    check_places(call, "recompute", each_place(call, "recompute", stride))


@pytest.mark.parametrize("call", ["submit", "cancel", "step", "generate"])
def test_a_second_interrupt_while_the_first_is_mended(call):
    rng = random.Random(call)
    first = each_place(call, "drafts", 1)
    places = [(place, place + rng.randrange(1, 200)) for place in rng.sample(first, 40)]
    check_places(call, "drafts", [(*pair, pair[1] + rng.randrange(1, 100)) for pair in places] + places)


@pytest.mark.parametrize("num_interrupts", [1, 2])
def test_a_stream_hears_the_end_of_its_requests_whoever_is_interrupted(num_interrupts):
    rng, sampling = random.Random(num_interrupts), Sampling(max_tokens=9, num_samples=2, temperature=1.0)
    lines = each_place("step", "recompute", 1)
    for _ in range(40):
        engine = deviceless(max_batch=5, tokenizer=ByteTokenizer())
        stream = engine.stream([[1] * 5, [2] * 9, [3]], [Sampling(max_tokens=3), sampling, Sampling(max_tokens=40)])
        heard = take(stream, rng.randrange(1, 40))
        places = [rng.choice(lines)]
        interrupted(engine.step, *places, *(places[0] + rng.randrange(1, 60) for _ in range(num_interrupts - 1)))
        heard += list(stream)
        assert len({event.name for event in heard if event.finish_reason}) == 3
        assert not engine.requests
        assert not engine.answers


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_every_line(call, way):
    check_places(call, way, each_place(call, way, 7 if call in ("stream", "generate") else 1))


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_while_python_lets_go_of_a_stream(way):
    """It is printed and raised nowhere: the next step ends what the stream had begun."""
    engine = busy(**WAYS[way])
    stream = engine.stream([LATER[0]] * 2, LATER[1])
    next(stream)
    begun = set(stream.names)
    engine.abandon = interrupt = unittest.mock.Mock(side_effect=KeyboardInterrupt)
    del stream
    gc.collect()
    assert interrupt.call_count == 1
    del engine.abandon
    assert begun & {*engine.requests, *engine.answers}
    is_whole(engine, begun)
