"""Thousands of requests with cancels, samples, beams and drafts through a pool too small: all end, as undisturbed ones
would."""

import random
import resource
from dataclasses import replace

import pytest

from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.memory.layout import MemoryConfig
from tests.engine.families import pretrained
from tests.weights.random_checkpoint import prompt

VOCAB, MAX_LEN = 320, 64


def soak(family: str, num_requests: int, seed: int, *, few_programs: bool = False, **fields) -> Engine:
    """Submits requests at random moments, cancels some, and compares every answer with that of an engine in which each
    prompt is alone."""
    rng, model = random.Random(seed), pretrained(family)

    def engine_of(**more) -> Engine:
        config = EngineConfig(**{"max_len": MAX_LEN, "max_batch": 4, **more})
        if few_programs:
            config = replace(config, row_sizes=(config.max_batch,), width_sizes=(8,))
        return Engine(model.model, memory=MemoryConfig("paged", 4, 8), config=config)

    small, calm = engine_of(pool_len=72, **fields), engine_of(prefix_cache=False, max_batch=3)
    kinds = [
        Sampling(max_tokens=12),
        Sampling(max_tokens=7, temperature=0.9, seed=5),
        Sampling(max_tokens=20),
        Sampling(max_tokens=6, temperature=1.0, seed=2, num_samples=3),
        Sampling(max_tokens=9, beam_width=3, stop_tokens=(7, 9)),
        Sampling(max_tokens=25, stop_tokens=tuple(range(0, 320, 9))),
    ]
    pool = [(prompt(n, VOCAB, seed=s), kind) for n in (1, 4, 9, 20, 31) for s in (0, 1) for kind in kinds]
    pool += [(ids + prompt(3, VOCAB, seed=s), kinds[0]) for ids, _ in pool[::8] for s in (2, 3)]  # shared beginnings
    expected: dict[int, list[list[int]]] = {}
    asked: dict[str, int] = {}
    cancelled, ended, peaks = set(), 0, []
    while ended < num_requests:
        while len(asked) < num_requests and len(small.requests) < rng.randrange(1, 12):
            which = rng.randrange(len(pool))
            ids, sampling = pool[which]
            asked[small.submit(ids, sampling, priority=rng.choice((0, 0, 0, 1)))] = which
        if small.requests and rng.random() < 0.02:
            name = rng.choice(list(small.requests))
            small.cancel(name)
            cancelled.add(name)
        small.step()
        small.ledger.check()
        for name in list(small.answers):
            answer, which = small.answers.pop(name), asked[name]
            ended += 1
            if which not in expected:
                ids, sampling = pool[which]
                (alone,) = calm.generate([ids], sampling)
                expected[which] = [completion.tokens for completion in alone.completions]
            assert answer.error is None
            if name not in cancelled:
                assert [completion.tokens for completion in answer.completions] == expected[which], (
                    f"{name}: prompt {which}"
                )
            elif not pool[which][1].beam_width:
                assert len(answer.completions) == len(expected[which])
                for completion, whole in zip(answer.completions, expected[which], strict=True):
                    assert completion.tokens == whole[: len(completion.tokens)]
        if ended % max(1, num_requests // 10) == 0:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert not small.requests
    assert not small.ledger.sequences
    assert not small.ledger.suspended
    assert not small.ledger.hits
    assert not small.scheduler.num_unfinished
    assert cancelled
    half = peaks[len(peaks) // 2]
    assert peaks[-1] - half < 0.1 * half, "memory is flat once everything was compiled"
    return small


WAYS = [
    ("llama_gqa", {"speculation": "ngram", "num_drafts": 3, "token_budget": 6}),
    ("llama_mqa", {"preemption": "swap", "host_len": 60, "mixed": False}),
    ("mistral", {"preemption": "swap", "host_len": 200}),
    ("mamba2", {"speculation": "ngram", "num_drafts": 2}),
]


@pytest.mark.parametrize(
    "fields", [{"speculation": "ngram", "num_drafts": 3, "token_budget": 6}, {"preemption": "swap"}]
)
def test_many_requests_all_end_as_if_alone(fields):
    engine = soak("llama_gqa", 80, seed=1, few_programs=True, host_len=60, **fields)
    assert engine.scheduler.counters.preempted
    assert bool(engine.stats.planned_ahead) == ("speculation" not in fields)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "fields"), WAYS, ids=lambda value: value if isinstance(value, str) else "")
def test_many_requests_all_end_as_if_alone_whatever_programs_they_need(family, fields):
    engine = soak(family, 120, seed=1, **fields)
    assert engine.scheduler.counters.preempted or family == "mamba2"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("family", "fields"), WAYS, ids=lambda value: value if isinstance(value, str) else "")
def test_two_thousand_requests(family, fields):
    soak(family, 2000, seed=2, **fields)
