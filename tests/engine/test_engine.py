"""What the engine promises whatever the model: the same tokens however it runs, clear ends, clear errors."""

import random

import jax
import numpy as np
import pytest

from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.requests import GenerationError
from kvlab.engine.runner import Group
from kvlab.engine.sampling import Sampling
from kvlab.engine.shapes import Buckets
from kvlab.engine.speculative import Drafter
from kvlab.memory.layout import MemoryConfig
from kvlab.models.model import Model
from kvlab.schema import ConfigError
from kvlab.tokenizers import ByteTokenizer
from tests.contracts import build as build_variant
from tests.engine.families import MAX_LEN, VOCAB, Oracle, checked, config_of, engine_of, pretrained, shared
from tests.weights.random_checkpoint import prompt

SLOW = pytest.mark.slow
PROMPTS = [prompt(n, VOCAB) for n in (1, 5, 16, 17, 33, 40)]
SAMPLED = Sampling(max_tokens=20, temperature=0.9, top_k=50, top_p=0.95, seed=3)
TIGHT = {"max_batch": 2, "chunk_len": 8, "page_size": 4, "pool_len": MAX_LEN, "host_len": 300}
"""Somebody must make room; and the ways below that are not about shapes share their programs."""
WAYS = {
    "preempted": {},
    "swapped": {"preemption": "swap"},
    "budget of 3": {"token_budget": 3},
    "no cache": {"prefix_cache": False},
    "prompts first": {"mixed": False},
    "looked up": {"speculation": "ngram", "num_drafts": 2},
    "page 7": {"page_size": 7, "chunk_len": 5},
    "one by one": {"max_batch": 1},
}


@pytest.mark.parametrize("family", ["llama_gqa", *(pytest.param(name, marks=SLOW) for name in ("mistral", "mamba2"))])
def test_the_way_it_runs_changes_no_token(family):
    """Sampled and penalised requests, too: noise belongs to (seed, sample, position)."""
    prompts = [PROMPTS[i] for i in (1, 3, 4, 5)]
    samplings = [SAMPLED, Sampling(max_tokens=20), Sampling(max_tokens=20, repetition_penalty=1.3), SAMPLED]
    expected = shared(family).generate(prompts, samplings)
    assert len({tuple(answer.tokens) for answer in expected}) == len(prompts)
    for name, way in WAYS.items():
        order = random.Random(name).sample(range(len(prompts)), len(prompts))
        engine = engine_of(family, **{**TIGHT, **way})
        found = engine.generate([prompts[i] for i in order], [samplings[i] for i in order])
        for i, answer in zip(order, found, strict=True):
            assert answer.tokens == expected[i].tokens, f"{name}, prompt {i}"


def test_the_place_of_pages_changes_no_token():
    """Free pages in another order, so that every sequence lies elsewhere."""
    expected = shared("llama_gqa").generate(PROMPTS, SAMPLED)
    engine = engine_of("llama_gqa", page_size=4)
    random.Random(0).shuffle(engine.ledger.stores[0].free)
    assert [answer.tokens for answer in engine.generate(PROMPTS, SAMPLED)] == [answer.tokens for answer in expected]


def test_dense_memory_gives_the_same_tokens():
    expected = shared("llama_gqa").generate(PROMPTS, SAMPLED)
    found = engine_of("llama_gqa", memory="dense").generate(PROMPTS, SAMPLED)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]


def test_what_was_computed_once_is_found_again():
    engine = engine_of("llama_gqa", page_size=4)
    first = engine.generate([PROMPTS[4]], Sampling(max_tokens=8))[0]
    computed = engine.stats.prefilled_tokens
    longer = PROMPTS[4] + first.tokens + [7, 9]
    again = engine.generate([longer], Sampling(max_tokens=8))[0]
    assert (
        engine.stats.prefilled_tokens - computed <= 6
    )  # 43 tokens, of which 40 were stored and 4 * 9 or 4 * 10 shared
    assert shared("llama_gqa").generate([longer], Sampling(max_tokens=8))[0].tokens == again.tokens
    elsewhere = engine.submit(longer, Sampling(max_tokens=1), namespace="another")
    before = engine.stats.prefilled_tokens
    while elsewhere in engine.requests:
        engine.step()
    assert engine.stats.prefilled_tokens - before == len(longer), "namespaces share nothing"


