"""Stated bytes = bytes of the arrays = what the compiler reports, to the byte; and a donated step leaves pools in
place."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.engine.step import MemoryStep
from kvlab.evaluation import measure as measuring
from kvlab.evaluation.measure import MemoryReport, measure, per_sequence
from kvlab.ledger.states import RetrievalState, TokenState
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.pools import allocate_pages, num_bytes, write_tokens
from kvlab.mixers.attention import AttentionConfig
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer, merge, split
from kvlab.units import Spread
from pallas_kernels.formats import quantised
from tests.contracts import VOCAB, build, pairs_with, states_of

MEMORIES = [MemoryConfig(name="paged", page_size=4, chunk_len=4), MemoryConfig(name="dense", chunk_len=4)]


def layout_of(variant, memory, rows=3, max_len=40, dtype="float32") -> tuple[MemoryStep, dict]:
    model, structure, params, _ = build(variant, dtype)
    layout = MemoryLayout.of(model.states(), memory, max_sequences=rows, max_len=max_len)
    return MemoryStep.of(structure, layout), params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("variant", "memory"), pairs_with(MEMORIES), ids=lambda value: getattr(value, "name", value))
def test_stated_bytes_are_the_arrays_bytes(variant, memory, dtype):
    step, _ = layout_of(variant, memory, dtype=dtype)
    pools = step.layout.allocate()
    assert num_bytes(pools) == step.layout.pool_bytes
    assert sum(account.pool for account in step.layout.ledger().audit()) == step.layout.pool_bytes


QUANTISED = [
    ("gqa", "int8"),
    ("gqa", "fp8"),
    ("gqa", "int4"),
    ("latent", "fp8"),
    ("retrieval", "int4"),
    ("hybrid", "int8"),
]


@pytest.mark.parametrize(("variant", "format"), QUANTISED)
def test_quantised_bytes_are_stated_and_smaller(variant, format):
    exact, held = (
        layout_of(variant, MemoryConfig(page_size=4, chunk_len=4, format=f))[0].layout for f in ("model", format)
    )
    assert num_bytes(jax.eval_shape(held.allocate)) == held.pool_bytes < exact.pool_bytes
    assert sum(account.pool for account in held.ledger().audit()) == held.pool_bytes
    assert (exact.is_exact, held.is_exact) == (True, False)


def test_bytes_of_int8_pages():
    """GQA of 2 KV heads and dims 8 in float32: 128 bytes a token; in int8 32, and 16 of scales."""
    exact, held = (
        layout_of("gqa", MemoryConfig(format=format))[0].layout.classes[0].spec for format in ("model", "int8")
    )
    assert (exact.unit_bytes, held.unit_bytes, held.scale_bytes) == (128, 48, 16)


@pytest.mark.parametrize(
    ("variant", "memory"),
    [pair for pair in pairs_with(MEMORIES) if pair[0] in ("gqa", "window_sinks", "mamba2", "hybrid", "latent", "cla")],
    ids=lambda value: getattr(value, "name", value),
)
def test_stated_bytes_are_what_the_compiler_aliases(variant, memory):
    """Donated pools are updated in place: the compiler aliases exactly the stated bytes, and its arguments are exactly
    parameters, pools, plan and tokens."""
    step, params = layout_of(variant, memory)
    pools = step.layout.allocate()
    analysis = step.compiled(params, pools, 1).memory_analysis()
    assert analysis.alias_size_in_bytes == step.layout.pool_bytes
    plan = step.layout.ledger().plan([], 3, 1)
    assert analysis.argument_size_in_bytes == _used(params, pools, plan, step)


def _used(params, pools, plan, step) -> int:
    """Bytes of the arguments that the program reads: jit drops what no result needs (positions and tables
    of plain states)."""
    tokens = jnp.zeros((3, 1), jnp.int32)
    closed = jax.make_jaxpr(lambda *a: MemoryStep.__call__.__wrapped__(step, *a))(params, pools, plan, tokens)
    used = {id(v) for v in closed.jaxpr.outvars}
    for eqn in reversed(closed.jaxpr.eqns):
        if any(id(v) in used for v in eqn.outvars):
            used |= {id(v) for v in eqn.invars}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in closed.jaxpr.invars if id(v) in used)


DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
"""What a page may hold; 8-bit numbers as bits."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 32])
def test_a_donated_write_copies_nothing(dtype, num_tokens):
    """Temporaries of the key-value write alone stay below 1% of the pool, whatever a page holds, and the write is
    right."""
    shape = (2049, 2, 16, 32)
    rows, slots = 4, np.arange(4 * num_tokens).reshape(4, num_tokens).astype(np.int32) * 7 + 16
    slots[-1, -1] = 2049 * 16  # dropped
    new = jnp.asarray(np.random.default_rng(0).integers(0, 3, (rows, num_tokens, 2, 32)), dtype)

    def write(pool, slots, new):
        return write_tokens(TokenState(2, 32, 32), pool, slots, {"keys": new, "values": new})

    stored = dtype if jnp.dtype(dtype).itemsize > 1 else "uint8"
    pool = {name: jnp.zeros(shape, stored) for name in ("keys", "values")}
    compiled = jax.jit(write, donate_argnums=0).lower(pool, jnp.asarray(slots), new).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * num_bytes(pool)
    expected = np.zeros(shape, np.float32)
    for row, column in np.ndindex(slots.shape):
        page, offset = divmod(int(slots[row, column]), 16)
        if page < 2049:
            expected[page, :, offset] = np.asarray(new[row, column], np.float32)
    after = compiled(pool, jnp.asarray(slots), new)
    np.testing.assert_array_equal(np.asarray(after["keys"]).view(jnp.dtype(dtype)).astype(np.float32), expected)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_a_donated_write_in_a_format_copies_nothing(format):
    """Codes and scales are written in place, as `quantised` makes them."""
    state = TokenState(2, 32, 32).stored(format)
    pool = allocate_pages(state, 2049, 16)
    new = jax.random.normal(jax.random.key(0), (4, 8, 2, 32))
    slots = np.arange(4 * 8).reshape(4, 8).astype(np.int32) + 32
    write = jax.jit(partial(write_tokens, state), donate_argnums=0)
    compiled = write.lower(pool, slots, {"keys": new, "values": -new}).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * num_bytes(pool)
    after = compiled(pool, slots, {"keys": new, "values": -new})
    expected = quantised(new.reshape(2, 16, 2, 32).swapaxes(1, 2), format)
    np.testing.assert_array_equal(np.asarray(after["keys"])[2:4], np.asarray(expected.payload).view(np.uint8))
    np.testing.assert_array_equal(np.asarray(after["values_scale"])[2:4], np.asarray(expected.scales))
    assert not any(np.asarray(array, np.float32)[[0, 1, 4]].any() for array in after.values())


