"""Budgets of bytes: the closed form of what is held against a ledger that is run, what is solved against brute force
over real layouts, and every refusal."""

import itertools

import pytest

from kvlab.blueprint import resolved
from kvlab.compose import compose, expand
from kvlab.config import Config
from kvlab.ledger.classes import Lengths
from kvlab.ledger.growth import bytes_at, grow, pages_at, stored_at
from kvlab.ledger.readers import Readers
from kvlab.ledger.states import ArraySpec, RecurrentState, TokenState
from kvlab.memory.budgets import LEAST_SHARE, Context, held_bytes, in_slots, solve_slots, with_slots
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.schema import ConfigError
from pallas_kernels.visible import Visible

FULL = TokenState(2, 16, 16, readers=Readers(4))
WINDOW = TokenState(2, 16, 16, visible=Visible(9, 2), readers=Readers(4))
STATE = RecurrentState((ArraySpec("ssm", (3, 5), "float32"),))
LAYERS = ({"kv": FULL}, {"kv": WINDOW}, {"kv": FULL, "ssm": STATE})
METHODS = {
    "h2o": {"type": "h2o", "sinks": 1, "recent": 3},
    "snapkv": {"type": "snapkv", "sinks": 1, "recent": 4, "window": 3},
    "knorm chunks every": {"type": "knorm", "sinks": 0, "recent": 2, "at": "chunks", "every": 6},
    "knorm ada": {"type": "knorm", "sinks": 0, "recent": 2, "heads": "ada"},
    "streaming": {"type": "streaming", "sinks": 3},
    "duo": {"type": "duo", "sinks": 1, "streaming": [[0], [1]]},
    "kvzip": {"type": "kvzip", "sinks": 1},
}


def memory_of(method=None, budget=None, format="model", page_size=4, **more):
    compression = METHODS[method] if method else None
    return MemoryConfig(page_size=page_size, chunk_len=7, compression=compression, budget=budget, format=format, **more)


@pytest.mark.parametrize(
    "memory",
    [
        memory_of(),
        MemoryConfig(name="dense", chunk_len=7),
        memory_of(format="int8"),
        *(memory_of(name, 13) for name in METHODS),
        *(memory_of(name, 0.4) for name in METHODS if name not in ("streaming", "duo")),
        memory_of(format="kivi4", page_size=8, residual=5),
        memory_of(format="kivi4", page_size=8, residual=0, quantised_prefill="chunks"),
        memory_of("snapkv", 20, format="kivi4", page_size=8, residual=6),
    ],
    ids=str,
)
def test_what_is_held_in_closed_form_is_what_a_ledger_holds(memory):
    for prompt_len, more in itertools.product((1, 6, 24, 45), (0, 1, 2, 7, 20)):
        length = prompt_len + more
        layout = MemoryLayout.of(LAYERS, memory, max_sequences=1, max_len=length, prompt_len=prompt_len)
        ledger = layout.ledger()
        growth = grow(ledger, "a", Lengths(prompt_len, length))
        assert growth is not None
        ledger.check()
        assert pages_at(layout.classes, prompt_len, length) == growth.at_end
        held = sum(account.allocated for account in ledger.audit())
        assert bytes_at(layout.classes, prompt_len, length) == held
        stored = ledger.stored("a")
        for state, slots in zip(layout.classes, stored_at(layout.classes, prompt_len, length), strict=True):
            if state.paged and state.spec.span is None:
                assert slots == stored[state.name]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", ["model", "int8"])
def test_slots_are_those_that_brute_force_finds(method, format):
    """Every count of slots, by a ledger that is run; the largest whole pages within the budget."""
    context = Context(60, 52)
    sizes = {}
    for slots in range(4, 61, 4):
        memory = memory_of(method, slots, format)
        try:
            layout = MemoryLayout.of(LAYERS, memory, max_sequences=1, max_len=60, prompt_len=52)
        except ConfigError:
            continue
        ledger = layout.ledger()
        assert grow(ledger, 0, Lengths(52, 60))
        sizes[slots] = sum(account.allocated for account in ledger.audit())
    answered = 0
    for num_bytes in range(min(sizes.values()) - 100, max(sizes.values()) + 2000, 517):
        fits = [slots for slots, size in sizes.items() if size <= num_bytes]
        memory = memory_of(method, f"{num_bytes}B", format)
        if not fits or sizes[max(fits)] < LEAST_SHARE * num_bytes:
            with pytest.raises(ConfigError, match=r"memory\.budget = "):
                solve_slots(LAYERS, memory, context)
            if not fits:
                continue
            memory = memory_of(method, f"{num_bytes}B", format, allow_underfill=True)
        found = solve_slots(LAYERS, memory, context)
        assert (found.solved, found.held_bytes) == (max(fits), sizes[max(fits)])
        answered += 1
    assert answered > 5


def test_sealed_pages_and_their_scales_count():
    memory = memory_of("snapkv", "32KiB", "kivi4", page_size=8, residual=6, allow_underfill=True)
    found = solve_slots(LAYERS, memory, Context(200, 180))
    sizes = {slots: held_bytes(LAYERS, with_slots(memory, slots), Context(200, 180)) for slots in range(8, 208, 8)}
    assert found.solved == max(slots for slots, size in sizes.items() if size <= 32768)
    plain = solve_slots(LAYERS, memory_of("snapkv", "32KiB", page_size=8, allow_underfill=True), Context(200, 180))
    assert found.solved > 2 * plain.solved


