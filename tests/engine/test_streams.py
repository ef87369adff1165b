"""What a user hears: text, stops, alternatives and streams, and what happens when nobody listens any more."""

import numpy as np
import pytest

from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.tokenizers import ByteTokenizer
from tests.engine.bytes_model import build_bytes
from tests.engine.families import MAX_LEN, PROMPTS, checked, engine_of, shared


def test_stops_and_text_and_streams():
    """A model over bytes: stop strings are cut off, stop tokens kept, and the stream spells the text."""
    model = build_bytes()
    engine = checked(
        Engine(model, config=EngineConfig(max_batch=2, max_len=80, prefix_cache=False), tokenizer=ByteTokenizer())
    )
    (free,) = engine.generate(["hello"], Sampling(max_tokens=30))
    assert free.text == bytes(free.tokens).decode(errors="replace")
    stop_token = free.tokens[7]
    (stopped,) = engine.generate(["hello"], Sampling(max_tokens=30, stop_tokens=(stop_token,)))
    assert stopped.tokens == free.tokens[: free.tokens.index(stop_token) + 1]
    assert stopped.completions[0].finish_reason == "stop"
    stop = free.text[9:12]
    (cut,) = engine.generate(["hello"], Sampling(max_tokens=30, stop=(stop, "never said")))
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.completions[0].finish_reason == "stop"
    events = list(engine.stream(["hello"], Sampling(max_tokens=30, stop=(stop,))))
    assert "".join(event.text for event in events) == cut.text
    assert [event.token for event in events] == cut.tokens
    assert not engine.requests
    assert not engine.answers


def test_alternatives_are_the_most_likely():
    (answer,) = shared("llama_gqa").generate([PROMPTS[2]], Sampling(max_tokens=6, num_logprobs=3))
    completion = answer.completions[0]
    assert [best.tokens[0] for best in completion.alternatives] == completion.tokens
    assert all(
        len(best.tokens) == 3 and best.logprobs == sorted(best.logprobs, reverse=True)
        for best in completion.alternatives
    )
    np.testing.assert_allclose([best.logprobs[0] for best in completion.alternatives], completion.logprobs, atol=1e-6)


def test_a_cancelled_request_keeps_what_it_said_and_disturbs_nobody():
    expected = shared("llama_gqa").generate(PROMPTS, Sampling(max_tokens=12))
    engine = engine_of("llama_gqa", pool_len=MAX_LEN, page_size=4)
    names = [engine.submit(ids, Sampling(max_tokens=12)) for ids in PROMPTS]
    for _ in range(9):
        engine.step()
    for name in (names[0], names[5]):
        if name in engine.requests:
            engine.cancel(name)
    while engine.requests:
        engine.step()
    for place, name in enumerate(names):
        answer = engine.answers.pop(name)
        completion = answer.completions[0]
        if completion.finish_reason == "cancelled":
            assert completion.tokens == expected[place].tokens[: len(completion.tokens)]
        else:
            assert answer.tokens == expected[place].tokens
    with pytest.raises(KeyError, match="is not running"):
        engine.cancel(names[0])
    assert not engine.ledger.sequences


def test_a_stream_that_nobody_hears_is_cancelled():
    engine = engine_of("llama_gqa")
    stream = engine.stream(PROMPTS, Sampling(max_tokens=30))
    next(stream)
    stream.close()
    assert not engine.requests
    assert not engine.ledger.sequences
    engine.stream(PROMPTS, Sampling(max_tokens=30)).close()
    assert not engine.requests
    unheard = engine.stream(PROMPTS, Sampling(max_tokens=30))
    assert engine.requests
    del unheard
    assert not engine.requests
    assert not engine.answers


def test_a_stream_that_goes_in_the_middle_of_a_step_is_cancelled_after_it(monkeypatch):
    engine = engine_of("llama_gqa")
    streams = [engine.stream(PROMPTS[:2], Sampling(max_tokens=30))]
    next(streams[0])
    settle = engine.settler.settle
    monkeypatch.setattr(engine.settler, "settle", lambda *args: (streams.clear(), settle(*args))[1])
    while engine.requests:
        engine.step()
    assert not streams
    assert engine.stats.decoded_tokens < 60
    assert not engine.answers
    assert not engine.ledger.sequences


def test_streams_hear_everything_whoever_steps():
    """Two streams in turns, a `generate` in between, a request cancelled from outside."""
    engine = engine_of("llama_gqa")
    expected = [answer.tokens for answer in engine.generate(PROMPTS[:3], Sampling(max_tokens=12))]
    first, second = (engine.stream([ids], Sampling(max_tokens=12)) for ids in PROMPTS[:2])
    heard = [[], []]
    for _ in range(5):
        heard[0].append(next(first).token)
        heard[1].append(next(second).token)
    (third,) = engine.generate(PROMPTS[2:3], Sampling(max_tokens=12))
    assert third.tokens == expected[2]
    for tokens, stream in zip(heard, (first, second), strict=True):
        tokens += [event.token for event in stream]
    assert heard == expected[:2]
    assert not engine.answers
    cut = engine.stream(PROMPTS[:1], Sampling(max_tokens=12))
    begun = next(cut)
    engine.cancel(begun.name)
    assert [event.finish_reason for event in cut] == ["cancelled"]


def test_names_of_the_engine_leave_those_of_users_alone():
    engine = engine_of("llama_gqa")
    mine = engine.submit(PROMPTS[1], Sampling(max_tokens=2), name="request-1")
    (answer,) = engine.generate([PROMPTS[2]], Sampling(max_tokens=2))
    assert answer.name not in (mine, "")


def test_text_is_written_while_steps_are_planned_ahead():
    """The same text and events as where nothing is committed early; a stop string ends in both."""

    class Letters(ByteTokenizer):
        def decode(self, ids):
            return "".join(chr(65 + token % 26) for token in ids)

    tokenizer = Letters()
    samplings = [Sampling(max_tokens=20, temperature=1.0, seed=seed) for seed in range(4)]
    first = shared("llama_gqa").generate([PROMPTS[3]], samplings[0])[0]
    letters = tokenizer.decode(first.tokens)
    samplings[0] = Sampling(**{**vars(samplings[0]), "stop": (letters[5:7],)})

    def run(early):
        engine = engine_of("llama_gqa", tokenizer=tokenizer)
        if not early:
            engine.settler.commit_early = lambda *_: False
        events = list(engine.stream([PROMPTS[3]] * 4, samplings))
        return engine.stats.planned_ahead, sorted(events)

    (ahead, found), (never, expected) = run(True), run(False)
    assert found == expected
    assert ahead > never == 0
    assert {event.finish_reason for event in found} == {None, "stop", "length"}


def test_text_that_was_held_back_is_told_when_a_request_is_cancelled():
    """Of every sample: joined, the events' text is the answers'."""

    class Signs(ByteTokenizer):
        def decode(self, ids):
            return "ab" * len(ids)

    engine = engine_of("llama_gqa", tokenizer=Signs())
    sampling = Sampling(max_tokens=30, num_samples=2, temperature=1.0, stop=("ab" * 20 + "c",))
    stream = engine.stream([PROMPTS[1]], sampling)
    events = [next(stream) for _ in range(6)]
    assert not any(event.text for event in events)
    engine.cancel(events[0].name)
    events += list(stream)
    assert [event.finish_reason for event in events[-2:]] == [None, "cancelled"]
    for index in (0, 1):
        told = [event for event in events if event.sample == index]
        tokens = [event.token for event in told if event.token is not None]
        assert tokens
        assert "".join(event.text for event in told) == "ab" * len(tokens)
