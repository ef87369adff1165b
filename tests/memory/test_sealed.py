"""Sealed pages in arrays: bytes, what may not be read, and that sealing copies no pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compose import compose
from kvlab.engine.step import MemoryStep
from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.session import Session
from kvlab.lab.execute import lossy_report
from kvlab.lab.laboratory import Laboratory
from kvlab.ledger.answers import Ready
from kvlab.ledger.classes import Lengths
from kvlab.ledger.plan import Seals, load_plans, save_plans
from kvlab.memory.formats import skipped
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.pools import num_bytes
from kvlab.schema import ConfigError
from tests.contracts import VOCAB, build

KIVI4 = MemoryConfig(page_size=8, chunk_len=6, format="kivi4", residual=3)


def layout_of(variant, memory=KIVI4, dtype="float32", rows=3, max_len=40, **options) -> tuple[MemoryStep, dict]:
    model, structure, params, _ = build(variant, dtype)
    layout = MemoryLayout.of(model.states(), memory, max_sequences=rows, max_len=max_len, **options)
    return MemoryStep.of(structure, layout), params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("variant", "format"), [("gqa", "kivi4"), ("hybrid", "kivi2"), ("mqa", "kivi4")])
def test_bytes_stated_are_the_arrays_and_what_the_compiler_aliases(variant, format, dtype):
    memory = MemoryConfig(page_size=16, chunk_len=8, format=format, residual=5)
    step, params = layout_of(variant, memory, dtype)
    pools = step.layout.allocate()
    assert num_bytes(pools) == step.layout.pool_bytes
    assert sum(account.pool for account in step.layout.ledger().audit()) == step.layout.pool_bytes
    analysis = step.compiled(params, pools, 1).memory_analysis()
    assert analysis.alias_size_in_bytes == step.layout.pool_bytes


@pytest.mark.parametrize("format", ["kivi4", "kivi2"])
def test_a_donated_sealing_copies_no_pool(format):
    """Temporaries far below the pools, of which all bytes are aliased."""
    step, _ = layout_of("gqa", MemoryConfig(page_size=16, chunk_len=8, format=format), rows=8, max_len=8192)
    layout = step.layout
    pools = jax.eval_shape(layout.allocate)
    moves = tuple(jax.ShapeDtypeStruct((4 if state.sealing else 0, 2), jnp.int32) for state in layout.classes)
    compiled = MemoryStep.seal_program.lower(step, pools, Seals(moves)).compile()
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes == layout.pool_bytes
    assert analysis.temp_size_in_bytes < 0.01 * layout.pool_bytes


PROMPT, TOTAL, ROWS = 22, 40, 3
MEMORIES = {
    "kivi4": KIVI4,
    "kivi2": MemoryConfig(page_size=16, chunk_len=7, format="kivi2", residual=0),
    "chunks": MemoryConfig(page_size=8, chunk_len=5, format="kivi4", residual=1, quantised_prefill="chunks"),
    "rotated8": MemoryConfig(page_size=4, chunk_len=5, format="rotated8"),
    "rotated4, dense": MemoryConfig("dense", chunk_len=5, format="rotated4"),
    "rotated4, h2o": MemoryConfig(
        page_size=4, chunk_len=5, format="rotated4", compression={"type": "h2o", "sinks": 1, "recent": 3}, budget=12
    ),
    "rotated8, quest": MemoryConfig(
        page_size=4, chunk_len=5, format="rotated8", selection={"type": "quest", "fraction": 0.5, "dense_layers": 0}
    ),
}


def drive(variant, memory) -> tuple[MaskCheck, Session, np.ndarray, dict]:
    """Prompts in chunks, then tokens one by one, through pools that begin as NaN and become NaN where pages are freed;
    every logit beside the parallel form's."""
    step, params = layout_of(variant, memory, rows=ROWS, max_len=TOTAL)
    session = Session(step, params, step.layout.allocate(np.nan), poisons=True, observes=True)
    tokens, seen = np.random.default_rng(3).integers(0, VOCAB, (ROWS, TOTAL)).astype(np.int32), dict[int, np.ndarray]()
    session.prompt_len, position = PROMPT, 0
    while position < TOTAL:
        width = step.layout.chunk_len if position < PROMPT else 1
        count = min(width, PROMPT - position) if position < PROMPT else 1
        logits = session.advance({row: tokens[row, position : position + count] for row in range(ROWS)}, width)
        session.ledger.check()
        seen |= {position + place: np.asarray(logits[:ROWS, place]) for place in range(count)}
        position += count
    check = MaskCheck(step.structure, params, step.layout)
    return check, session, tokens, seen


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("gqa", "kivi4"),
        pytest.param("hybrid", "kivi2", marks=pytest.mark.ci),
        pytest.param("gqa", "chunks", marks=pytest.mark.ci),
        ("gqa", "rotated8"),
        pytest.param("gqa", "rotated4, dense", marks=pytest.mark.ci),
        pytest.param("gqa", "rotated4, h2o", marks=pytest.mark.ci),
    ],
)
def test_every_logit_is_that_of_the_parallel_form_rounded_alike(variant, name):
    check, session, tokens, seen = drive(variant, MEMORIES[name])
    check.compare(tokens, seen, session.events)
    assert check.num_compared == ROWS * TOTAL
    assert check.worst < 1e-5
    assert bool(session.sealed) == (MEMORIES[name].format.startswith("kivi"))