@pytest.mark.parametrize("family", ["llama_gqa", "mamba2"])
@pytest.mark.parametrize("way", [{}, {"pool_len": MAX_LEN, "page_size": 4}, {"prefix_cache": False}, {"max_batch": 2}])
def test_samples_of_one_prompt_are_what_separate_requests_would_say(family, way):
    """They share the prompt's memory; the first one is the request's own."""
    engine = engine_of(family, **way)
    for ids in (PROMPTS[0], PROMPTS[3]):
        sampling = Sampling(max_tokens=12, temperature=1.0, seed=11, num_samples=3)
        (together,) = engine.generate([ids], sampling)
        assert len({tuple(completion.tokens) for completion in together.completions}) == 3
        (alone,) = engine.generate([ids], Sampling(max_tokens=12, temperature=1.0, seed=11))
        assert alone.tokens == together.tokens
    if way == {}:  # forked: the prompt was computed once
        engine = engine_of(family)
        engine.generate([PROMPTS[3]], Sampling(max_tokens=12, num_samples=3))
        assert engine.stats.prefilled_tokens == len(PROMPTS[3]) - 1 + 3


@pytest.mark.parametrize(
    ("family", "drafting"),
    [
        ("llama_gqa", "llama_gqa"),
        pytest.param("llama_gqa", "llama_mqa", marks=SLOW),
        pytest.param("mamba2", "mamba2", marks=SLOW),
    ],
)
def test_a_draft_model_changes_no_token_and_a_perfect_one_is_always_right(family, drafting):
    sizes = {"max_batch": 2, "page_size": 4, "chunk_len": 8}
    engine = engine_of(family, speculation="draft", num_drafts=3, draft=drafting, **sizes)
    for sampling in (Sampling(max_tokens=17), Sampling(max_tokens=17, temperature=0.8, seed=1)):
        expected = shared(family).generate(PROMPTS[1:4], sampling)
        found = engine.generate(PROMPTS[1:4], sampling)
        assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    assert engine.stats.drafted_tokens
    if drafting == family:
        assert engine.stats.acceptance_rate > 0.99  # near ties may round differently in another batch shape
    assert not engine.speculation.drafter.ledger.sequences


def test_a_rejected_draft_leaves_recurrent_states_bit_for_bit():
    engine = engine_of("mamba2", speculation="ngram", num_drafts=3, prefix_cache=False, chunk_len=16)
    engine.submit(PROMPTS[2], Sampling(max_tokens=10))
    engine.step()

    class Wrong(type(engine.speculation.drafter)):
        def propose(self, samples):
            return [[1, 2, 3] for _ in samples]

    engine.speculation.drafter = Wrong(3)
    (sample,) = engine.scheduler.running
    slot = lambda: [h.pages[0] for h in engine.ledger.running[sample.name].holdings]  # noqa: E731
    before = [
        {k: np.asarray(v[s]) for k, v in pool.items()}
        for s, pool in zip(slot(), engine.runner.pools[0].values(), strict=True)
    ]
    engine.step()
    assert engine.stats.drafted_tokens == 3
    assert engine.stats.accepted_tokens == 0
    after = [
        {k: np.asarray(v[s]) for k, v in pool.items()}
        for s, pool in zip(slot(), engine.runner.pools[0].values(), strict=True)
    ]
    for old, new in zip(before, after, strict=True):
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])