@pytest.mark.parametrize(
    ("dtype", "format"),
    [("float32", "model"), ("bfloat16", "model"), *(("float32", f) for f in ("int8", "fp8", "int4"))],
)
def test_a_step_of_the_engine_leaves_its_pool_in_place(dtype, format):
    """Temporaries of a whole decode step below 1% of a large pool: nothing of it is copied."""
    model, structure, params, _ = build("gqa", dtype)
    memory = MemoryConfig(page_size=4, chunk_len=4, format=format)
    layout = MemoryLayout.of(model.states(), memory, max_sequences=8, max_len=8192)
    step, pools = MemoryStep.of(structure, layout), jax.eval_shape(layout.allocate)
    plan, tokens = layout.ledger().plan([], 8, 1), jax.ShapeDtypeStruct((8, 1), jnp.int32)
    analysis = MemoryStep.next_logits.lower(step, params, pools, plan, tokens).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == layout.pool_bytes
    assert analysis.temp_size_in_bytes < 0.01 * layout.pool_bytes + 600_000  # the blocks of one turn of attention


def measured(step, params):
    """All but the last three tokens are the prompt."""
    return measure(step, params, VOCAB, prompt_len=step.layout.max_len - 3, decode_steps=3)


def test_measured_report_agrees_with_live_and_formula():
    """MQA of 1 KV head and dims 8: 64 bytes a token in float32; plus the short convolution's two columns of 16."""
    step, params = layout_of("mqa", MemoryConfig(page_size=4, chunk_len=4), rows=2, max_len=30)
    report, speeds = measured(step, params)
    history = 2 * 2 * 16 * 4
    assert report.logical_bytes == 2 * 30 * 64 + history
    assert report.allocated_bytes == 2 * 32 * 64 + history  # 30 tokens are 8 pages of 4
    assert report.pool_bytes >= report.allocated_bytes
    assert sum(row["allocated_bytes"] for row in report.layers) == report.allocated_bytes
    assert sum(row["logical_bytes"] for row in report.layers) == report.logical_bytes
    assert report.peak_bytes >= num_bytes(params) + report.pool_bytes + report.temp_bytes
    assert speeds.decode_tokens_per_s > 0


