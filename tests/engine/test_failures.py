"""Requests that are refused, that break or are torn: they end with an error, and nobody else notices."""

import io

import numpy as np
import pytest
from rich.console import Console

from kvlab.engine.engine import Engine
from kvlab.engine.requests import GenerationError
from kvlab.engine.runner import Group
from kvlab.engine.sampling import Sampling
from kvlab.engine.speculative import Drafter
from kvlab.lab.live import status
from kvlab.memory.layout import MemoryConfig
from kvlab.models.model import Model
from kvlab.schema import ConfigError
from kvlab.tokenizers import ByteTokenizer
from tests.engine.deviceless import deviceless
from tests.engine.families import PROMPTS, checked, config_of, engine_of, pretrained, shared


@pytest.mark.parametrize(
    "bad",
    [
        *({"priority": value} for value in (None, float("nan"), "1", True)),
        *({"namespace": value} for value in ([1], None, b"a", "\ud800", "n" * 10_000)),
        *({"name": value} for value in (1, b"a", "", "\ud800", "a\nb", "\x1b[31m", "n" * 10_000)),
        *({"sampling": value} for value in ({}, 3, "greedy")),
        *({"prompt": value} for value in (None, 1, b"a", {1: 2}, {1}, [None], [[1]], [b"a"], ["a"], [1e3], [2**70])),
        *({"prompt": value} for value in ("\ud800", "a\udfff", np.zeros((2, 2), int), np.array(1), [10**5000], "")),
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_a_bad_request_is_refused_alone_in_words(bad):
    """Whatever is wrong with it, it is refused before it is queued, shortly, and what runs beside it goes on."""
    engine = deviceless(tokenizer=ByteTokenizer())
    beside = engine.submit([1, 2, 3], Sampling(max_tokens=4))
    engine.step()
    with pytest.raises(ValueError, match=next(iter(bad))) as caught:
        engine.submit(**{"prompt": [1, 2], "sampling": Sampling(max_tokens=4), **bad})
    assert len(str(caught.value)) < 2000
    assert list(engine.requests) == [beside]
    while engine.requests:
        engine.step()
    assert not engine.answers[beside].error


@pytest.mark.parametrize("odd", ["[/b]", "[red]", ":warning:", "\N{SNOWMAN}", "request-7", "a/b", "../x", "n" * 256])
def test_an_odd_name_or_namespace_is_a_name_as_any_other(odd):
    engine = deviceless(tokenizer=ByteTokenizer())
    assert engine.submit("text", Sampling(max_tokens=4), name=odd, namespace=odd) == odd
    while engine.requests:
        engine.step()
        print_status(engine)
    assert len(engine.answers[odd].tokens) == 4


def print_status(engine):
    Console(file=io.StringIO()).print(status(engine, 1.0))


@pytest.mark.parametrize("family", ["llama_gqa", "mamba2"])
def test_a_request_whose_numbers_break_ends_in_error_and_shares_nothing(family):
    """NaN enters through the embedding of one token: its request fails, others do not notice, nothing of it is
    published, and what reuses its pages is right."""
    model = pretrained(family).model
    table = model.params["embedding"]["embedding"]
    params = {**model.params, "embedding": {"embedding": table.at[300].set(np.nan)}}
    engine = checked(
        Engine(
            Model(model.structure, params),
            memory=MemoryConfig("paged", 4, 8),
            config=config_of(8),
        )
    )
    clean = [[token % 300 for token in ids] for ids in PROMPTS]
    poisoned = [*clean[4][:25], 300, *clean[4][25:]]
    expected = shared(family).generate(clean, Sampling(max_tokens=8))
    with pytest.raises(
        GenerationError, match="1 of 7 requests failed: request-2: logits or states at tokens"
    ) as caught:
        engine.generate([*clean[:2], poisoned, *clean[2:]], Sampling(max_tokens=8))
    answers = caught.value.answers
    assert answers[2].error
    assert answers[2].completions[0].finish_reason == "error"
    allowed = [answer for place, answer in enumerate(answers) if place != 2]
    assert [answer.tokens for answer in allowed] == [answer.tokens for answer in expected]
    hit = engine.ledger.lookup([*poisoned, 1])
    assert hit.length <= 24
    engine.ledger.unpin(hit)
    assert [answer.tokens for answer in engine.generate(clean, Sampling(max_tokens=8))] == [
        answer.tokens for answer in expected
    ]


@pytest.mark.parametrize(
    ("ids", "sampling", "message"),
    [
        ([], {}, r"prompt = \[\]: must have at least one token"),
        ([1, -1], {}, r"prompt: token -1: must be in \[0, 320\)"),
        ([320], {}, "prompt: token 320: must be in"),
        ([1.5], {}, "prompt: token 1.5: must be an integer"),
        ([True], {}, "prompt: token True: must be an integer"),
        ([1] * 113, {}, "prompt: 113 tokens: must be at most max_len = 112"),
        ([1] * 100, {"max_tokens": 50}, r"max_tokens = 50: must be in \[1, 13\]"),
        ("text", {}, "prompt: is text, and the engine has no tokenizer"),
        ([1], {"stop": ("x",)}, "stop strings need a tokenizer"),
        ([1], {"beam_width": 5}, "beam_width = 5: must be at most max_batch = 4"),
    ],
)
def test_bad_requests_are_refused_and_others_go_on(ids, sampling, message):
    engine = engine_of("llama_gqa")
    name = engine.submit(PROMPTS[1], Sampling(max_tokens=4))
    with pytest.raises(ValueError, match=message):
        engine.submit(ids, Sampling(**{"max_tokens": 4, **sampling}))
    with pytest.raises(ValueError, match=message):
        engine.generate([PROMPTS[2], ids], Sampling(**{"max_tokens": 4, **sampling}))
    assert list(engine.requests) == [name], "a batch with a bad prompt leaves nothing behind"
    with pytest.raises(ValueError, match="is in use"):
        engine.submit(PROMPTS[1], name=name)
    while engine.requests:
        engine.step()
    assert engine.answers[name].tokens == golden_start(PROMPTS[1])


def golden_start(ids):
    return shared("llama_gqa").generate([ids], Sampling(max_tokens=4))[0].tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_batch": 0}, "max_batch = 0"),
        ({"pool_len": 50}, "pool_len = 50: must hold one sequence of max_len = 112"),
        ({"preemption": "swap"}, "host_len = 0"),
        ({"speculation": "guess"}, "speculation = 'guess'"),
        ({"speculation": "draft"}, "speculation = 'draft'"),
        ({"policy": "mru"}, "policy = 'mru'"),
        ({"checkpoints": "some"}, "checkpoints = 'some'"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        engine_of("llama_gqa", **fields)


def test_one_prompt_is_not_a_list_of_prompts():
    with pytest.raises(ValueError, match="must be a list of prompts"):
        shared("llama_gqa").generate([1, 2, 3], Sampling(max_tokens=2))
    with pytest.raises(ValueError, match="2 of them for 1 prompt:"):
        shared("llama_gqa").generate([[1]], [Sampling(), Sampling()])


class Silent(Drafter):
    """Guesses nothing. Beside a drafter no step is launched behind another."""

    num_drafts = 1

    def propose(self, samples):
        return [[] for _ in samples]


@pytest.mark.parametrize("apart", [False, True])
def test_a_failing_sample_takes_the_others_of_its_request_in_the_same_step(apart):
    """The sibling decodes in the same program, or `apart` in another: the request fails, nobody else does."""
    engine = engine_of("llama_gqa", speculation="ngram" if apart else "none")
    alone = shared("llama_gqa").generate([PROMPTS[4]], Sampling(max_tokens=12))[0].tokens
    other = engine.submit(PROMPTS[4], Sampling(max_tokens=12))
    name = engine.submit(PROMPTS[1], Sampling(max_tokens=12, num_samples=2, temperature=1.0))
    if apart:
        engine.speculation.drafter = Silent()
        engine.runner.groups = lambda work, chunk_len: [Group([part], part.num_new, False) for part in work]
    while len(engine.scheduler.running) < 3:
        engine.step()
    (broken, sibling) = engine.requests[name].samples
    spoil(engine, broken)
    while sibling.state != "gone":
        assert broken.state == "running"
        engine.step()
    assert broken.state == "gone"
    assert engine.answers[name].error
    while engine.requests:
        engine.step()
    assert engine.answers[other].tokens == alone


def spoil(engine, sample, when=lambda: True):
    """From the next launch on for which `when` holds, this sequence's numbers are not finite."""
    launch = engine.runner.launch

    def spoiled(*args):
        launched = launch(*args)
        if when():
            rows = len(launched.finite)
            sound = [part.entry is not sample for part in launched.group.work]
            launched.finite = launched.finite & np.array(sound + [True] * (rows - len(sound)))
        return launched

    engine.runner.launch = spoiled


def test_a_page_filled_by_a_step_that_breaks_is_given_to_nobody():
    """Two requests of the same tokens decode side by side; the first breaks in the step that fills a page."""
    engine = engine_of("llama_gqa", page_size=4)
    names = [engine.submit(PROMPTS[1], Sampling(max_tokens=20)) for _ in range(2)]
    first, second = (engine.requests[name].samples[0] for name in names)
    shared_before = []

    def fills_a_page():
        filling = first.num_computed == second.num_computed == 11
        if filling:
            shared_before.append(engine.ledger.counters.deduplicated_pages)
        return filling

    spoil(engine, first, fills_a_page)
    while engine.requests:
        engine.step()
    assert engine.answers[names[0]].error == "logits or states at tokens [11, 12) are not finite"
    assert [engine.ledger.counters.deduplicated_pages] == shared_before
    expected = shared("llama_gqa").generate([PROMPTS[1]], Sampling(max_tokens=20))[0]
    assert engine.answers[names[1]].tokens == expected.tokens


@pytest.mark.parametrize("where", ["draw_tokens", "fetch", "settle", "plan"])
def test_a_torn_step_fails_its_requests_and_no_other(where, monkeypatch):
    """Whoever waited goes on as if nothing had been, and nothing that the step computed is found again."""
    engine = engine_of("llama_gqa", page_size=4, max_batch=2)
    first, second, third = (engine.submit(ids, Sampling(max_tokens=12)) for ids in PROMPTS[1:4])
    for _ in range(7):
        engine.step()

    def torn(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "draw_tokens":
            patch.setattr("kvlab.engine.runner.draw_tokens", torn)
        else:
            owner = {"settle": engine.settler, "plan": engine.ledger, "fetch": engine.runner}[where]
            patch.setattr(owner, where, torn)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert set(engine.requests) == {third}
    for name in (first, second):
        assert "a step was interrupted: KeyboardInterrupt" in engine.answers[name].error
        completion = engine.answers[name].completions[0]
        assert len(completion.tokens) == len(completion.logprobs)
    engine.ledger.check()
    assert not engine.ledger.index.cached[0]
    while engine.requests:
        engine.step()
    alone = shared("llama_gqa").generate(PROMPTS[3:4], Sampling(max_tokens=12))[0]
    assert engine.answers[third].tokens == alone.tokens
    assert engine.generate(PROMPTS[3:4], Sampling(max_tokens=12))[0].tokens == alone.tokens


def test_a_request_torn_between_its_last_sample_and_its_answer_ends(monkeypatch):
    engine = engine_of("llama_gqa")
    answer, calls = engine.book.answer, []

    def torn(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        answer(*args)

    name = engine.submit(PROMPTS[1], Sampling(max_tokens=2))
    engine.step()
    monkeypatch.setattr(engine.book, "answer", torn)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert not engine.requests
    assert len(engine.answers[name].completions[0].tokens) == 2