def test_steps_are_padded_to_the_sizes_that_are_named():
    """Fewer programs, and not a token changes."""
    prompts = [prompt(n, VOCAB, seed=n) for n in (1, 3, 5)]
    named = engine_of("llama_gqa", max_batch=4, chunk_len=4, row_sizes=(4,), width_sizes=(4,))
    tokens = [answer.tokens for answer in named.generate(prompts, Sampling(max_tokens=4))]
    assert tokens == [answer.tokens for answer in shared("llama_gqa").generate(prompts, Sampling(max_tokens=4))]
    assert named.stats.shapes == {(4, 4, False), (4, 1, False)}
    with pytest.raises(ConfigError, match="row_sizes = \\[8\\]: must each be at most max_batch = 4"):
        EngineConfig(max_batch=4, row_sizes=(8,))


def test_sizes_are_the_least_that_hold_it():
    """Named ones first; without one, powers of two, for rows one and a half of one as well."""
    assert [Buckets().rows_for(n, 48) for n in (1, 2, 3, 4, 5, 7, 13, 33, 48)] == [1, 2, 3, 4, 6, 8, 16, 48, 48]
    assert [Buckets().width_for(n, 20) for n in (1, 2, 3, 9, 17)] == [1, 2, 4, 16, 20]
    named = Buckets(rows=(2, 8), widths=(5, 64))
    assert [named.rows_for(n, 16) for n in (1, 2, 3, 8, 9)] == [2, 2, 8, 8, 12]
    assert [named.width_for(n, 20) for n in (1, 2, 5, 6)] == [1, 5, 5, 20]


def test_programs_are_few_and_bounded():
    """However ragged the requests: 1 or 2 rows, and widths of 1 or 2. Engines that are alike share their programs."""
    alike = {"max_batch": 2, "chunk_len": 2, "page_size": 3, "row_sizes": (), "width_sizes": ()}
    engine = engine_of("llama_gqa", **alike)
    rng = random.Random(0)
    lengths = [rng.randrange(1, 30) for _ in range(20)]
    samplings = [Sampling(max_tokens=rng.randrange(1, 20)) for _ in lengths]
    engine.generate([prompt(n, VOCAB, seed=1) for n in lengths], samplings)
    assert engine.stats.shapes == {(rows, width, False) for rows in (1, 2) for width in (1, 2)}
    assert engine_of("llama_gqa", **alike).runner.step_fn is engine.runner.step_fn


def test_steps_stay_within_the_budget_and_always_progress():
    engine = engine_of("llama_gqa", token_budget=5, chunk_len=16, pool_len=MAX_LEN, page_size=4)
    schedule = engine.scheduler.schedule

    def watched():
        step = schedule()
        assert 1 <= sum(part.num_new + part.lookahead for part in step.work) <= 5
        return step

    engine.scheduler.schedule = watched
    engine.generate(PROMPTS, Sampling(max_tokens=10))


def test_priorities_go_first():
    engine = engine_of("llama_gqa", max_batch=1)
    names = [engine.submit(PROMPTS[1], Sampling(max_tokens=3), priority=priority) for priority in (0, 0, 5)]
    ended = []
    while engine.requests:
        ended += [event.name for event in engine.step() if event.finish_reason]
    assert ended == [names[2], names[0], names[1]]


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