@pytest.mark.parametrize("memory", ["paged", "dense"])
def test_logical_bytes_count_scales_in_the_record_as_in_the_state(memory):
    """MQA in int8: 16 bytes of numbers a token, and two scales of 4."""
    step, params = layout_of("mqa", MemoryConfig(name=memory, page_size=4, chunk_len=4, format="int8"), 2, 30)
    report, _ = measured(step, params)
    assert report.logical_bytes == 2 * 30 * (16 + 2 * 4) + 2 * 2 * 16 * 4
    specs = [step.layout.classes[index].spec for layer in step.layout.states for index in layer.values()]
    assert report.logical_bytes == sum(2 * spec.logical_bytes(30, 4) for spec in specs)
    assert sum(row["logical_bytes"] for row in report.layers) == report.logical_bytes


def test_a_wrong_statement_is_refused(monkeypatch):
    step, params = layout_of("mqa", MEMORIES[0])
    monkeypatch.setattr(measuring, "num_bytes", lambda pools: num_bytes(pools) + 1)
    with pytest.raises(AssertionError, match="the layout states"):
        measured(step, params)


def test_windowed_memory_stops_growing():
    sizes = []
    for max_len in (40, 400):
        step, params = layout_of("window", MEMORIES[0], rows=2, max_len=max_len)
        sizes.append(measured(step, params)[0].allocated_bytes)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("variant", "format", "expected"),
    [
        ("mqa", "model", 30 * 64 + 2 * 16 * 4),
        ("mqa", "int8", 30 * (16 + 2 * 4) + 2 * 16 * 4),
        ("latent", "model", 30 * (6 + 2) * 4),
        ("latent", "int8", 30 * (6 + 2 + 4)),
        ("window", "model", None),
        ("retrieval", "model", None),
        ("retrieval_blocks", "model", 30 * 6 * 4 + (9 - 3 + 30 % 3) * 32 * 4),
        ("retrieval_pages", "model", 30 * 6 * 4 + (8 - 4 + 30 % 4) * 32 * 4),
    ],
)
def test_bytes_read_for_a_token(variant, format, expected):
    """All that is live of one sequence, whatever the batch; of a retrieval state its index and what it selects."""
    step, params = layout_of(variant, MemoryConfig(page_size=4, chunk_len=4, format=format), rows=3, max_len=30)
    report, _ = measured(step, params)
    if expected is None:
        expected = sum(_read(state.spec, 30) * state.num_layers for state in step.layout.classes)
    assert report.read_bytes_per_token == expected
    assert per_sequence(report)["read_bytes_per_token"] == expected
    assert per_sequence(report)["logical_bytes"] == report.logical_bytes / 3
    assert (expected < report.logical_bytes / 3) == variant.startswith("retrieval")


def test_an_index_is_held_beside_all_that_attention_holds():
    """More bytes a token than attention, by index_dim numbers, and fewer read."""
    indexed, plain = states_of("retrieval_pages")[0], states_of("gqa")[0]
    assert indexed.unit_bytes == plain.unit_bytes + 6 * 4
    assert indexed.read_bytes(30) < plain.read_bytes(30)


