"""Decoding on GPUs with the factors swapped, in the simulator with race detection: the kernel, the plan it takes, the
merge behind it."""

import dataclasses
import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.alignment import aligned_copies
from pallas_kernels.formats import FORMATS, Scheme, kivi, quantised
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention import Lists, Pages, gpu, gpu_decode, paged_attention, plan_attention, proof
from pallas_kernels.paged_attention.cases import CASES, KIVI, generated
from pallas_kernels.paged_attention.gpu_decode_tiles import fit, parts_of_columns, producers_for, scratch_for
from pallas_kernels.paged_attention.gpu_merge import merge
from pallas_kernels.paged_attention.gpu_producer import Producer
from pallas_kernels.paged_attention.gpu_ring import Part
from pallas_kernels.paged_attention.gpu_tiled import in_tiles
from pallas_kernels.paged_attention.gpu_tiles import SHARED_BYTES
from pallas_kernels.tensor_cores import Chip
from pallas_kernels.visible import NOWHERE, Visible
from tests.pallas_kernels.cases import LEDGER_CASES, Fetched, named, numbers

HOW = plgpu.InterpretGPUParams(detect_races=True)
check = partial(proof.check, is_compiled=False)
SMALL = {"num_pieces": 3, "max_stages": 2}
"""So that short sequences are cut, and the ring turns."""