def build_bytes():
    """A random model over the 256 bytes."""
    from flax import nnx

    from kvlab.mixers.attention import AttentionConfig
    from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer

    layers = [LayerConfig("attention", AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8))]
    model = Model.of(Transformer(layers, ModelConfig(model_dim=16), 256, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(5)
    moved = jax.tree.map(lambda leaf: leaf + rng.standard_normal(leaf.shape).astype(np.float32), model.params)
    return Model(model.structure, moved)


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


@pytest.mark.parametrize(
    "bad", [{"priority": None}, {"priority": float("nan")}, {"namespace": [1]}, {"namespace": None}]
)
def test_who_asks_with_the_wrong_type_changes_nothing(bad):
    engine = engine_of("llama_gqa")
    with pytest.raises(ValueError, match=next(iter(bad))):
        engine.submit(PROMPTS[0], **bad)
    assert not engine.requests
    assert engine.generate(PROMPTS[:1], Sampling(max_tokens=3))


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
    with pytest.raises(ValueError, match="2 of them for 1 prompts"):
        shared("llama_gqa").generate([[1]], [Sampling(), Sampling()])


@pytest.mark.parametrize("variant", ["window_sinks", "hybrid", pytest.param("mamba2_groups", marks=SLOW)])
def test_variants_without_a_reference_equal_their_parallel_form(variant):
    """Greedy tokens are the argmax of the parallel form at every place, speculation and a pool too small included."""
    _, structure, params, forward = build_variant(variant)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 31, n).tolist() for n in (3, 8, 21)]
    for way in ({}, {"speculation": "ngram", "num_drafts": 3}):
        config = config_of(8, max_batch=2, max_len=40, pool_len=40, **way)
        engine = checked(Engine(Model(structure, params), memory=MemoryConfig("paged", 4, 8), config=config))
        for ids, answer in zip(prompts, engine.generate(prompts, Sampling(max_tokens=15)), strict=True):
            whole = np.array([ids + answer.tokens + [0] * (40 - len(ids) - 15)], np.int32)
            said = np.asarray(forward(whole))[0].argmax(-1)
            assert said[len(ids) - 1 : len(ids) + 14].tolist() == answer.tokens


@pytest.mark.parametrize("family", ["llama_gqa", "mamba2"])
def test_an_answer_may_stop_inside_accepted_drafts(family):
    ids = PROMPTS[2]
    (free,) = shared(family).generate([ids], Sampling(max_tokens=12))
    for place in range(0, 12, 2):
        engine = engine_of(family, speculation="ngram", num_drafts=5)
        engine.speculation.drafter = Oracle({tuple(ids): free.tokens}, 5)
        (answer,) = engine.generate([ids], Sampling(max_tokens=12, stop_tokens=(free.tokens[place],)))
        assert answer.tokens == free.tokens[: free.tokens.index(free.tokens[place]) + 1]
        assert engine.stats.accepted_tokens < len(answer.tokens)


def test_samples_of_a_prompt_that_is_found_whole():
    """17 tokens, pages of 16: the second time nothing is left to compute before the samples part."""
    engine = engine_of("llama_gqa")
    sampling = Sampling(max_tokens=3, temperature=1.0, seed=3, num_samples=3)
    first, again = (engine.generate([PROMPTS[3]], sampling)[0] for _ in range(2))
    assert [completion.tokens for completion in first.completions] == [
        completion.tokens for completion in again.completions
    ]
    (short,) = engine.generate([PROMPTS[3]], Sampling(max_tokens=1, temperature=1.0, seed=3, num_samples=3))
    assert [completion.tokens for completion in short.completions] == [
        completion.tokens[:1] for completion in first.completions
    ]


@pytest.mark.parametrize("num_drafts", [3, pytest.param(1, marks=SLOW)])
def test_a_drafted_sequence_may_miss_a_step(num_drafts):
    expected = shared("llama_gqa").generate([[1, 2], PROMPTS[4]], Sampling(max_tokens=9))
    ways = [{"mixed": False}, {"token_budget": 3}]
    if num_drafts == 1:
        ways.append({"max_len": 48, "pool_len": 48, "preemption": "swap", "host_len": 60})
    for fields in ways:
        sizes = {"max_batch": 2, "page_size": 4, "chunk_len": 8, "num_drafts": num_drafts}
        engine = engine_of("llama_gqa", speculation="draft", draft="llama_gqa", **sizes, **fields)
        names = [engine.submit([1, 2], Sampling(max_tokens=9))]
        engine.step()
        engine.step()
        names.append(engine.submit(PROMPTS[4], Sampling(max_tokens=9)))
        while engine.requests:
            engine.step()
        assert [engine.answers[name].tokens for name in names] == [answer.tokens for answer in expected]


@pytest.mark.parametrize("preemption", [pytest.param("recompute", marks=SLOW), "swap"])
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