def _read(spec, num_tokens) -> int:
    """By hand, for float32: tokens in sight times their numbers."""
    if isinstance(spec, RetrievalState):
        selected = min(num_tokens, spec.num_selected) * spec.num_kv_heads * (spec.key_dim + spec.value_dim)
        return 4 * (num_tokens * spec.index_dim + selected)
    if isinstance(spec, TokenState):
        seen = min(num_tokens, spec.visible.window - 1) if spec.visible.window else num_tokens
        return 4 * seen * spec.num_kv_heads * (spec.key_dim + spec.value_dim)
    return 4 * sum(int(np.prod(part.shape)) for part in spec.parts)


def stack_of(num_sharing):
    """Four layers of 2 KV heads of 8 numbers, of which every second, or the upper ones, share."""
    config = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
    shares = {0: (False,) * 4, 2: (False, True) * 2, 3: (False, True, True, True)}[num_sharing]
    layers = [LayerConfig("attention", replace(config, shares_kv=each)) for each in shares]
    return split(Transformer(layers, ModelConfig(model_dim=16, tie_embeddings=False), VOCAB, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda m: m.name)
@pytest.mark.parametrize("num_sharing", [0, 2, 3])
def test_layers_that_share_are_as_many_bytes_less(num_sharing, memory):
    """Of pools as of what a sequence holds, stated, in arrays and by the compiler; what is read stays the same."""
    structure, params = stack_of(num_sharing)
    layout = MemoryLayout.of(merge(structure, params).states(), memory, max_sequences=3, max_len=30)
    step, pools = MemoryStep.of(structure, layout), layout.allocate()
    plain = MemoryLayout.of(merge(*stack_of(0)).states(), memory, max_sequences=3, max_len=30)
    assert 4 * layout.pool_bytes == (4 - num_sharing) * plain.pool_bytes
    assert layout.pool_bytes == num_bytes(pools) == sum(account.pool for account in layout.ledger().audit())
    assert step.compiled(params, pools, 1).memory_analysis().alias_size_in_bytes == layout.pool_bytes
    report, _ = measured(step, params)
    token = 2 * 2 * 8 * 4
    assert report.logical_bytes == 3 * 30 * (4 - num_sharing) * token
    assert report.read_bytes_per_token == 4 * 30 * token


def test_an_older_record_has_no_bytes_read():
    report = MemoryReport(600, 900, 30, 60, None, 1200, 64, 3, (), ())
    sizes = {"logical_bytes": 200, "allocated_bytes": 300, "temp_bytes": 10, "peak_bytes": 20}
    assert per_sequence(report) == sizes


def test_speeds_are_medians_with_the_quartiles_of_their_samples(monkeypatch):
    """A clock on which the steps take 9 s (compiling), then 1, 2, 3, 4 and 5 s: of the last four the median is 3.5."""
    step, params = layout_of("mqa", MemoryConfig(page_size=4, chunk_len=4), rows=2, max_len=30)
    times = iter([at for length in (9, 1, 2, 3, 4, 5) for at in (0.0, float(length))])
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    trained = Spread.of([4.0, 1.0, 2.0, 3.0])
    _, speeds = measure(step, params, VOCAB, prompt_len=24, decode_steps=4, train_step_ms=trained)
    assert speeds.decode_tokens_per_s == pytest.approx(2 / 3.5)
    assert speeds.decode_low_tokens_per_s == pytest.approx(2 / np.quantile([2, 3, 4, 5], 0.75))
    assert speeds.decode_high_tokens_per_s == pytest.approx(2 / np.quantile([2, 3, 4, 5], 0.25))
    assert (speeds.num_decode_samples, speeds.num_train_samples) == (4, 4)
    low, high = np.quantile([1, 2, 3, 4], [0.25, 0.75])
    assert (speeds.train_step_low_ms, speeds.train_step_ms, speeds.train_step_high_ms) == (low, 2.5, high)
    monkeypatch.undo()
    _, speeds = measure(step, params, VOCAB, prompt_len=24, decode_steps=4, train_step_ms=Spread.of([4.0]))
    assert (speeds.train_step_ms, speeds.train_step_low_ms) == (4.0, None), "one sample has no spread"