def test_for_prompts_that_nobody_knows_it_is_what_a_compaction_leaves():
    memory = in_slots(LAYERS, memory_of("h2o", "24KiB", allow_underfill=True), 400)
    assert (
        held_bytes(LAYERS, memory, Context(400, 400))
        <= 24 * 1024
        < held_bytes(LAYERS, with_slots(memory, memory.budget + 4), Context(400, 400))
    )
    exact = memory_of()
    assert in_slots(LAYERS, exact, 400) is exact


SMALL = [
    "model.model_dim=16",
    "mixer.A.head_dim=4",
    "memory.page_size=4",
    "measure.decode_steps=4",
    "task.test=['48:8']",
]


@pytest.mark.parametrize(
    ("words", "place", "values"),
    [
        (["mixer=swa", "model.model_dim=16", *SMALL[2:]], "W.window", range(1, 50)),
        (["mixer=gqa", *SMALL], "A.num_kv_heads", (1, 2, 4)),
        (["mixer=mla", *SMALL], "A.rank", (2, 4, 14, 16, 18, 20, 32)),
        (["mixer=mamba2", "model.model_dim=16", *SMALL[2:]], "M.state_dim", range(1, 60)),
        (["mixer=hybrid", *SMALL], "M.state_dim", range(1, 60)),
    ],
)
def test_a_mixers_knob_is_solved_as_brute_force_would(words, place, values):
    base = compose(words)
    layer, field = place.split(".")
    sizes = {}
    for value in values if len(values) < 10 else (1, 2, 3, 16, 17, 18, 19, 20, 21, 22, 23, 40):
        config = compose([*words, f"mixer.{layer}.{field}={value}"])
        sizes[value] = measured_bytes(config)
    num_bytes = sizes[list(sizes)[len(sizes) // 2]] + 8
    found = compose([*words, f"budget={num_bytes}B"])
    assert found.equal_budget.knob == f"mixer.{place}"
    solved = getattr(found.mixer.layers[layer].config, field)
    assert found.equal_budget.solved == solved
    assert solved >= max(value for value, size in sizes.items() if size <= num_bytes)
    assert all(solved < value for value, size in sizes.items() if size > num_bytes)
    assert measured_bytes(found) == found.equal_budget.held_bytes <= num_bytes
    assert found.memory == base.memory
    assert resolved(found) == found
    assert Config.build(found.as_dict()) == found
    by_hand = compose([*words, f"mixer.{layer}.{field}={solved}"])
    assert (found.run_id, found.training_id) == (by_hand.run_id, by_hand.training_id), "what was asked is no identity"


def test_layers_that_read_another_turn_with_its_knob():
    """They have none of their own, and would no longer fit."""
    words = ["mixer=cla", *SMALL, "mixer.A.num_kv_heads=2", "mixer.A.short_conv=0"]
    few, many = (measured_bytes(compose([*words, f"mixer.A.num_kv_heads={heads}"])) for heads in (1, 2))
    found = compose([*words, f"budget={few}B"])
    assert found.equal_budget.knob == "mixer.A.num_kv_heads"
    assert [layer.config.num_kv_heads for layer in found.layers()] == [1, 1]
    assert measured_bytes(found) == few == many // 2
    assert Config.build(found.as_dict()) == found
    yoco = compose(["mixer=yoco", *SMALL[2:], "mixer.F.num_kv_heads=2", "budget=64KiB", "memory.allow_underfill=true"])
    assert yoco.equal_budget.knob == "mixer.W.window", "of the two that it has"


def measured_bytes(config):
    """By a ledger that is run."""
    from kvlab.lab.laboratory import Laboratory

    layout = Laboratory.of(config, abstract=True).layout(config.context_len, 1, prompt_len=config.context.prompt_len)
    ledger = layout.ledger()
    assert grow(ledger, 0, Lengths(config.context.prompt_len, config.context_len))
    return sum(account.allocated for account in ledger.audit())


def test_what_has_no_knob_is_the_ceiling_whatever_was_asked():
    plain = compose(SMALL)
    for budget in ("64KiB", "0.25", "256"):
        config = compose([*SMALL, f"budget={budget}"])
        assert config.run_id == plain.run_id
        assert config.equal_budget.is_ceiling
        assert str(config.equal_budget.asked) == budget
    grouped = compose(["mixer=gqa", *SMALL, "budget=0.25"])
    assert grouped.equal_budget.is_ceiling, "a fraction is of what a compression keeps"


def test_equal_runs_of_a_sweep_are_one():
    few = ["memory.compression.sinks=1", "memory.compression.recent=2"]
    configs, _ = expand([*SMALL, "compression=none", "budget=0.5,0.75"], multirun=True)
    assert len({config.run_id for config in configs}) == 1
    configs, _ = expand([*SMALL, *few, "compression=h2o,knorm", "budget=0.5,0.75"], multirun=True)
    assert len({config.run_id for config in configs}) == 4
    assert len({config.training_id for config in configs}) == 1


def test_bytes_and_the_slots_they_are_solved_for_are_one_run():
    words = [*SMALL, "compression=knorm", "memory.compression.recent=2", "memory.compression.sinks=1"]
    found = compose([*words, "budget=6KiB", "memory.allow_underfill=true"])
    assert found.run_id == compose([*words, f"budget={found.memory.budget}"]).run_id
    assert found.equal_budget.asked == "6KiB"
    assert found.as_dict()["equal_budget"]["knob"] == "memory.budget"
