"""What a plan says of a memory is what a measurement finds, for memories that drop tokens or seal pages; and what it
says of budgets."""

import pytest

from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.measure import Observed, per_sequence, read_bytes_per_token
from kvlab.evaluation.score import Scorer
from kvlab.lab.execute import measure_memory
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.plan import filled
from kvlab.lab.sweeps import idle_lines
from kvlab.lab.tables import budget_lines
from kvlab.memory.budgets import Context
from kvlab.random import named_key
from kvlab.units import UNTIMED
from tests.lab.small import small

MEMORIES = {
    "full": [],
    "h2o, chunks": ["memory.compression={type:h2o,sinks:1,recent:3,at:chunks,every:3}", "budget=8"],
    "snapkv": ["memory.compression={type:snapkv,sinks:1,recent:3,window:2}", "budget=10"],
    "streaming": ["memory.compression={type:streaming,sinks:1}", "budget=9"],
    "kivi": ["format=kivi4", "memory.page_size=8", "memory.residual=3"],
    "bytes": ["memory.compression={type:knorm,sinks:1,recent:3}", "budget=3600B", "memory.allow_underfill=true"],
}


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_plan_says_what_a_measurement_finds(memory, tmp_path):
    config = small(tmp_path, *MEMORIES[memory])
    lab = Laboratory.of(config)
    found, _ = measure_memory(lab, lab.model.params, config.context_len, UNTIMED)
    layout = lab.layout(config.context_len, config.measure.batch_size, prompt_len=config.context.prompt_len)
    ledger, peak_bytes = filled(layout, config.context)
    accounts = ledger.audit()
    assert sum(account.allocated for account in accounts) == found.allocated_bytes
    assert sum(account.logical for account in accounts) == found.logical_bytes
    assert peak_bytes == found.held_peak_bytes
    seen = Observed(layout, accounts, None, UNTIMED, UNTIMED, ledger, None)
    assert read_bytes_per_token(seen) == found.read_bytes_per_token
    if config.equal_budget is not None:
        assert per_sequence(found)["allocated_bytes"] == config.equal_budget.held_bytes
        assert found.pool_bytes >= found.held_peak_bytes >= found.allocated_bytes


def test_what_a_budget_became_is_said(tmp_path):
    full = small(tmp_path, "budget=64KiB")
    words = "mha: budget = 64KiB has nothing to solve here: the run holds everything, a ceiling"
    assert (budget_lines(full), idle_lines([full])) == ([], [words])
    config = small(tmp_path, *MEMORIES["bytes"])
    (line,) = budget_lines(config)
    said = config.equal_budget
    assert f"budget = 3600B is memory.budget = {said.solved}, which holds {said.held_bytes:,} bytes a sequence" in line
    assert line.startswith(f"mha/mqar/seed0 knorm {said.solved} [{config.run_id}]")
    assert not budget_lines(small(tmp_path))


@pytest.mark.parametrize(
    ("words", "prompt_len"),
    [
        (["compression=snapkv", "memory.compression={type:snapkv,sinks:1,recent:3,window:2}", "budget=0.5"], 24),
        (["format=kivi4", "memory.page_size=8", "memory.residual=3"], 24),
        (["measure.context_len=40", "memory.compression={type:knorm,sinks:1,recent:3}", "budget=9"], 37),
        ([], 61),
    ],
)
def test_bytes_are_of_the_sequences_that_are_scored(words, prompt_len, tmp_path):
    """A prompt of 64:12 is 24 tokens; where it is compressed, 40 more are measured behind it, and not
    `measure.decode_steps`."""
    config = small(tmp_path, *words, "task.test=['64:12']", "measure.decode_steps=3")
    assert config.context == Context(config.context_len, prompt_len)


def test_what_is_measured_holds_as_many_slots_as_what_was_scored(tmp_path):
    words = ["memory.compression={type:knorm,sinks:1,recent:3}", "budget=0.5", "task.test=['32:4']"]
    config = small(tmp_path, *words, "measure.decode_steps=3")
    lab = Laboratory.of(config)
    found, _ = measure_memory(lab, lab.model.params, config.context_len, UNTIMED)
    layout = lab.layout(lab.task.context_len, config.measure.batch_size)
    check = MaskCheck(lab.model.structure, lab.model.params, layout)
    scorer = Scorer(lab.model.structure, lab.task, named_key(0, "eval"), config.measure.batch_size)
    (part,) = scorer.through_memory(lab.model.params, "test", layout, check)
    stored = found.stored["kv"]
    dropped, given = check.evicted[part.name]
    assert stored == 32 * (1 - dropped / given) == 4 + 24
