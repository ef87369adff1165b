"""What a plan of decoding on GPUs launches, and the merge of what it cut."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

from pallas_kernels.alignment import aligned_copies
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention import Lists, Pages, gpu, gpu_decode, paged_attention, plan_attention
from pallas_kernels.paged_attention.gpu_merge import merge
from pallas_kernels.paged_attention.gpu_tiled import in_tiles
from pallas_kernels.visible import NOWHERE, Visible
from tests.pallas_kernels.decoding import HOW, simulated


@pytest.fixture(autouse=True)
def clean():
    yield
    reset_gpu_interpret_mode_state()


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
