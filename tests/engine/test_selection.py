"""The engine over a memory of which steps read only some pages: the same answers however it runs."""

from functools import cache

import numpy as np
import pytest

from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.memory.layout import MemoryConfig, stored_states
from kvlab.models.transformer import merge
from kvlab.selection.quest import Quest
from tests.engine.families import VOCAB, Oracle, checked, config_of, pretrained
from tests.engine.ways import EVERYWHERE, WAYS
from tests.selection.brute_force import logits_of
from tests.weights.random_checkpoint import prompt

PAGE, NUM_NEW = 4, 24
PROMPTS = [prompt(n, VOCAB) for n in (5, 17, 33)]
PROMPTS.append(PROMPTS[2][:21] + PROMPTS[1])
"""The last shares pages with the one before it."""


def memory_of(prefill, chunk_len=8):
    return MemoryConfig("paged", PAGE, chunk_len, selection=Quest(fraction=0.4, dense_layers=0, prefill=prefill))


def engine_of(prefill, *, chunk_len=8, **fields):
    config = config_of(chunk_len, **fields)
    return checked(Engine(pretrained("llama_gqa").model, memory=memory_of(prefill, chunk_len), config=config))


@cache
def answers(prefill):
    """Of an engine without anything special about it."""
    return [answer.tokens for answer in engine_of(prefill).generate(PROMPTS, Sampling(max_tokens=NUM_NEW))]


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_answers_are_what_brute_force_says(prefill):
    """Greedy: every token is the one with the largest logit of a complete sequence in float64."""
    model, memory = pretrained("llama_gqa").model, memory_of(prefill)
    states = stored_states(model.states, memory)
    for ids, found in zip(PROMPTS[1:3], answers(prefill)[1:3], strict=True):
        whole = np.array([*ids, *found])
        logits = logits_of(merge(model.structure, model.params), states, memory.selection, PAGE, whole, len(ids))
        assert logits[len(ids) - 1 : -1].argmax(axis=1).tolist() == found


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("way", [*EVERYWHERE, "chunks of 5"])
def test_the_way_it_runs_changes_no_token(prefill, way):
    engine = engine_of(prefill, **WAYS[way])
    found = engine.generate(PROMPTS, Sampling(max_tokens=NUM_NEW))
    assert [answer.tokens for answer in found] == answers(prefill)
    if way in ("preempted", "swapped"):
        assert engine.scheduler.counters.preempted


def test_drafts_that_are_accepted_in_part_change_no_token():
    engine = engine_of("dense", speculation="ngram", num_drafts=3)
    known = {tuple(ids): tokens for ids, tokens in zip(PROMPTS, answers("dense"), strict=True)}
    engine.speculation.drafter = Oracle(known, 3)
    found = engine.generate(PROMPTS, Sampling(max_tokens=NUM_NEW))
    assert [answer.tokens for answer in found] == answers("dense")
    assert 0 < engine.stats.accepted_tokens < engine.stats.drafted_tokens


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_an_answer_in_a_later_prompt_is_read_as_a_prompt(prefill):
    """What was decoded is not found again where prompts are read in another way; where they are not, it is."""
    engine, sampling = engine_of(prefill), Sampling(max_tokens=NUM_NEW)
    first = engine.generate(PROMPTS[2:3], sampling)[0].tokens
    longer = [PROMPTS[2] + first + [7, 9]]
    before = engine.stats.prefilled_tokens
    again = engine.generate(longer, sampling)[0].tokens
    assert again == engine_of(prefill, prefix_cache=False).generate(longer, sampling)[0].tokens
    shared = 32 if prefill == "dense" else 56  # of 33 tokens of the prompt and 24 of the answer, less the newest
    assert engine.stats.prefilled_tokens - before == len(longer[0]) - shared


def test_samples_share_pages_until_they_part():
    sampling = Sampling(max_tokens=NUM_NEW, temperature=0.9, seed=3, num_samples=3)
    together = engine_of("dense").generate(PROMPTS[1:2], sampling)[0]
    apart = engine_of("dense", max_batch=1).generate(PROMPTS[1:2], sampling)[0]
    assert [sample.tokens for sample in together.completions] == [sample.tokens for sample in apart.completions]
    assert len({tuple(sample.tokens) for sample in together.completions}) > 1


def test_bytes_read_are_fewer():
    engines = [
        engine_of("dense"),
        Engine(pretrained("llama_gqa").model, memory=MemoryConfig("paged", PAGE, 8), config=config_of(8)),
    ]
    for engine in engines:
        engine.generate(PROMPTS[2:3], Sampling(max_tokens=NUM_NEW))
    assert engines[0].stats.read_bytes < engines[1].stats.read_bytes
