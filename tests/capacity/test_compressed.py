"""Users per chip under each method: against sequences that a ledger really holds, a roofline by hand, and a simulation
that compacts and seals."""

import math

import pytest

from kvlab.capacity.estimate import estimate
from kvlab.capacity.report import many_answers, one_answer
from kvlab.capacity.roofline import decode_roofline
from kvlab.capacity.room import make_ledger, users_that_fit
from kvlab.capacity.serving import Serving
from kvlab.capacity.simulator import Simulator
from kvlab.capacity.traces import Request
from kvlab.compose import compose_capacity
from kvlab.engine.scheduler import Schedule
from kvlab.ledger.classes import Lengths
from kvlab.ledger.growth import grow
from kvlab.memory.budgets import Context
from kvlab.schema import ConfigError

METHODS = {
    "snapkv": ["compression=snapkv", "budget=0.25"],
    "h2o chunks": ["memory.compression={type:h2o,at:chunks,every:16}", "budget=256"],
    "ada": ["memory.compression={type:knorm,heads:ada}", "budget=0.5"],
    "streaming": ["compression=streaming", "budget=512"],
    "kivi": ["format=kivi4"],
    "evicted, then sealed": ["format=kivi2", "memory.page_size=32", "compression=snapkv", "budget=0.5"],
    "bytes": ["compression=knorm", "budget=96MiB"],
}


def config_of(method, *more):
    return compose_capacity(["model=llama3-8b", "hardware=h100", *METHODS[method], *more])


@pytest.mark.parametrize("method", METHODS)
def test_users_are_those_that_a_ledger_really_holds(method):
    """Prompts come one after the other; whoever is there stays."""
    config, lengths, budget = config_of(method), Lengths(1000, 1500), 4_000_000_000
    users = users_that_fit(make_ledger(config, budget, 1500, 2048, 1000), 1500, 1000)
    ledger = make_ledger(config, budget, 1500, 2048, 1000)
    assert sum(state.pool_bytes for state in ledger.classes) <= budget
    held = 0
    while grow(ledger, held, lengths):
        held += 1
        ledger.check()
    assert users == held
    exact = compose_capacity(["model=llama3-8b", "hardware=h100"])
    assert users > 1.15 * users_that_fit(make_ledger(exact, budget, 1500, 2048, 1000), 1500, 1000)


def test_reads_and_users_by_hand():
    """Llama-3-8B: 131,072 bytes a token. 1,000 prompt tokens of which a quarter stay, then 500 more; SnapKV's window of
    32 queries of 32 heads of 128 numbers in float32, which every step reads and writes, and a count."""
    config = config_of("snapkv")
    serving = Serving.of(config, 2048, Context(1500, 1000))
    stored, noted = 250 + 500, 32 * (32 * 32 * 128 * 4 + 4)
    assert serving.logical_bytes(Context(1500, 1000)) == stored * 131_072 + noted
    assert serving.read_bytes(Context(1500, 1000)) == stored * 131_072 + 2 * noted
    assert serving.mixing_flops(Context(1500, 1000)) == 32 * 4 * 32 * 128 * (stored + 1)
    roof = decode_roofline(config, [Context(1500, 1000)] * 7, serving)
    bandwidth = config.hardware.bandwidth
    weights = config.model.weight_bytes / bandwidth
    assert roof["seconds"] == pytest.approx(weights + 7 * (stored * 131_072 + 2 * noted) / bandwidth)
    h2o = config_of("h2o chunks")
    weighed = Serving.of(h2o, 2048, Context(1500, 1000))
    (kv,) = (state for state in weighed.classes if state.paged)
    slots = kv.retention.stored(1000, 1500)
    mass = sum(state.spec.unit_bytes * state.num_layers for state in weighed.classes if not state.paged)
    assert weighed.read_bytes(Context(1500, 1000)) == slots * (131_072 + 65_536) + 2 * mass, "H2O reads the keys twice"


def test_sealed_pages_are_read_as_they_are_stored():
    serving = Serving.of(config_of("kivi"), 2048, Context(1500, 1000))
    num_sealed = (1500 - 32) // 16 * 16
    four_bits = 8 * 128 * 2 // 2 + 8 * 4 * 2 * 2  # numbers, and of values a scale and a zero for each 32 channels
    pages = num_sealed // 16 * 8 * 128 * 2 * 2  # of keys for each channel of a page
    token = 2 * 8 * 128 * 2
    expected = 32 * ((1500 - num_sealed) * token + num_sealed * four_bits + pages)
    assert serving.logical_bytes(Context(1500, 1000)) == serving.read_bytes(Context(1500, 1000)) == expected
    assert serving.mixing_flops(Context(1500, 1000)) == 32 * 4 * 32 * 128 * 1501, "nothing is dropped"


