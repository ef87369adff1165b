"""Sequences whose pages are sealed, in the engine: however they run, the same pages are sealed at the same places."""

import functools
import random

import numpy as np
import pytest

from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.engine.step import MemoryStep
from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.session import Events, Session
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from tests.engine.families import MAX_LEN, VOCAB, checked, config_of, pretrained
from tests.weights.random_checkpoint import prompt

SLOW = pytest.mark.slow
PROMPTS = [prompt(n, VOCAB) for n in (5, 17, 33, 40)]
SAMPLED = Sampling(max_tokens=20, temperature=0.9, top_k=50, top_p=0.95, seed=3)
MEMORIES = {
    "after the prompt": MemoryConfig("paged", 8, 8, format="kivi4", residual=5),
    "by chunks": MemoryConfig("paged", 8, 8, format="kivi4", residual=3, quantised_prefill="chunks"),
    "behind snapkv": MemoryConfig(
        "paged",
        8,
        8,
        format="kivi4",
        residual=4,
        compression={"type": "snapkv", "sinks": 1, "recent": 4, "window": 4},
        budget=20,
    ),
}
WAYS = {
    "preempted": {"pool_len": MAX_LEN},
    "swapped": {"pool_len": MAX_LEN, "preemption": "swap", "host_len": 300},
    "budget of 3": {"token_budget": 3},
    "no cache": {"prefix_cache": False},
    "looked up": {"speculation": "ngram", "num_drafts": 2},
}


def engine_of(kind: str, **fields) -> Engine:
    config: EngineConfig = config_of(8, **{"max_batch": 2, **fields})
    return checked(Engine(pretrained("llama_gqa").model, memory=MEMORIES[kind], config=config))


@functools.cache
def alone(kind: str) -> list[list[int]]:
    """What each prompt is answered when nobody else is there and nothing is shared."""
    engine = engine_of(kind, max_batch=1, prefix_cache=False)
    return [answer.tokens for answer in engine.generate(PROMPTS, SAMPLED)]


@pytest.mark.parametrize(
    "kind", ["after the prompt", pytest.param("by chunks", marks=SLOW), pytest.param("behind snapkv", marks=SLOW)]
)
@pytest.mark.parametrize("way", WAYS)
def test_the_way_it_runs_changes_no_token(kind, way):
    order = random.Random(way).sample(range(len(PROMPTS)), len(PROMPTS))
    engine = engine_of(kind, **WAYS[way])
    found = engine.generate([PROMPTS[i] for i in order], SAMPLED)
    for i, answer in zip(order, found, strict=True):
        assert answer.tokens == alone(kind)[i], f"prompt {i}"
    assert engine.stats.sealed_pages >= 10
    assert engine.stats.read_bytes > 0


def test_answers_are_those_of_the_parallel_form_rounded_by_the_same_schedule():
    """Greedy decoding by hand, every logit compared with the parallel form."""
    model, ids, memory = pretrained("llama_gqa").model, PROMPTS[3], MEMORIES["after the prompt"]
    layout = MemoryLayout.of(model.states, memory, max_sequences=1, max_len=MAX_LEN)
    session = Session(MemoryStep.of(model.structure, layout), model.params, poisons=True, observes=True)
    session.prompt_len = len(ids)
    tokens, seen = list(ids), {}
    for start in range(0, len(ids), 8):
        chunk = ids[start : start + 8]
        logits = session.advance({0: chunk}, 8)[:, len(chunk) - 1]
    for _ in range(20):
        tokens.append(int(np.asarray(logits)[0].argmax()))
        seen[len(tokens) - 2] = np.asarray(logits)
        logits = session.advance({0: tokens[-1:]}, 1)[:, 0]
    check = MaskCheck(model.structure, model.params, layout)
    check.compare(np.array([tokens], np.int32), seen, session.events)
    assert check.num_compared == 20
    assert check.worst < 1e-5
    unsealed = MaskCheck(model.structure, model.params, layout)
    unsealed.compare(np.array([tokens], np.int32), seen, Events(session.compacted))
    assert unsealed.worst > 1e-3, "rounding is seen"
    engine = engine_of("after the prompt", max_batch=1)
    assert engine.generate([ids], Sampling(max_tokens=20))[0].tokens == tokens[len(ids) :]


def test_samples_share_the_prompt_and_seal_apart():
    engine = engine_of("after the prompt", max_batch=3)
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=11, num_samples=3)
    (together,) = engine.generate([PROMPTS[3]], sampling)
    (single,) = engine_of("after the prompt", max_batch=1).generate(
        [PROMPTS[3]], Sampling(max_tokens=12, temperature=1.0, seed=11)
    )
    assert together.tokens == single.tokens


def test_a_prefix_is_found_up_to_the_first_sealing():
    engine = engine_of("after the prompt", max_batch=1)
    longer = PROMPTS[3] + [7, 9, 11, 13]
    engine.generate([PROMPTS[3]], SAMPLED)
    before = engine.stats.prefilled_tokens
    again = engine.generate([longer], SAMPLED)[0].tokens
    assert engine.stats.prefilled_tokens - before == 4, "40 of 44 tokens are those of the first prompt, exact as cached"
    fresh = engine_of("after the prompt", max_batch=1, prefix_cache=False)
    assert again == fresh.generate([longer], SAMPLED)[0].tokens