def test_the_most_urgent_has_a_token_in_every_step():
    engine = engine_of("llama_gqa", max_batch=3, token_budget=2)
    for _ in range(2):
        engine.submit([5, 6], Sampling(max_tokens=60))
    for _ in range(5):
        engine.step()
    urgent = engine.submit(PROMPTS[1], Sampling(max_tokens=2), priority=10)
    for _ in range(len(PROMPTS[1]) + 2):
        engine.step()
    assert urgent in engine.answers


def test_names_of_the_engine_leave_those_of_users_alone():
    engine = engine_of("llama_gqa")
    mine = engine.submit(PROMPTS[1], Sampling(max_tokens=2), name="request-1")
    (answer,) = engine.generate([PROMPTS[2]], Sampling(max_tokens=2))
    assert answer.name not in (mine, "")


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


def test_steps_are_launched_while_the_device_works_and_no_token_changes():
    """Through ends by length and by a stop token, an arrival, a cancellation and a preemption."""

    def run(ahead):
        engine = engine_of("llama_gqa", page_size=4, pool_len=2 * MAX_LEN)
        if not ahead:
            engine.scheduler.schedule_ahead = lambda: None
        stopping = shared("llama_gqa").generate([PROMPTS[2]], SAMPLED)[0].tokens[9]
        names = [engine.submit(ids, SAMPLED) for ids in PROMPTS[:2]]
        names.append(engine.submit(PROMPTS[2], Sampling(**{**vars(SAMPLED), "stop_tokens": (stopping,)})))
        tokens, steps, num_ahead = {}, 0, []
        while engine.requests:
            for event in engine.step():
                if event.token is not None:
                    tokens.setdefault(event.name, []).append(event.token)
            engine.ledger.check()
            steps += 1
            num_ahead.append(engine.stats.planned_ahead)
            if steps == 5:
                names.append(engine.submit(PROMPTS[4], SAMPLED))
            if steps == 9:
                engine.cancel(names[0])
                assert len(engine.ledger.running) == 3, "what was reserved for it is free as well"
        assert not engine.ledger.sequences
        assert len(tokens[names[2]]) == 10
        assert engine.stats.decoded_tokens + len(names) == sum(map(len, tokens.values())), (
            "what was in vain is not counted"
        )
        del tokens[names[0]][9:]  # cancelled after the ninth step: how far it was then is not the point
        return [tokens[name] for name in names], num_ahead

    expected, never = run(False)
    found, num_ahead = run(True)
    assert never[-1] == 0
    assert found == expected
    assert num_ahead[4] == 4, "behind every step but the one that computes the prompts"
    assert num_ahead[5] == 4, "an arrival is let in by the next step that is not under way yet"
    assert num_ahead[-1] >= 12


def test_a_full_batch_looks_ahead_though_others_wait_until_a_place_is_free():
    engine = engine_of("llama_gqa", page_size=4, max_batch=2)
    for ids, most in zip(PROMPTS[1:4], (8, 30, 8), strict=True):
        engine.submit(ids, Sampling(max_tokens=most))
    while len(engine.scheduler.running) < 2 or engine.scheduler.running[1].num_computed < 17:
        engine.step()
    engine.step()
    before = engine.stats.planned_ahead
    engine.step()
    assert engine.scheduler.waiting
    assert engine.stats.planned_ahead == before + 1
    while engine.scheduler.waiting:
        engine.step()
    assert len(engine.scheduler.running) == 2, "whoever left made room in the very next step"


def test_where_pages_are_short_every_row_is_reserved_ahead_or_none():
    """Where not every row can have its next page, nothing is reserved, and the step after makes room as ever."""
    engine = engine_of("llama_gqa", page_size=1, max_batch=4, pool_len=MAX_LEN)
    for ids in PROMPTS[1:4]:
        engine.submit(ids, Sampling(max_tokens=40))
    while not engine.scheduler.counters.preempted:
        held = {name: entry.num_new for name, entry in engine.ledger.running.items()}
        assert len(set(held.values())) <= 1 or engine.scheduler.waiting, "all of them or none"
        engine.step()
    assert engine.stats.planned_ahead


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
