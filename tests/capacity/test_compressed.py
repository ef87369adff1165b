"""Users and bytes read under each method: against sequences that a ledger really holds, a roofline by hand, and a
simulation that compacts and seals."""

import math

import pytest

from kvlab.capacity.estimate import estimate
from kvlab.capacity.report import one_answer
from kvlab.capacity.roofline import decode_roofline
from kvlab.capacity.room import make_ledger, users_that_fit
from kvlab.capacity.serving import Serving
from kvlab.capacity.simulator import Simulator
from kvlab.capacity.traces import Request
from kvlab.compose import compose_capacity, expand_capacity
from kvlab.engine.scheduler import Schedule
from kvlab.lab.deployments import answer_each, rows_of
from kvlab.ledger.classes import Lengths
from kvlab.ledger.growth import bytes_at, grow
from kvlab.ledger.states import QUANTISED, ROTATED, TokenState
from kvlab.memory.budgets import Context
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.schema import ConfigError

METHODS = {
    "snapkv": ["compression=snapkv", "budget=0.25"],
    "snapkv again": ["memory.compression={type:snapkv,every:600}", "budget=0.25"],
    "h2o chunks": ["memory.compression={type:h2o,at:chunks,every:16}", "budget=256"],
    "ada": ["memory.compression={type:knorm,heads:ada}", "budget=0.5"],
    "streaming": ["compression=streaming", "budget=512"],
    "kivi": ["format=kivi4"],
    "evicted, then sealed": ["format=kivi2", "memory.page_size=32", "compression=snapkv", "budget=0.5"],
    "bytes": ["compression=knorm", "budget=96MiB"],
    "rotated": ["format=rotated4"],
    "evicted, then selected": ["compression=snapkv", "budget=0.25", "selection=quest", "format=int8"],
}


def config_of(method, *more):
    return compose_capacity(["model=llama3-8b", "hardware=h100", *METHODS[method], *more])


def told_of(config, answer):
    """What people read of an answer, by its names."""
    names, values = (column.cells for column in one_answer(config, answer).columns)
    return dict(zip(map(str, names), map(str, values), strict=True))


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
    """Llama-3-8B: 131,072 bytes a token. 1,000 prompt tokens of which a quarter stay, then 500 more. SnapKV's window of
    32 queries of 32 heads of 128 numbers in float32, and a count, goes where the prompt is compacted."""
    config = config_of("snapkv")
    serving = Serving.of(config, 2048, Context(1500, 1000))
    stored, noted = 250 + 500, 32 * (32 * 32 * 128 * 4 + 4)
    assert serving.logical_bytes(Context(1500, 1000)) == stored * 131_072
    assert serving.read_bytes(Context(1500, 1000)) == stored * 131_072
    again = Serving.of(config_of("snapkv again"), 2048, Context(1500, 1000))
    assert again.logical_bytes(Context(1500, 1000)) == stored * 131_072 + noted, "of use again"
    assert again.read_bytes(Context(1500, 1000)) == stored * 131_072 + noted
    assert again.moved_bytes(Context(1500, 1000)) == stored * 131_072 + 2 * noted, "read and written in every step"
    assert serving.mixing_flops(Context(1500, 1000)) == 32 * 4 * 32 * 128 * (stored + 1)
    roof = decode_roofline(config, [Context(1500, 1000)] * 7, serving)
    bandwidth = config.hardware.bandwidth
    weights = config.model.weight_bytes / bandwidth
    assert roof["seconds"] == pytest.approx(weights + 7 * stored * 131_072 / bandwidth)
    h2o = config_of("h2o chunks")
    weighed = Serving.of(h2o, 2048, Context(1500, 1000))
    (kv,) = (state for state in weighed.classes if state.paged)
    slots = kv.retention.stored(1000, 1500)
    mass = sum(state.spec.unit_bytes * state.num_layers for state in weighed.classes if not state.paged)
    assert weighed.read_bytes(Context(1500, 1000)) == slots * (131_072 + 65_536) + mass, "H2O reads the keys twice"


