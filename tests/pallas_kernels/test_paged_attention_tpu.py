"""The TPU kernel of paged attention in the simulator: race detection, memory that begins as NaN, both ways of running copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import NOWHERE, tpu
from tests.pallas_kernels.test_paged_attention import brute_force

CASES = {
    "lengths 0, 1, page, page + 1; an empty one first and last": {
        "lengths": [0, 1, 8, 0, 9, 0],
        "num_queries": 1,
        "group": 4,
    },
    "several blocks, odd head dims": {
        "lengths": [70, 3],
        "num_queries": 1,
        "group": 3,
        "dims": (80, 32),
        "kv_heads": 1,
    },
    "16 bits": {"lengths": [41, 64], "num_queries": 1, "group": 1, "dtype": jnp.bfloat16},
    "a chunk in two tiles, window, sinks, soft cap": {
        "lengths": [33, 9],
        "num_queries": 5,
        "group": 2,
        "window": 7,
        "sinks": 2,
        "cap": 5.0,
        "dtype": jnp.bfloat16,
    },
    "large logits": {"lengths": [30], "num_queries": 2, "group": 2, "magnitude": 40.0},
}


def simulate(mode: str) -> pltpu.InterpretParams:
    return pltpu.InterpretParams(
        detect_races=True, dma_execution_mode=mode, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of 16 tokens and items of few rows, so that short sequences have several; a clean simulator afterwards."""
    monkeypatch.setattr(tpu, "BLOCK_LEN", 16)
    monkeypatch.setattr(tpu, "ROWS", 8)
    yield
    pltpu.reset_tpu_interpret_mode_state()


def check(
    mode, *, lengths, num_queries, group, dims=(16, 16), kv_heads=2, window=None, sinks=0, cap=None, dtype=jnp.float32,
    magnitude=1.0, misread=0,
):  # fmt: skip
    """Against float64: relative error at most 1.25 times that of rounding the exact answer to the type, log-sum-exp to 1e-4.
    `misread` adds to every page id that the kernel is given."""
    rng, page_size = np.random.default_rng(3), 8
    table_len = max(-(-max(lengths) // page_size), 1) + 2
    num_pages = 2 + len(lengths) * table_len
    keys = np.full((num_pages, kv_heads, page_size, dims[0]), np.nan, np.float32)
    values = np.full((num_pages, kv_heads, page_size, dims[1]), np.nan, np.float32)
    table, starts = np.zeros((2, len(lengths), table_len), np.int32)
    starts[:] = NOWHERE
    order = iter(rng.permutation(np.arange(1, num_pages - 1)).tolist())
    positions = np.zeros((len(lengths), num_queries), np.int32)
    stored = []
    for row, length in enumerate(lengths):
        stored.append([np.zeros((length, kv_heads, dim)) for dim in dims])
        positions[row] = max(length - num_queries, 0) + np.arange(num_queries)
        for entry, logical in enumerate(rng.permutation(-(-length // page_size)).tolist()):
            table[row, entry], starts[row, entry] = page, begin = next(order), logical * page_size
            for pool, mine in zip((keys, values), stored[row], strict=True):
                tokens = rng.standard_normal((kv_heads, min(page_size, length - begin), pool.shape[3]))
                pool[page, :, : tokens.shape[1]] = np.asarray(jnp.asarray(tokens, dtype), np.float32)
                mine[begin : begin + tokens.shape[1]] = pool[page, :, : tokens.shape[1]].swapaxes(0, 1)
    queries = jnp.asarray(
        magnitude * rng.standard_normal((len(lengths), num_queries, kv_heads * group, dims[0])), dtype
    )
    scale = dims[0] ** -0.5
    outputs, log_sum_exp = tpu.paged_attention(
        queries,
        jnp.asarray(keys, dtype),
        jnp.asarray(values, dtype),
        jnp.asarray(table + misread * (starts < NOWHERE)),
        *map(jnp.asarray, (starts, positions, np.array(lengths, np.int32))),
        window=window,
        num_sinks=sinks,
        soft_cap=cap,
        scale=scale,
        interpret=simulate(mode),
    )
    wanted, wanted_sum = np.zeros(outputs.shape), np.zeros(log_sum_exp.shape)
    for row, head, place in np.ndindex(len(lengths), kv_heads * group, num_queries):
        k, v = (one[:, head // group].astype(np.float64) for one in stored[row])
        query = np.asarray(queries[row, place, head], np.float64)
        answer = brute_force(query, k, v, positions[row, place], window, sinks, cap, scale)
        wanted[row, place, head], wanted_sum[row, place, head] = answer
    rounding = np.linalg.norm(np.asarray(jnp.asarray(wanted, dtype), np.float64) - wanted)
    error = np.linalg.norm(np.asarray(outputs, np.float64) - wanted)
    assert error <= max(1.25 * rounding, 1e-6 * np.linalg.norm(wanted))
    np.testing.assert_allclose(log_sum_exp, wanted_sum, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("mode", ["on_wait", "eager"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_float64_without_a_race(case, mode, capfd):
    check(mode, **case)
    assert "RACE" not in capfd.readouterr().out  # jax 0.11 only prints it


def test_a_wrong_page_is_caught():
    with pytest.raises(AssertionError):
        check("eager", misread=1, **CASES["16 bits"])


@pytest.mark.parametrize("mode", ["on_wait", "eager"])
def test_a_missing_wait_is_caught(monkeypatch, mode, capfd):
    """Copies that nobody waits for: the simulator sees the race, or the NaN that the buffer began with."""
    real = pltpu.make_async_copy

    class Unwaited:
        def __init__(self, *args):
            self.start = real(*args).start

        def wait(self):
            pass

    monkeypatch.setattr(pltpu, "make_async_copy", Unwaited)
    said = ""
    try:
        check(mode, **CASES["16 bits"])
    except (AssertionError, jax.errors.JaxRuntimeError) as error:
        said = str(error)
    assert "nan" in said if mode == "on_wait" else "RACE" in said + capfd.readouterr().out
