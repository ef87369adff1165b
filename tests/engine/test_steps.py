"""Steps: how many rows and tokens, who goes first, and what is launched while the device works."""

import random

import pytest

from kvlab.engine.config import EngineConfig
from kvlab.engine.sampling import Sampling
from kvlab.engine.shapes import Buckets
from kvlab.schema import ConfigError
from tests.engine.families import (
    MAX_LEN,
    PROMPTS,
    SAMPLED,
    VOCAB,
    engine_of,
    shared,
)
from tests.weights.random_checkpoint import prompt


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
