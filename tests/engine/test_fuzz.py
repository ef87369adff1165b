"""Random engines asked random things, on a device of Python: every request ends, as it would alone."""

import random

import pytest

from kvlab.engine.sampling import Sampling
from tests.engine.deviceless import MAX_LEN, deviceless


def answered(engine, names, most=5000):
    """The tokens that these requests are answered, by steps that each leave the ledger whole."""
    for _ in range(most):
        if not engine.requests:
            break
        engine.step()
        engine.ledger.check()
    assert not engine.requests, "a request without an end"
    answers = [engine.answers.pop(name) for name in names]
    assert not any(answer.error for answer in answers)
    return [[completion.tokens for completion in answer.completions] for answer in answers]


def alone(ids, sampling):
    engine = deviceless(prefix_cache=False)
    return answered(engine, [engine.submit(ids, sampling)])[0]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_token_kept_for_a_prompt_without_room_is_decoded(preemption):
    """The budget is one token. Who is more urgent finds no page free: who runs goes on until it ends."""
    engine = deviceless(token_budget=1, pool_len=MAX_LEN, preemption=preemption, host_len=40)
    long, urgent = ([1] * 20, Sampling(max_tokens=28)), ([2] * 30, Sampling(max_tokens=5))
    names = [engine.submit(*long)]
    while engine.ledger.stores[0].num_available:
        engine.step()
    names.append(engine.submit(*urgent, priority=1))
    assert answered(engine, names) == [alone(*long), alone(*urgent)]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_beams_go_on_with_one_token_a_step_however_short_the_pages(preemption):
    for pool_len in (MAX_LEN, MAX_LEN + 4, MAX_LEN + 12):
        engine = deviceless(token_budget=1, pool_len=pool_len, preemption=preemption, host_len=40)
        asked = [([1] * 20, Sampling(max_tokens=20, beam_width=width)) for width in (3, 4)]
        names = [engine.submit(*each) for each in asked]
        assert answered(engine, names) == [alone(*each) for each in asked]


def run_random(seed):
    """Eight requests at random moments through an engine whose settings are drawn, too."""
    rng = random.Random(seed)
    max_batch = rng.choice([1, 2, 3, 4, 6])
    engine = deviceless(
        page_size=rng.choice([1, 4, 5]),
        chunk_len=rng.choice([1, 3, 8]),
        token_budget=rng.choice([1, 1, 1, 2, 3, 5, 64]),
        max_batch=max_batch,
        pool_len=rng.choice([MAX_LEN, MAX_LEN + 8, 72, max_batch * MAX_LEN]),
        mixed=rng.random() < 0.7,
        prefix_cache=rng.random() < 0.5,
        speculation=rng.choice(["none", "none", "ngram"]),
        num_drafts=2,
        host_len=rng.choice([40, 100]),
        preemption=rng.choice(["recompute", "swap"]),
    )
    asked = {}
    while len(asked) < 8 or engine.requests:
        if len(asked) < 8 and rng.random() < 0.15:
            ids = [rng.randrange(3) for _ in range(rng.choice([1, 2, 5, 17, 30]))]
            kinds = [Sampling(max_tokens=rng.choice([1, 5, 18])), Sampling(max_tokens=9, num_samples=3)]
            if max_batch >= 3:
                kinds.append(Sampling(max_tokens=rng.choice([2, 9]), beam_width=rng.choice([2, 3])))
            each = ids, rng.choice(kinds)
            asked[engine.submit(*each, priority=rng.choice([0, 0, 1, 2]))] = each
        engine.step()
        engine.ledger.check()
    assert answered(engine, asked) == [alone(*each) for each in asked.values()]


@pytest.mark.parametrize("seeds", [(9, 124, 143)], ids=str)
def test_random_requests_end_as_if_alone(seeds):
    for seed in seeds:
        run_random(seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_requests_end_as_if_alone():
    for seed in range(1000):
        run_random(seed)