def test_a_budget_of_bytes_is_solved_where_users_are_counted():
    answer = estimate(config_of("bytes", "context_len=1500", "simulate=false", "budget=160MiB"))
    assert answer.solved.startswith("160MiB: memory.budget = ")
    assert 0.9 * 160 * 2**20 <= answer.held_bytes <= 160 * 2**20
    slots = int(answer.solved.rsplit(" ", 1)[1])
    more = config_of("bytes", "context_len=1500", "simulate=false", f"budget={slots + 16}")
    assert estimate(more).held_bytes > 160 * 2**20


@pytest.mark.parametrize("method", ["snapkv", "h2o chunks", "kivi", "evicted, then sealed"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_simulation_compacts_and_seals(method, preemption):
    config = config_of(method, "memory.chunk_len=64", "memory.host_gb=1")
    ledger = make_ledger(config, 130_000_000, 500, 600, 400)
    asked = [Request(0.1 * number, 150 + 37 * (number % 7), 20 + number % 40) for number in range(16)]
    schedule = Schedule(max_batch=8, token_budget=64, preemption=preemption)
    seen = []

    def step_time(contexts, chunks):
        seen.extend(contexts)
        return 0.01

    simulator = Simulator(ledger, step_time, schedule, sample_every=1)
    step = simulator.step

    def checked():
        step()
        ledger.check()

    simulator.step = checked
    outcome = simulator.run(asked)
    assert outcome.finished == 16
    assert not ledger.sequences
    assert all(context.prompt_len <= context.context_len for context in seen)
    if "kivi" not in method:
        assert outcome.compacted >= 16 * ("sealed" not in method)
        assert outcome.dropped_slots == ledger.counters.dropped_slots > 0
    if "kivi" in method or "sealed" in method:
        assert outcome.sealed_pages > 0


def test_answers_say_what_is_dropped_and_what_is_left():
    config = compose_capacity(
        ["model=gpt-oss-20b", "hardware=h100", "compression=h2o", "budget=0.5", "workload.num_requests=20"]
    )
    answer = estimate(config)
    names, values = (column.cells for column in one_answer(config, answer).columns)
    told = dict(zip(map(str, names), map(str, values), strict=True))
    assert told["left as they are"] == "local128: a window forgets by itself"
    assert "compactions dropped" in told["compressed"]
    assert any("at most on the way" in value for value in told.values())
    assert answer.memory == "paged h2o 0.5"
    assert many_answers([answer]).row_count == 1
    assert math.isclose(answer.weight_share + answer.state_share + answer.compute_share, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compression=h2o"], r"memory\.budget = None: must be slots"),
        (["compression=h2oo", "budget=64"], r"memory\.compression\.type = 'h2oo': did you mean h2o"),
        (["compression=h2o", "budget=4"], r"memory\.budget = '4 slots': must be at least the 12 slots"),
        (["compression=h2o", "budget=1KiB"], r"memory\.budget = '1KiB': must be at least"),
        (["compression=streaming", "budget=0.5"], r"memory\.budget = '0\.5 of the prompt': must be slots"),
        (["memory=pow2", "compression=h2o", "budget=64"], r"memory\.name = 'pow2': must be paged with h2o"),
        (["memory=dense", "format=kivi4"], r"memory\.name = 'dense': must be paged with kivi4"),
        (["format=kivi2", "memory.page_size=8"], r"memory\.page_size = 8: must be at least 16 for kivi2"),
        (["format=int8", "memory.kv_dtype=int4"], r"memory\.format = 'int8': must be model with kv_dtype = int4"),
        (["model=mamba2-2.7b", "compression=h2o", "budget=64"], r"memory\.compression = 'h2o': serves no layer"),
        (["model=mamba2-2.7b", "format=kivi4"], r"memory\.format = 'kivi4': serves no layer"),
    ],
)
def test_bad_questions_are_answered_with_the_field(words, message):
    with pytest.raises(ConfigError, match=message):
        estimate(compose_capacity(["hardware=h100", "simulate=false", *words]))
