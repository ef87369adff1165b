"""The simulator is the ledger with a clock: everything is served, nothing leaks, and simple cases are closed form."""

import random

import numpy as np
import pytest

from kvlab.capacity.simulator import Simulator
from kvlab.capacity.traces import Request
from kvlab.engine.scheduler import Schedule
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from tests.ledger.shadows import FULL, STATE, WINDOWED


def make(num_pages=20, slots=6, specs=(FULL, WINDOWED, STATE), max_len=60, host=0, **options):
    classes = []
    for number, spec in enumerate(specs):
        if spec.per_token:
            classes.append(StateClass(f"c{number}", spec, 4, num_pages, 15, num_host_pages=host))
        else:
            classes.append(StateClass(f"c{number}", spec, 1, slots, 1, num_host_pages=host))
    return Ledger(classes, max_len, 8, page_size=4, **options)


def traffic(seed, count=40, shared=True):
    rng = random.Random(seed)
    stem = [rng.randrange(100) for _ in range(20)]
    asked, clock = [], 0.0
    for _ in range(count):
        clock += rng.expovariate(0.5)
        own = [rng.randrange(100) for _ in range(rng.randrange(1, 12))]
        tokens = (stem[: rng.randrange(1, 20)] if shared else []) + own
        answer = np.array([rng.randrange(100) for _ in range(rng.randrange(1, 20))])
        asked.append(Request(clock, len(tokens), len(answer), np.array(tokens), answer))
    return asked


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("num_pages", [17, 40])
def test_everything_is_served_and_the_ledger_is_whole(preemption, mixed, num_pages):
    for seed in range(6):
        ledger = make(num_pages, slots=20, host=30, checkpoints=Checkpoints("junctions"))
        asked = traffic(seed)
        budget = 3 if seed % 2 else 12
        schedule = Schedule(max_batch=8, token_budget=budget, mixed=mixed, preemption=preemption)

        def step_time(decoding, chunks, budget=budget):
            assert 1 <= len(decoding) + sum(chunks) <= budget, "every step makes progress within its budget"
            return 1.0

        simulator = Simulator(ledger, step_time, schedule, caches=True, sample_every=1)
        step = simulator.step

        def checked(step=step, ledger=ledger):
            step()
            ledger.check()

        simulator.step = checked
        outcome = simulator.run(asked)
        assert outcome.finished == len(asked)
        assert outcome.decoded_tokens == sum(request.output_len for request in asked)
        assert not ledger.sequences
        assert not ledger.suspended
        assert not ledger.hits
        assert ledger.counters.hit_tokens > 0
        assert (outcome.preempted > 0) or num_pages == 40
        assert min(outcome.latencies) >= 0


def test_a_lone_request_takes_a_step_a_chunk_and_a_step_a_token():
    ledger = make(specs=(FULL,))
    outcome = Simulator(ledger, lambda decoding, chunks: 2.0, Schedule(), sample_every=1).run([Request(5.0, 20, 7)])
    assert outcome.steps == 3 + 6  # the last chunk of the prompt gives the first token, whose successor ends the answer
    assert outcome.seconds == 5.0 + 2.0 * 9
    assert (outcome.prefilled_tokens, outcome.decoded_tokens) == (20, 7)
    assert outcome.latencies == [2.0 * 9]


def test_what_can_never_fit_is_rejected_with_the_arithmetic_and_the_rest_is_served():
    ledger = make(num_pages=5, specs=(FULL,))
    outcome = Simulator(ledger, lambda decoding, chunks: 1.0, Schedule()).run(
        [Request(0, 30, 5), Request(0, 3, 3), Request(0, 59, 9)]
    )
    assert outcome.finished == 1
    assert len(outcome.rejected) == 2
    assert "34 tokens need 9 pages" in outcome.rejected[0]
    assert "67 tokens exceed max_len = 60" in outcome.rejected[1]


def test_the_mean_is_weighted_by_time():
    ledger = make(specs=(FULL,))
    times = iter([1.0, 3.0, 5.0])
    outcome = Simulator(ledger, lambda decoding, chunks: next(times), Schedule(), sample_every=1).run(
        [Request(0, 8, 3)]
    )
    slots = FULL.unit_bytes
    expected = (1.0 * 0 + 3.0 * 8 + 5.0 * 9) * slots / 9
    assert outcome.mean("live") == pytest.approx(expected)
    with pytest.raises(ValueError, match="no sample in"):
        outcome.mean("live", 100)


def test_caching_changes_what_is_computed_and_nothing_else():
    asked = traffic(3)
    outcomes = []
    for caches in (True, False):
        simulator = Simulator(make(60, 30), lambda decoding, chunks: 1.0, Schedule(max_batch=4), caches=caches)
        outcomes.append(simulator.run(asked))
    assert outcomes[0].finished == outcomes[1].finished
    assert outcomes[0].decoded_tokens == outcomes[1].decoded_tokens
    assert outcomes[0].prefilled_tokens < outcomes[1].prefilled_tokens == sum(request.prompt_len for request in asked)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_what_a_preempted_sequence_finds_of_its_own_is_no_prefix_hit(preemption):
    """Prompts of tokens that occur once: whatever the index gives back, its owner had put there."""
    for seed in range(4):
        rng, asked, clock = random.Random(seed), [], 0.0
        numbers = iter(range(100_000))
        for _ in range(30):
            clock += rng.expovariate(0.5)
            ids = np.array([next(numbers) for _ in range(rng.randrange(2, 40))])
            prompt_len = rng.randrange(1, len(ids))
            asked.append(Request(clock, prompt_len, len(ids) - prompt_len, ids[:prompt_len], ids[prompt_len:]))
        computed = 0

        def step_time(decoding, chunks):
            nonlocal computed
            computed += len(decoding) + sum(chunks)
            return 1.0

        ledger = make(num_pages=17, slots=20, host=30, checkpoints=Checkpoints("junctions"))
        outcome = Simulator(ledger, step_time, Schedule(max_batch=8, preemption=preemption), caches=True).run(asked)
        needed = sum(request.prompt_len + request.output_len - 1 for request in asked)
        assert outcome.preempted
        assert ledger.counters.hit_tokens == 0 or preemption == "recompute"
        assert outcome.looked_up_tokens == sum(request.prompt_len for request in asked), "each prompt once"
        assert outcome.hit_tokens == 0, "nothing is shared"
        assert computed == needed + outcome.recomputed_tokens, "what was found again was not computed again"
        assert outcome.found_again_tokens == ledger.counters.hit_tokens


def test_hits_and_what_was_computed_again_add_up_where_prompts_share():
    for seed in range(6):
        asked, computed = traffic(seed), 0

        def step_time(decoding, chunks):
            nonlocal computed
            computed += len(decoding) + sum(chunks)
            return 1.0

        ledger = make(17, slots=20)
        outcome = Simulator(ledger, step_time, Schedule(max_batch=8), caches=True).run(asked)
        needed = sum(request.prompt_len + request.output_len - 1 for request in asked)
        assert outcome.preempted
        assert outcome.found_again_tokens
        assert computed == needed - outcome.hit_tokens + outcome.recomputed_tokens
        assert outcome.hit_tokens + outcome.found_again_tokens == ledger.counters.hit_tokens
        assert 0 < outcome.hit_tokens < outcome.looked_up_tokens == sum(request.prompt_len for request in asked)
