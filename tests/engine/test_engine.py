"""What the engine promises whatever the model: the same tokens however it runs, clear ends, clear errors."""

import random

import numpy as np
import pytest

from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.memory.layout import MemoryConfig
from kvlab.models.model import Model
from tests.contracts import build as build_variant
from tests.engine import ways
from tests.engine.families import (
    MAX_LEN,
    PROMPTS,
    SAMPLED,
    TIGHT,
    Oracle,
    checked,
    config_of,
    engine_of,
    shared,
)


@pytest.mark.parametrize(
    "family", ["llama_gqa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "mamba2"))]
)
def test_the_way_it_runs_changes_no_token(family):
    """Sampled and penalised requests, too: noise belongs to (seed, sample, position)."""
    samplings = [SAMPLED, Sampling(max_tokens=20), Sampling(max_tokens=20, repetition_penalty=1.3), SAMPLED]
    expected = [answer.tokens for answer in shared(family).generate(ways.PROMPTS, samplings)]
    assert len(set(map(tuple, expected))) == len(expected)
    for name, way in ways.WAYS.items():
        assert ways.answers(engine_of(family, **{**TIGHT, **way}), samplings, name) == expected, name


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
        pytest.param("llama_gqa", "llama_mqa", marks=pytest.mark.slow),
        pytest.param("mamba2", "mamba2", marks=pytest.mark.slow),
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


@pytest.mark.parametrize("variant", ["window_sinks", "hybrid", pytest.param("mamba2_groups", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("num_drafts", [3, pytest.param(1, marks=pytest.mark.slow)])
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
