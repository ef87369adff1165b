"""Compressed sequences in the engine: however they run, they are compacted at the same places to the same slots."""

import functools

import numpy as np
import pytest
from scipy.special import log_softmax

from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.memory.layout import MemoryConfig
from kvlab.schema import ConfigError
from tests.engine.families import SAMPLED, checked, config_of, pretrained
from tests.engine.ways import EVERYWHERE, PROMPTS, WAYS, answers, by_hand, forced

SLOW = pytest.mark.slow
METHODS = {
    "h2o": {"type": "h2o", "sinks": 1, "recent": 3, "every": 6},
    "snapkv": {"type": "snapkv", "sinks": 1, "recent": 4, "window": 4, "at": "chunks", "every": 4},
    "random": {"type": "random", "sinks": 1, "recent": 2},
    "h2o once": {"type": "h2o", "sinks": 1, "recent": 3},
}
"""The last forgets its statistics where the prompt is compacted."""


def memory_of(method: str, page_size: int = 4) -> MemoryConfig:
    return MemoryConfig(page_size=page_size, chunk_len=8, compression=METHODS[method], budget=12)


def compressed(method: str, *, page_size: int = 4, **fields) -> Engine:
    config: EngineConfig = config_of(8, **{"max_batch": 2, **fields})
    return checked(Engine(pretrained("llama_gqa").model, memory=memory_of(method, page_size), config=config))


@functools.cache
def alone(method: str) -> list[list[int]]:
    """What each prompt is answered when nobody else is there and nothing is shared."""
    engine = compressed(method, max_batch=1, prefix_cache=False)
    return [answer.tokens for answer in engine.generate(PROMPTS, SAMPLED)]


@pytest.mark.parametrize("method", ["h2o", *(pytest.param(name, marks=SLOW) for name in list(METHODS)[1:])])
@pytest.mark.parametrize("way", [*EVERYWHERE, "page 7"])
def test_the_way_it_runs_changes_no_token(method, way):
    engine = compressed(method, **WAYS[way])
    assert answers(engine, SAMPLED, way) == alone(method)
    assert engine.stats.compacted >= 3
    assert engine.ledger.counters.dropped_slots > 50


def test_answers_are_those_of_the_mask_that_compactions_imply():
    """Greedy decoding by hand, every logit compared with the parallel form."""
    done = by_hand(memory_of("h2o"), PROMPTS[3])
    check = done.check()
    assert check.num_compared == 20
    assert check.num_compactions >= 3
    assert check.worst < 1e-5
    engine = compressed("h2o", max_batch=1)
    assert engine.generate(PROMPTS[3:], Sampling(max_tokens=20))[0].tokens == done.tokens[len(PROMPTS[3]) :]


def test_samples_share_the_prompt_and_are_compacted_apart():
    engine = compressed("h2o", max_batch=3)
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=11, num_samples=3)
    (together,) = engine.generate([PROMPTS[3]], sampling)
    (alone,) = compressed("h2o", max_batch=1).generate([PROMPTS[3]], Sampling(max_tokens=12, temperature=1.0, seed=11))
    assert together.tokens == alone.tokens
    assert engine.stats.compacted >= 3


@pytest.mark.parametrize("method", ["h2o once", pytest.param("h2o", marks=SLOW)])
def test_beams_are_those_of_a_search_by_hand(method):
    """Every beam of the search is read anew, prompt and all, through a compressed memory of its own."""
    width, num_new, prompt = 2, 6, PROMPTS[3]
    beams = [(0.0, [])]
    for _ in range(num_new):
        wider = []
        for score, tokens in beams:
            (logprobs,) = log_softmax(forced(memory_of(method), prompt, tokens))
            wider += [(score + logprobs[token], [*tokens, int(token)]) for token in np.argsort(-logprobs)[:width]]
        beams = sorted(wider, key=lambda beam: -beam[0])[:width]
    engine = compressed(method, max_batch=3)
    (found,) = engine.generate([prompt], Sampling(max_tokens=num_new, beam_width=width, length_penalty=0.0))
    assert [completion.tokens for completion in found.completions] == [tokens for _, tokens in beams]
    scores = [completion.score for completion in found.completions]
    np.testing.assert_allclose(scores, [score for score, _ in beams], rtol=1e-4)
    assert engine.stats.compacted


def test_what_is_held_behind_a_prompt_has_no_statistics():
    """By the ledger, class by class; and a decoded token reads the keys once."""
    done = by_hand(memory_of("h2o once"), PROMPTS[3], num_new=3)
    layout, ledger = done.session.layout, done.session.ledger
    held = {state.is_statistics: len(ledger.pages(0, number)) for number, state in enumerate(layout.classes)}
    assert held[False]
    assert not held[True]
    assert done.check().worst < 1e-5


def test_a_prefix_is_found_up_to_the_first_compaction_and_not_behind():
    engine = compressed("random", max_batch=1)
    longer = PROMPTS[3] + [7, 9, 11, 13]
    first = engine.generate([PROMPTS[3]], SAMPLED)[0].tokens
    before = engine.stats.prefilled_tokens
    again = engine.generate([longer], SAMPLED)[0].tokens
    assert engine.stats.prefilled_tokens - before == 4, "40 of 44 tokens are those of the first prompt, exact as cached"
    assert again == compressed("random", max_batch=1, prefix_cache=False).generate([longer], SAMPLED)[0].tokens
    assert engine.generate([PROMPTS[3]], SAMPLED)[0].tokens == first


def test_more_sequences_fit_where_they_are_compacted():
    """The pool holds one whole prompt beside what is left of three others."""
    pool_len = 40 + 3 * 12 + 4 * 20
    engine = compressed("random", max_batch=4, max_len=60, pool_len=pool_len, prefix_cache=False, token_budget=8)
    sampling = Sampling(max_tokens=20, seed=1)
    answers = engine.generate([PROMPTS[3]] * 4, sampling)
    assert len({tuple(answer.tokens) for answer in answers}) == 1
    assert engine.scheduler.counters.preempted == 0


def test_a_second_pass_reads_on_behind_each_prompt():
    """KVzip: every sequence is compacted behind a pass of its own, and the oracle, which knows the future, is
    refused."""
    memory = MemoryConfig(page_size=4, chunk_len=8, compression={"type": "kvzip", "sinks": 1, "recent": 2}, budget=12)
    model = pretrained("llama_gqa").model

    def answered(**fields) -> list[list[int]]:
        engine = checked(Engine(model, memory=memory, config=config_of(8, **fields)))
        found = [answer.tokens for answer in engine.generate(PROMPTS[1:], SAMPLED)]
        assert engine.stats.compacted >= 3
        return found

    assert answered(max_batch=2) == answered(max_batch=1, prefix_cache=False)
    with pytest.raises(ConfigError, match="must know what follows"):
        Engine(model, memory=MemoryConfig(page_size=4, compression="oracle", budget=12), config=config_of(8))