def simulated(*arrays: Any, chip: Chip = "hopper", **options: Any) -> Any:
    """`gpu.paged_attention`, which must not fall back."""
    queries, pages, *_ = arrays
    columns = gpu_decode.columns_for(queries.shape[1], queries.shape[2] // pages.num_kv_heads)
    asked = pages.head_dims, pages.schemes, columns, pages.page_size
    assert gpu_decode.refusal(*asked, chip, pages.is_latent) is None
    return gpu.paged_attention(*arrays, interpret=HOW, chip=chip, **SMALL, **options)


@pytest.fixture(autouse=True)
def clean():
    yield
    reset_gpu_interpret_mode_state()


MORE: dict[str, dict[str, Any]] = {
    "64 query heads": {"lengths": [70], "num_queries": 1, "group": 64, "kv_heads": 1},
    "8 queries of 5 heads, window, sinks": {
        "lengths": [150, 3],
        "num_queries": 8,
        "group": 5,
        "kv_heads": 1,
        "window": 70,
        "sinks": 2,
    },
    "keys of 80 dims": {"lengths": [70], "num_queries": 1, "group": 2, "kv_heads": 1, "dims": (80, 64)},
    "256 dims by channel": {
        "lengths": [70],
        "num_queries": 1,
        "group": 4,
        "kv_heads": 1,
        "dims": (256, 256),
        "format": "int8",
        "per": "channel",
        "page_size": 64,
    },
    "values in several products": {"lengths": [70], "num_queries": 3, "group": 16, "kv_heads": 1, "dims": (64, 192)},
    "long pages": {"lengths": [300], "num_queries": 1, "group": 3, "page_size": 128, "kv_heads": 1},
    "fp8 by token, dims of many sizes": {
        "lengths": [40],
        "num_queries": 1,
        "group": 2,
        "format": "fp8",
        "page_size": 32,
        "magnitude": tuple(0.5**channel for channel in range(25)),
        "of_keys": tuple(2.0**channel for channel in range(9)),
    },
    "int2 by token": {"lengths": [70], "num_queries": 1, "group": 2, "format": "int2", "page_size": 32},
    "int2 by channel": {
        "lengths": [70],
        "num_queries": 1,
        "group": 2,
        "format": "int2",
        "per": "channel",
        "page_size": 64,
    },
    "KIVI of 4 bits, 256 dims, long pages": {
        "lengths": [300],
        "num_queries": 1,
        "group": 4,
        "kv_heads": 1,
        "dims": (256, 256),
        "schemes": ("int4", "int4"),
        "page_size": 128,
        "offset": 5.0,
    },
    "KIVI in groups of 64, keys of 128 dims": {
        "lengths": [100],
        "num_queries": 1,
        "group": 3,
        "dims": (128, 192),
        "schemes": ("int2", "int4", 64),
        "page_size": 64,
        "offset": 5.0,
    },
    "KIVI in groups of 32, values of 96 dims": {
        "lengths": [100],
        "num_queries": 1,
        "group": 3,
        "dims": (64, 96),
        "schemes": ("int4", "int4"),
        "page_size": 64,
        "offset": 5.0,
    },
    "KIVI in groups of 96, of which products of 64 have parts": {
        "lengths": [100],
        "num_queries": 1,
        "group": 3,
        "dims": (64, 192),
        "schemes": ("int4", "int4", 96),
        "page_size": 64,
        "offset": 5.0,
    },
    "KIVI of 4 bits, keys and values of 160 dims": {
        "lengths": [100],
        "num_queries": 1,
        "group": 3,
        "kv_heads": 1,
        "dims": (160, 160),
        "schemes": ("int4", "int4"),
        "page_size": 64,
        "offset": 5.0,
    },
    "values of 240 dims, page of 8 slots": {
        "lengths": [70],
        "num_queries": 1,
        "group": 9,
        "kv_heads": 1,
        "dims": (64, 240),
    },
    "two queries of 24 heads in two parts, window, valid slots, soft cap": {
        "lengths": [70, 0, 9],
        "num_queries": 2,
        "group": 24,
        "kv_heads": 2,
        "window": 20,
        "sinks": 2,
        "kept": 0.6,
        "cap": 5.0,
    },
    "fp8 by token, 40 heads in two parts, lists of each head": {
        "lengths": [70, 9],
        "num_queries": 1,
        "group": 40,
        "format": "fp8",
        "page_size": 32,
        "lists": "heads",
    },
    "int8 by channel, 64 heads in parts of 32, values of 128 dims": {
        "lengths": [70],
        "num_queries": 1,
        "group": 64,
        "kv_heads": 1,
        "dims": (64, 128),
        "format": "int8",
        "per": "channel",
        "page_size": 32,
        "with_mass": False,
    },
    "KIVI of 4 bits, 3 queries of 8 heads in parts of 16": {
        "lengths": [100, 30],
        "num_queries": 3,
        "group": 8,
        "kv_heads": 1,
        "dims": (64, 128),
        "schemes": ("int4", "int4"),
        "page_size": 64,
        "offset": 5.0,
    },
    "int4 by channel, two queries of 16 heads": {
        "lengths": [100],
        "num_queries": 2,
        "group": 16,
        "kv_heads": 1,
        "format": "int4",
        "per": "channel",
        "page_size": 64,
    },
}
SLOW = (
    "several blocks, odd head dims",
    "head dims that models have",
    "head dims of 192",
    "one-hot attention",
    "positions beyond 32 K",
    "one head each",
    "large logits",
    "pages that several sequences list, and one lists twice",
    "fp8 by token, tiny values",
    "fp8 by token, large logits",
    "int8 by channel, keys beyond float16",
    "int8 by channel, valid slots",
    "int8 by channel, sizes of queries and keys that make up for each other",
    "int4 by channel",
    "keys of 80 dims",
    "256 dims by channel",
    "values in several products",
    "long pages",
    "int4 by channel, two queries of 16 heads",
    "int2 by token",
    "int2 by channel",
    "KIVI of 4 bits, 256 dims, long pages",
    "KIVI in groups of 64, keys of 128 dims",
    "values of 240 dims, page of 8 slots",
    "values of 112 dims are the first columns of the keys",
    "fp8 by token, head dims of 96, valid slots",
    "int4 by token, head dims of 160",
    "int8 by channel, values of 96 dims",
    "8 queries of 5 heads, window, sinks",
    "fp8 by token, 40 heads in two parts, lists of each head",
    "int8 by channel, 64 heads in parts of 32, values of 128 dims",
    "KIVI of 4 bits, keys and values of 160 dims",
    "fp8 by channel, keys of 224 dims, values of 96 dims",
    "int8 by token, its own chunk, lists of each head",
    "int8 by channel, values are the first columns of the keys",
    *(name for name in KIVI if name not in ("KIVI of 4 bits, valid slots, soft cap", "KIVI of 2 bits")),
)


@named(CASES | MORE | KIVI, *SLOW)
def test_equals_float64_without_a_race(case, capfd):
    dims = case.get("dims", (64, 64))  # where it names some that this kernel takes
    check(simulated, **{"dtype": "bfloat16", **case, "dims": dims if min(dims) >= 64 else (64, 64)})
    assert "RACE" not in capfd.readouterr().out


ON_BLACKWELL = (
    "int8 by token, window, soft cap",
    "head dims of 80, 3 queries of 3 heads, window, sinks, soft cap",
    "fp8 by token, head dims of 96, valid slots",
    "int8 by channel, keys and values of 96 dims",
    "int4 by channel",
    "values in several products",
    "two queries of 24 heads in two parts, window, valid slots, soft cap",
    "KIVI of 4 bits, keys and values of 160 dims",
    "KIVI in groups of 96, of which products of 64 have parts",
)


@named({name: (CASES | MORE | KIVI)[name] for name in ON_BLACKWELL}, *ON_BLACKWELL[5:])
def test_blackwell_equals_float64_without_a_race(case, capfd):
    """Products there have 32 columns at least, of which few are queries."""
    dims = case.get("dims", (64, 64))
    case = {"dtype": "bfloat16", **case, "dims": dims if min(dims) >= 64 else (64, 64)}
    check(partial(simulated, chip="blackwell"), **case)
    assert "RACE" not in capfd.readouterr().out


SPACE = {
    "dtypes": ("bfloat16", "float16"),
    "page_sizes": (8, 16, 32, 64),
    "dims": (64, 128),
    "formats": ("int8", "fp8", "int4"),
    "quantised_page_sizes": (32, 64),
}


@pytest.mark.parametrize("number", numbers(1))
def test_equals_float64_over_the_option_space(number, capfd):
    case, chip = generated(number, **SPACE), ("hopper", "blackwell")[number % 2]
    check(partial(simulated, chip=chip), **case | {"group": min(case["group"], 8)})
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("number", numbers(1))
def test_equals_float64_over_the_option_space_where_values_are_no_whole_products(number, capfd):
    case = generated(number, **SPACE)
    value_dims = (96, 160) if case["format"] else (80, 96, 112, 176)
    dims = case["dims"][0], value_dims[number % len(value_dims)]
    check(simulated, **case | {"group": min(case["group"], 8), "dims": dims})
    assert "RACE" not in capfd.readouterr().out


def test_what_is_served():
    """Values of any dims from 64 on, whatever keys have; of fewer, no product has as many rows."""
    for value_dim in range(16, 257, 16):
        reason = gpu_decode.refusal((128, value_dim), None, 8, 64)
        assert reason == (
            None if value_dim >= 64 else f"head dim of values = {value_dim}: must be at least 64, the rows of a product"
        )
    for scheme in (Scheme("int8"), Scheme("fp8"), Scheme("int4")):
        assert all(gpu_decode.refusal((dim, dim), (scheme, scheme), 8, 64) is None for dim in (96, 160, 224))


OPTIONS = [
    (schemes, page_size, with_page_mass)
    for schemes, sizes in (
        (None, (8, 16, 32, 64)),
        *(((scheme, scheme), (32, 64)) for scheme in (Scheme("fp8"), Scheme("int4", "channel"))),
        (kivi("int4", "int4"), (64,)),
        (kivi("int4", "int4", 64), (64,)),
    )
    for page_size in sizes
    for with_page_mass in (False, True)
]


@pytest.mark.parametrize(("chip", "step"), [("hopper", 8), ("blackwell", 16)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_every_column_has_one_thread_block(dim, chip, step):
    """Whatever the pages are in: none is refused, none is left over, and no thread block has nothing but padding."""
    for (schemes, page_size, with_page_mass), asked in itertools.product(OPTIONS, range(8, 65, 8)):
        if schemes and any(dim % step_of(scheme) for scheme in schemes):
            continue
        reason = gpu_decode.refusal((dim, dim), schemes, asked, page_size, chip)
        how = {"with_page_mass": with_page_mass, "chip": chip}
        num_parts, mine = parts_of_columns(asked, (dim, dim), schemes, page_size, **how)
        assert reason is None, (schemes, page_size, asked)
        assert (num_parts - 1) * mine < asked <= num_parts * mine <= 64
        assert mine % (8 if schemes and schemes[1].group == 32 else step) == 0


def test_two_warpgroups_convert_where_registers_leave_room_for_a_second_thread_block():
    """By token at 8 columns: the problems of the bench. 16 bits have nothing to convert; scales by channel and 16
    columns at 128 dims take the registers of one thread block, so that a third warpgroup would cost the other."""
    ask = partial(producers_for, page_size=64, with_page_mass=False)
    for format in ("int8", "fp8", "int4"):
        by_token, by_channel = Scheme(format), Scheme(format, "channel")
        assert [ask(8, (dim, dim), (by_token, by_token)) for dim in (64, 128, 256)] == [2, 2, 2]
        assert ask(16, (128, 128), (by_token, by_token)) == ask(8, (128, 128), (by_channel, by_channel)) == 1
    assert ask(8, (128, 128), None) == 1


MOST_CARRIED = 80
"""Registers of a thread that carry numbers from one block of tokens to the next: a third of all, for products and
weights take as many again. Sums of zero points come on top."""


@pytest.mark.parametrize("dim", [64, 128])
def test_registers_hold_what_a_thread_carries(dim):
    """Of 64 query heads for a KV head, as the traced program has it, whatever the pages are in. What ptxas makes of it
    is in `make kernels-check`."""
    array = lambda *shape, of=jnp.int32: jax.ShapeDtypeStruct(shape, of)  # noqa: E731
    for schemes, page_size, with_page_mass in OPTIONS:
        if schemes is None and 8 < page_size < 64:
            continue
        pools = [jax.eval_shape(partial(_pool, of, page_size, dim)) for of in schemes or (None, None)]
        scoring = Scoring(0.1, 30.0, Visible(100, 4), with_page_mass)
        asked = array(2, 1, 64, dim, of=jnp.bfloat16), Pages(*pools)
        lists = Lists(array(2, 4), array(2, 4), array(2, 4, page_size, of=jnp.bool))
        traced = jax.make_jaxpr(lambda *given, scoring=scoring: gpu.paged_attention(*given, scoring, chip="hopper"))(
            *asked, lists, array(2, 1), array(2)
        )
        most = MOST_CARRIED + (32 if schemes and schemes[1].has_zeros else 0)
        assert 16 <= carried_by_thread(traced.jaxpr) <= most, (schemes, page_size, with_page_mass)


def carried_by_thread(jaxpr: Any) -> int:
    """Float32 numbers that come into a turn of the loop that carries most, in each of a warpgroup's 128 threads."""
    most = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("while", "scan"):
            found = [value.aval for value in equation.invars if isinstance(value.aval, jax.core.ShapedArray)]
            most = max(most, sum(array.size for array in found if array.dtype == jnp.float32) // 128)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                most = max(most, carried_by_thread(inner))
    return most


LONG = {"lengths": [600], "num_queries": 1, "group": 1, "kv_heads": 1, "dtype": "bfloat16", "dims": (64, 64)}
"""In pieces of four blocks, so that both stages of the ring are used again."""


@pytest.mark.parametrize("case", LEDGER_CASES)
def test_live_pages_are_fetched_once(case, monkeypatch):
    """And little else: the queries, once for each piece."""
    ledger = Fetched()
    ledger.count_loads(monkeypatch)
    assert 1 < ledger.of(check, simulated, case) <= 1.05


def test_a_wrong_page_is_caught():
    with pytest.raises(AssertionError):
        check(simulated, **LONG, misread=1)


@pytest.mark.parametrize(
    ("format", "skipped"),
    [
        (None, "arrived"),
        (None, "free"),
        *((format, skipped) for format in ("int8", "KIVI") for skipped in ("arrived", "free", "staged")),
    ],
)
def test_a_missing_barrier_is_caught(format, skipped, monkeypatch, capfd):
    """Who reads and does not wait for the copy or the conversion; who writes and does not wait for the reader."""
    real, name = plgpu.barrier_wait, []
    methods = [(Part, "wait_for"), (Part, "wait_to_multiply"), (Producer, "produce"), (Producer, "produce_and_convert")]
    for owner, method in methods:
        inner = vars(owner)[method]
        role = {"wait_for": "arrived", "wait_to_multiply": "staged"}.get(method, "free")

        def noted(self, *arguments, inner=inner, role=role):
            name.append(role)
            inner(self, *arguments)
            name.pop()

        monkeypatch.setattr(owner, method, noted)

    def wait(barrier):
        if not name or name[-1] != skipped:
            real(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", wait)
    quantised = {"schemes": ("int4", "int4")} if format == "KIVI" else {"format": format}
    page_size = 64 if format == "KIVI" else 32
    case = LONG | ({**quantised, "page_size": page_size, "lengths": [900]} if format else {})
    said = ""
    try:
        check(simulated, **case)
    except (AssertionError, ValueError, jax.errors.JaxRuntimeError) as error:
        said = str(error)
    assert "race" in (said + capfd.readouterr().out).lower()


# The plan.

TABLES = {"lengths": (300, 0, 64, 5), "page_size": 16}


def tables() -> tuple[Any, ...]:
    """Lists, positions and lengths of `TABLES`, in order."""
    lengths, size = TABLES["lengths"], TABLES["page_size"]
    starts = np.full((len(lengths), 20), NOWHERE, np.int32)
    table = np.zeros_like(starts)
    pages = iter(range(1, 100))
    for row, length in enumerate(lengths):
        for entry in range(-(-length // size)):
            starts[row, entry], table[row, entry] = entry * size, next(pages)
    lens = np.array(lengths, np.int32)
    return Lists(jnp.asarray(table), jnp.asarray(starts)), jnp.asarray(lens[:, None] - 1), jnp.asarray(lens)


def test_a_plan_launches_the_longest_pieces_first_and_knows_each_items_own():
    made = plan_attention(*tables(), num_kv_heads=2, page_size=16, num_pieces=6)
    pieces, launch, shares = (np.asarray(array) for array in (made.pieces, made.launch, made.shares))
    counts = pieces[launch, 2]
    assert sorted(launch.tolist()) == list(range(len(pieces)))
    assert (np.diff(counts) <= 0).all()
    for item, (begin, end) in enumerate(shares.tolist()):
        mine = np.flatnonzero((pieces[:, 0] == item) & (pieces[:, 2] > 0))
        assert mine.tolist() == list(range(begin, end))
        assert pieces[begin:end, 2].sum() == -(-TABLES["lengths"][item] // 16) == made.counts[item]


def test_a_call_with_a_plan_equals_one_without():
    keys = jax.random.split(jax.random.key(0), 3)
    pool, values = (jax.random.normal(key, (40, 2, 16, 64), jnp.bfloat16) for key in keys[:2])
    queries = jax.random.normal(keys[2], (4, 1, 4, 64), jnp.bfloat16)
    scoring = Scoring(0.125, visible=Visible(40, 3))
    arrays = queries, Pages(pool, values), *tables(), scoring
    made = plan_attention(*tables(), num_kv_heads=2, page_size=16, visible=scoring.visible, num_pieces=3)
    for mine, alone in zip(simulated(*arrays, plan=made), simulated(*arrays), strict=True):
        np.testing.assert_array_equal(mine, alone)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"visible": Visible(8)}, r"visible = Visible\(window=8, .*\): must be Visible\(window=None, "),
        ({"page_size": 8}, "page_size = 8: must be 16"),
        ({"num_kv_heads": 1}, "num_kv_heads = 1: must be 2"),
        ({"words": jnp.zeros((4, 20, 1), jnp.int32)}, "has valid slots = True: must be False"),
    ],
)
def test_a_plan_for_something_else_is_refused(change, said):
    pool = jnp.zeros((40, 2, 16, 64), jnp.bfloat16)
    made = plan_attention(*tables(), num_kv_heads=2, page_size=16)
    with pytest.raises(ValueError, match=said):
        paged_attention(
            jnp.zeros((4, 1, 4, 64), jnp.bfloat16),
            Pages(pool, pool),
            *tables(),
            plan=dataclasses.replace(made, **change),
        )


def test_a_grid_has_one_axis_however_many_pieces_there_are():
    """CUDA takes at most 65,535 thread blocks along any other than the first."""
    array = lambda *shape, of=jnp.int32: jax.ShapeDtypeStruct(shape, of)  # noqa: E731
    many = 70_000
    pool, lists = array(9, 1, 64, 64, of=jnp.bfloat16), Lists(array(many, 2), array(many, 2))
    for run, num_queries in ((gpu.paged_attention, 1), (in_tiles, 80)):
        queries = array(many, num_queries, 1, 64, of=jnp.bfloat16)
        traced = jax.make_jaxpr(lambda *arrays, run=run: run(*arrays, Scoring(0.1), chip="hopper"))(
            queries, Pages(pool, pool), lists, array(many, num_queries), array(many)
        )
        grids = re.findall(r"grid=\((.*?)\)", str(traced))
        assert grids
        assert all(len([size for size in grid.split(",") if size.strip()]) <= 1 for grid in grids), grids


def test_pages_that_are_no_part_of_blocks_are_refused():
    with pytest.raises(ValueError, match="page_size = 96: must divide 64 or be a multiple of it"):
        plan_attention(*tables(), num_kv_heads=2, page_size=96)


# The merge.


@pytest.mark.parametrize("value_dim", [64, 80])
@pytest.mark.parametrize(("cuts", "num_queries", "group"), [((1, 20, 0, 3), 1, 4), ((2, 1), 3, 5), ((2, 0), 2, 4)])
def test_pieces_merge_to_float64s_answer(cuts, num_queries, group, value_dim):
    """Items of so many pieces, and an empty one at the end that holds NaN. Five rows of 80 dims are no multiple of 128
    bytes, where copies may begin."""
    rng, columns = np.random.default_rng(0), gpu_decode.columns_for(num_queries, group)
    num_pieces = sum(cuts) + 1
    outputs = rng.standard_normal((num_pieces, 2, value_dim, columns)).astype(np.float32)
    sums = (30 * rng.standard_normal((num_pieces, 2, columns))).astype(np.float32)
    outputs[-1], sums[-1] = np.nan, np.nan
    ends = np.cumsum(cuts)
    shares = np.stack([ends - cuts, ends], axis=1).astype(np.int32)
    with aligned_copies():
        merged, log_sum_exp = merge(
            *map(jnp.asarray, (outputs, sums, shares)), num_queries, group, jnp.float16, interpret=HOW
        )
    assert merged.shape == (len(cuts), num_queries, 2 * group, value_dim)
    for item, (begin, end) in enumerate(shares.tolist()):
        for head, column in np.ndindex(2, num_queries * group):
            query, mine = divmod(column, group)
            found = np.asarray(merged[item, query, head * group + mine], np.float64)
            if begin == end:
                assert not found.any()
                assert log_sum_exp[item, head, column] == -np.inf
                continue
            logs = sums[begin:end, head, column].astype(np.float64)
            weights = np.exp(logs - logs.max())
            wanted = weights @ outputs[begin:end, head, :, column].astype(np.float64) / weights.sum()
            assert np.linalg.norm(found - wanted) <= 6e-4 * np.linalg.norm(wanted)
            assert abs(log_sum_exp[item, head, column] - np.log(weights.sum()) - logs.max()) < 1e-4


# Shared memory.


def said(schemes: tuple[Scheme, Scheme] | None) -> str:
    """As the name of a case."""
    return "16 bits" if schemes is None else " and ".join(f"{scheme.format} by {scheme.per}" for scheme in schemes)


PLAIN: list[tuple[Scheme, Scheme]] = [
    (scheme, scheme) for format in FORMATS for scheme in (Scheme(format), Scheme(format, "channel"))
]


@pytest.mark.parametrize("schemes", [None, *PLAIN, kivi("int4", "int2"), kivi("int2", "int4", 64)], ids=said)
@pytest.mark.parametrize("chip", ["hopper", "blackwell"])
def test_what_fits_is_what_the_scratch_takes(schemes, chip):
    """Of every shape that is not refused: in whole KiB, below the limit, and at most 32 barriers together."""
    seen = 0
    for dims in ((64, 64), (128, 128), (256, 256), (80, 128), (128, 80), (96, 96), (64, 160)):
        for asked in (8, 24, 64):
            for page_size in (8, 32, 64):
                least = 32 if schemes and schemes[1].group is None else 64
                if schemes and (
                    page_size < least or any(dim % step_of(of) for dim, of in zip(dims, schemes, strict=True))
                ):
                    continue
                if gpu_decode.refusal(dims, schemes, asked, page_size, chip):
                    continue
                how = {"with_page_mass": True, "chip": chip}
                _, columns = parts_of_columns(asked, dims, schemes, page_size, **how)
                pages = Pages(
                    *(_pool(scheme, page_size, dim) for scheme, dim in zip(schemes or (None,) * 2, dims, strict=True))
                )
                tiles = fit(dims, schemes, columns, page_size, **how)
                dtype = jnp.dtype(jnp.bfloat16)
                scratch = scratch_for(tiles, pages, dtype, dtype, columns, max(1, 64 // page_size), **how)
                sizes = [
                    -(-int(np.prod(ref.shape)) * jnp.dtype(ref.dtype).itemsize // 1024) * 1024
                    for name, ref in scratch.items()
                    if hasattr(ref, "dtype") and not name.startswith("product_")  # tensor memory
                ]
                assert sum(sizes) == tiles.num_bytes <= SHARED_BYTES
                barriers = [int(np.prod(ref.num_barriers)) for ref in scratch.values() if hasattr(ref, "num_barriers")]
                assert max(barriers) <= 32
                in_rows = [ref for name, ref in scratch.items() if name.endswith(("_scales", "_zeros", "pages_out"))]
                row_bytes = [ref.shape[-1] * jnp.dtype(ref.dtype).itemsize for ref in in_rows]
                assert all(size % 128 == 0 for size in row_bytes), "rows that are copied alone are aligned"
                seen += 1
    assert seen > 3


def step_of(scheme: Scheme) -> int:
    """What head dims are multiples of, in a scheme."""
    return 64 if scheme.format == "int2" else scheme.group or 32


def _pool(scheme: Scheme | None, page_size: int, dim: int) -> Any:
    tile = jnp.zeros((1, 1, page_size, dim), jnp.bfloat16)
    return tile if scheme is None else quantised(tile, scheme)