def test_a_replay_needs_plans_and_seals_and_nothing_else_of_the_host(tmp_path):
    step, params = layout_of("gqa", rows=2, max_len=TOTAL)
    ledger, pools, rng, said = step.layout.ledger(), step.layout.allocate(np.nan), np.random.default_rng(0), []
    for length in (6, 12, 18, *range(19, 30)):
        count = 6 if length <= 18 else 1
        new = {"lengths": Lengths(18, 30)} if length == 6 else {}
        assert ledger.reserve("a", count, **new) == Ready()
        plan, tokens = ledger.plan(["a"], 2, count), rng.integers(0, VOCAB, (2, count)).astype(np.int32)
        logits, pools = step.run(params, pools, plan, tokens)
        ledger.commit("a", count)
        said.append((plan, tokens, np.asarray(logits)[0]))
        if done := ledger.seal(["a"]):
            pools = step.seal(pools, done[0])
            said.append((done[0], None, None))
    assert sum(tokens is None for _, tokens, _ in said) == 3
    save_plans(tmp_path / "plans.npz", [plan for plan, _, _ in said])
    pools = step.layout.allocate(np.nan)
    for plan, (_, tokens, expected) in zip(load_plans(tmp_path / "plans.npz"), said, strict=True):
        if isinstance(plan, Seals):
            pools = step.seal(pools, plan)
        else:
            logits, pools = step.run(params, pools, plan, tokens)
            np.testing.assert_array_equal(np.asarray(logits)[0], expected)


def test_a_residual_as_long_as_the_sequence_seals_nothing():
    step, _ = layout_of("gqa", MemoryConfig(page_size=8, chunk_len=6, format="kivi4", residual=TOTAL))
    ledger = step.layout.ledger()
    ledger.reserve("a", 6, lengths=Lengths(6, TOTAL))
    ledger.commit("a", 6)
    for _ in range(TOTAL - 6):
        ledger.reserve("a", 1)
        ledger.commit("a", 1)
        assert ledger.seal(["a"]) is None


def test_what_forgets_by_itself_is_refused_alone_and_left_beside_others():
    with pytest.raises(ConfigError, match=r"memory.format = 'kivi4': serves no layer of this model"):
        layout_of("window")
    step, _ = layout_of("hybrid")
    sealing = [state for state in step.layout.classes if state.sealing]
    assert [state.spec.span for state in sealing] == [None]
    assert [state.name for state in step.layout.classes if state.is_sealed] == [sealing[0].sealed_name]


def test_what_is_left_as_it_is_says_why():
    model = build("hybrid")[0]
    both = MemoryConfig(
        page_size=8,
        format="kivi4",
        compression={"type": "snapkv", "sinks": 1, "recent": 4, "window": 4},
        budget=12,
    )
    found, states = skipped(model.states(), both), model.states()
    full = [f"{layer}.kv" for layer, each in enumerate(states) if "kv" in each and each["kv"].span is None]
    assert full
    assert not set(full) & set(found)
    reasons = {name.split(".")[1]: reason for name, reason in found.items()}
    assert reasons["kv"] == "snapkv: a window forgets by itself; kivi4: a window forgets by itself"
    assert reasons["ssm"] == "snapkv: one state a sequence cannot be dropped in part; kivi4: every step rewrites it"
    window = build("window")[0].states()
    assert set(skipped(window, KIVI4).values()) >= {"kivi4: a window forgets by itself"}
    assert "kivi4: a window forgets by itself" not in skipped(window, MemoryConfig(format="int8")).values()
    assert skipped(window, MemoryConfig()) == {}
    lab = Laboratory.of(compose(["mixer=hybrid", "format=kivi4", "model.dtype=float32"]), abstract=True)
    report = lossy_report(lab, MaskCheck(lab.model.structure, {}, lab.layout(64, 2)))
    assert report.skipped == skipped(lab.model.states, lab.config.memory)
    assert "kivi4: every step rewrites it" in report.skipped.values()