def test_a_methods_fields_stand_beside_its_name_as_in_a_run():
    words = ["model=llama3-8b", "hardware=h100", "compression=snapkv", "budget=0.25"]
    (config,) = expand_capacity([*words, "memory.compression.every=600", "memory.compression.window=16"])
    assert (config.memory.compression.every, config.memory.compression.window) == (600, 16)
    first, second = expand_capacity([*words[:2], "compression=none,snapkv", "budget=0.5", "memory.compression.every=9"])
    assert first.memory.compression is None
    assert second.memory.compression.every == 9
    first, second = expand_capacity(
        [*words[:2], "compression=snapkv,knorm", "budget=0.5", "memory.compression.window=16"]
    )
    assert (first.memory.compression.window, second.memory.compression.name) == (16, "knorm")
    with pytest.raises(ConfigError, match="no field of knorm, h2o"):
        expand_capacity([*words[:2], "compression=knorm,h2o", "budget=0.5", "memory.compression.window=16"])
    with pytest.raises(ConfigError, match=r"memory\.compression\.evry"):
        compose_capacity([*words, "memory.compression.evry=600"])


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


@pytest.mark.parametrize("format", [*QUANTISED, *ROTATED])
def test_every_format_holds_what_the_laboratory_holds(format):
    """Of a token of Llama-3-8B: 32 layers of 8 heads with 128 keys and 128 values, and two scales in float32. The same
    states as `kvlab plan` counts."""
    config = compose_capacity(["model=llama3-8b", "hardware=h100", f"format={format}", "simulate=false"])
    bits = {"int8": 8, "fp8": 8, "int4": 4, "int2": 2}[ROTATED.get(format, format)]
    token = 32 * 8 * (2 * 128 * bits // 8 + 2 * 4)
    serving, context = Serving.of(config, 2048, Context(1500, 1000)), Context(1500, 1000)
    assert serving.token_bytes == token
    assert serving.logical_bytes(context) == serving.read_bytes(context) == 1500 * token
    layer = {"kv": TokenState(8, 128, 128, "bfloat16")}
    held = MemoryLayout.of([layer] * 32, MemoryConfig(format=format), max_sequences=1, max_len=2048)
    assert bytes_at(serving.classes, 1000, 1500) == bytes_at(held.classes, 1000, 1500)
    answer = estimate(config)
    assert (answer.memory, answer.bytes_per_token) == (f"paged {format}", token)
    exact = estimate(compose_capacity(["model=llama3-8b", "hardware=h100", "simulate=false"]))
    assert answer.users == pytest.approx(exact.users * exact.bytes_per_token / token, rel=0.01)


@pytest.mark.parametrize("format", QUANTISED)
def test_a_format_and_a_kv_dtype_of_its_name_are_one_memory(format):
    words = ["model=jamba", "hardware=h200x4", "simulate=false"]
    said = [[f"format={format}"], [f"memory.kv_dtype={format}"], [f"format={format}", f"memory.kv_dtype={format}"]]
    first, *others = (estimate(compose_capacity([*words, *each])) for each in said)
    assert all(other == first for other in others)
    assert first.skipped == f"recurrent: {format}: every step rewrites it"
    blocks = Serving.of(compose_capacity([*words, "memory=oracle", said[1][0]]), 2048, Context(1500, 1000))
    assert blocks.token_bytes == first.bytes_per_token


@pytest.mark.parametrize("format", ["model", "int8"])
def test_a_selection_reads_less_and_holds_its_index_beside(format):
    """Quest at an eighth of the pages, behind two dense layers: of each of 94 pages a minimum and a maximum of the keys
    of 8 heads in bfloat16."""
    words = ["model=llama3-8b", "hardware=h100", "workload.num_requests=8", "context_len=1500", f"format={format}"]
    selecting = "selection={type:quest,fraction:0.125,dense_layers:2}"
    answer, exact = (estimate(compose_capacity([*words, f"memory.{each}"])) for each in (selecting, "selection=all"))
    layer = exact.bytes_per_token // 32
    num_pages, num_read, index = 94, 94 // 8, 2 * 8 * 128 * 2
    assert answer.index_bytes == 30 * num_pages * index
    assert answer.sequence_bytes == exact.sequence_bytes + answer.index_bytes
    slots = (num_read - 1) * 16 + 1500 % 16
    assert answer.read_bytes == 2 * 1500 * layer + 30 * (num_pages * index + slots * layer)
    assert exact.read_bytes == 1500 * exact.bytes_per_token
    page = 32 * 16 * layer
    assert answer.users == pytest.approx(exact.users * page / (page + 30 * index), abs=2), "users fall by the index"
    assert answer.decode_tokens_per_s > 1.5 * exact.decode_tokens_per_s
    assert answer.simulated["tokens_per_s"] > exact.simulated["tokens_per_s"]
    assert answer.simulated["statistics"] > exact.simulated["statistics"] == 0
    config = compose_capacity([*words, f"memory.{selecting}"])
    serving = Serving.of(config, 2048, Context(1500, 1500))
    chosen = (
        slots + 1 + num_pages * 2 // 2
    )  # a score takes two products of 128 numbers a page, an attended slot as many
    assert serving.mixing_flops(Context(1500, 1500)) == 4 * 32 * 128 * (2 * 1501 + 30 * chosen)
    told = told_of(config, answer)
    assert told["read for one token"].endswith("; 30 of 32 layers select")
    assert told["held for its index"].endswith("; less is read, not held")
    assert answer.memory == " ".join(filter(None, ["paged", format.replace("model", ""), "quest"]))


def test_a_control_that_reads_all_keys_is_no_faster():
    """And what is selected is chosen among what a compression left."""
    words = ["model=llama3-8b", "hardware=h100", "context_len=1500", "simulate=false"]
    exact, oracle, both, snapkv = (
        estimate(compose_capacity([*words, *more]))
        for more in (
            [],
            ["selection=oracle"],
            ["selection=quest", "compression=snapkv", "budget=0.5"],
            ["compression=snapkv", "budget=0.5"],
        )
    )
    assert 0.5 * exact.read_bytes < oracle.read_bytes < exact.read_bytes
    assert oracle.index_bytes == 0
    assert oracle.users == exact.users
    assert both.sequence_bytes == snapkv.sequence_bytes + both.index_bytes
    assert both.read_bytes < snapkv.read_bytes


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
    told = told_of(config, answer)
    assert told["left as they are"] == "local128: h2o: a window forgets by itself"
    assert "compactions dropped" in told["compressed"]
    assert "with a prompt of" in told["in pages, at rest"]
    assert "at most on the way" in told
    assert answer.memory == "paged h2o 0.5"
    (row,) = rows_of(answer_each([config]))
    assert (row["memory"], row["users"]) == ("paged h2o 0.5", f"{answer.users:,}")
    assert math.isclose(answer.weight_share + answer.state_share + answer.compute_share, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compression=h2o"], r"memory\.budget = None: must be slots"),
        (["compression=h2oo", "budget=64"], r"memory\.compression\.type = 'h2oo': did you mean h2o"),
        (["compression=h2o", "budget=4"], r"memory\.budget = '4 slots': must be at least the 12 slots"),
        (["compression=h2o", "budget=1KiB"], r"memory\.budget = '1KiB': must be at least"),
        (["compression=streaming", "budget=0.5"], r"memory\.budget = '0\.5 of the prompt': must be slots"),
        (["memory=pow2", "compression=h2o", "budget=64"], r"memory\.compression = 'h2o': needs memory\.name = paged"),
        (["memory=dense", "format=kivi4"], r"memory\.format = 'kivi4': needs memory\.name = paged, not dense"),
        (["format=kivi2", "memory.page_size=8"], r"memory\.page_size = 8: must be at least 16 for kivi2"),
        (
            ["format=int8", "memory.kv_dtype=int4"],
            r"memory\.format = 'int8': must be int4 or model with kv_dtype = int4",
        ),
        (["format=kivi4", "memory.kv_dtype=int8"], r"memory\.format = 'kivi4': must be int8 or model with kv_dtype"),
        (["format=int8.channel"], r"memory\.format = 'int8\.channel': must be one of model, int8, fp8"),
        (
            ["model=deepseek-v2", "hardware=h200x8", "format=rotated4"],
            r"memory\.format = 'rotated4': LatentState is not rotated",
        ),
        (["selection=ques"], r"memory\.selection\.type = 'ques': did you mean quest"),
        (["selection=quest", "memory=oracle"], r"memory\.selection = 'quest': needs memory\.name = paged, not oracle"),
        (["selection=quest", "format=kivi4"], r"memory\.format = 'kivi4': must be model or by token"),
        (["selection=quest", "compression=streaming", "budget=64"], r"memory\.selection = 'quest': must be all with"),
        (["model=mamba2-2.7b", "selection=quest"], r"memory\.selection = 'quest': serves no layer"),
        (["model=mamba2-2.7b", "compression=h2o", "budget=64"], r"memory\.compression = 'h2o': serves no layer"),
        (["model=mamba2-2.7b", "format=kivi4"], r"memory\.format = 'kivi4': serves no layer"),
    ],
)
def test_bad_questions_are_answered_with_the_field(words, message):
    with pytest.raises(ConfigError, match=message):
        estimate(compose_capacity(["hardware=h100", "simulate=false", *words]))
