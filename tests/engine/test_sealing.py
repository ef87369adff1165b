"""Sequences whose pages are sealed, in the engine: however they run, the same pages are sealed at the same places."""

import functools

import pytest

from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.memory.layout import MemoryConfig
from tests.engine.families import SAMPLED, checked, config_of, pretrained
from tests.engine.ways import EVERYWHERE, PROMPTS, WAYS, answers, by_hand

SLOW = pytest.mark.slow
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


def engine_of(kind: str, **fields) -> Engine:
    config: EngineConfig = config_of(8, **{"max_batch": 2, **fields})
    return checked(Engine(pretrained("llama_gqa").model, memory=MEMORIES[kind], config=config))


@functools.cache
def alone(kind: str) -> list[list[int]]:
    """What each prompt is answered when nobody else is there and nothing is shared."""
    engine = engine_of(kind, max_batch=1, prefix_cache=False)
    return [answer.tokens for answer in engine.generate(PROMPTS, SAMPLED)]


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("by chunks", "preempted"),  # somebody is preempted who decodes, and has sealed nothing yet
        *(("after the prompt", way) for way in EVERYWHERE),
        *(
            pytest.param(kind, way, marks=SLOW)
            for kind in ("by chunks", "behind snapkv")
            for way in EVERYWHERE
            if (kind, way) != ("by chunks", "preempted")
        ),
    ],
)
def test_the_way_it_runs_changes_no_token(kind, way):
    engine = engine_of(kind, **WAYS[way])
    assert answers(engine, SAMPLED, way) == alone(kind)
    assert engine.stats.sealed_pages >= 10
    assert engine.stats.read_bytes > 0


def test_answers_are_those_of_the_parallel_form_rounded_by_the_same_schedule():
    """Greedy decoding by hand, every logit compared with the parallel form."""
    done = by_hand(MEMORIES["after the prompt"], PROMPTS[3])
    check = done.check()
    assert check.num_compared == 20
    assert check.worst < 1e-5
    assert done.check(sealed=(), given=()).worst > 1e-3, "rounding is seen"
    engine = engine_of("after the prompt", max_batch=1)
    assert engine.generate(PROMPTS[3:], Sampling(max_tokens=20))[0].tokens == done.tokens[len(PROMPTS[3]) :]


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
