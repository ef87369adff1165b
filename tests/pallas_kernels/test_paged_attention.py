"""Paged attention against a float64 brute force, over its option space, with NaN in all that must not be read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.paged_attention import NOWHERE, api, blocked, paged_attention
from pallas_kernels.paged_attention.proof import brute_force


@pytest.fixture(params=["blocked", "reference"])
def implementation(request, monkeypatch):
    """Every implementation; blocks so short that even short sequences have several."""
    monkeypatch.setattr(blocked, "BLOCK_LEN", 4)
    return request.param


@given(
    lengths=st.lists(st.integers(0, 13), min_size=1, max_size=3),
    num_queries=st.integers(1, 4),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    dims=st.tuples(st.sampled_from([1, 4, 8]), st.sampled_from([2, 8])),
    page_size=st.sampled_from([1, 3, 4]),
    window=st.none() | st.integers(1, 9),
    sinks=st.integers(0, 3),
    cap=st.none() | st.sampled_from([1.5, 30.0]),
    magnitude=st.sampled_from([1.0, 40.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_brute_force(
    implementation, lengths, num_queries, num_kv_heads, group, dims, page_size, window, sinks, cap, magnitude, seed
):
    rng = np.random.default_rng(seed)
    sinks = sinks if window is not None else 0
    (key_dim, value_dim), num_heads = dims, num_kv_heads * group
    num_slots = -(-13 // page_size) + 1
    num_pages = 1 + len(lengths) * num_slots
    order = rng.permutation(np.arange(1, num_pages))
    key_pages = np.full((num_pages, num_kv_heads, page_size, key_dim), np.nan, np.float32)
    value_pages = np.full((num_pages, num_kv_heads, page_size, value_dim), np.nan, np.float32)
    key_pages[0] = value_pages[0] = 0
    table = np.zeros((len(lengths), num_slots), np.int32)
    starts = np.full((len(lengths), num_slots), NOWHERE, np.int32)
    queries = rng.standard_normal((len(lengths), num_queries, num_heads, key_dim)).astype(np.float32) * magnitude
    positions = np.zeros((len(lengths), num_queries), np.int32)
    stored = []
    for row, length in enumerate(lengths):
        keys = rng.standard_normal((length, num_kv_heads, key_dim)).astype(np.float32)
        values = rng.standard_normal((length, num_kv_heads, value_dim)).astype(np.float32)
        stored.append((keys, values))
        positions[row] = max(length - num_queries, 0) + np.arange(num_queries)
        pages = [int(page) for page in order[row * num_slots : (row + 1) * num_slots]][: -(-length // page_size)]
        entries = rng.permutation(len(pages))  # the table need not be sorted
        for entry, logical in enumerate(entries.tolist()):
            table[row, entry], starts[row, entry] = pages[logical], logical * page_size
        for p in range(length):
            key_pages[pages[p // page_size], :, p % page_size] = keys[p]
            value_pages[pages[p // page_size], :, p % page_size] = values[p]
    outputs, log_sum_exp = paged_attention(
        *(jnp.asarray(x) for x in (queries, key_pages, value_pages, table, starts, positions)),
        jnp.asarray(lengths, jnp.int32),
        window=window,
        num_sinks=sinks,
        soft_cap=cap,
        implementation=implementation,
    )
    for row, (keys, values) in enumerate(stored):
        for t in range(num_queries):
            for head in range(num_heads):
                kv = head // group
                expected, expected_lse = brute_force(
                    queries[row, t, head].astype(np.float64),
                    keys[:, kv].astype(np.float64),
                    values[:, kv].astype(np.float64),
                    positions[row, t],
                    window,
                    sinks,
                    cap,
                    key_dim**-0.5,
                )
                np.testing.assert_allclose(outputs[row, t, head], expected, atol=2e-5, rtol=2e-4)
                np.testing.assert_allclose(log_sum_exp[row, t, head], expected_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (7, 0), (70, 2), (100, 0)])
def test_flash_attention_equals_brute_force(window, sinks):
    """Longer than one block of queries, so that block edges and bands are covered."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((1, 150, 4, 8)).astype(np.float32)
    keys, values = (rng.standard_normal((1, 150, 2, dim)).astype(np.float32) for dim in (8, 6))
    outputs = flash_attention(
        *(jnp.asarray(x) for x in (queries, keys, values)), window=window, num_sinks=sinks, soft_cap=20.0
    )
    for t in (0, 1, 6, 63, 64, 65, 127, 128, 149):
        for head in range(4):
            row = (x[0, :, head // 2].astype(np.float64) for x in (keys, values))
            query = queries[0, t, head].astype(np.float64)
            expected, _ = brute_force(query, *row, t, window, sinks, 20.0, 8**-0.5)
            np.testing.assert_allclose(outputs[0, t, head], expected, atol=2e-5, rtol=1e-4)


def _arguments(**changes):
    arguments = {
        "queries": jnp.zeros((1, 1, 4, 8)),
        "key_pages": jnp.zeros((3, 2, 4, 8)),
        "value_pages": jnp.zeros((3, 2, 4, 8)),
        "page_table": jnp.zeros((1, 2), jnp.int32),
        "page_starts": jnp.zeros((1, 2), jnp.int32),
        "query_positions": jnp.zeros((1, 1), jnp.int32),
        "kv_lens": jnp.ones(1, jnp.int32),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": jnp.zeros((1, 1, 3, 8))}, "num_heads = 3: must be a multiple of num_kv_heads = 2"),
        ({"window": 0}, "window = 0: must be at least 1"),
        ({"num_sinks": -1}, "num_sinks = -1"),
        ({"soft_cap": 0.0}, "soft_cap = 0.0: must be positive"),
        ({"implementation": "mosaic"}, "'mosaic' is not available here; legal: None, blocked, reference"),
    ],
)
def test_wrong_arguments_name_the_limit(changes, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**_arguments(**changes))


def test_a_named_implementation_is_honoured():
    """Only the reference can be differentiated."""
    total = lambda queries, name: paged_attention(**_arguments(queries=queries, implementation=name))[0].sum()  # noqa: E731
    assert jax.grad(total)(jnp.zeros((1, 1, 4, 8)), "reference").shape == (1, 1, 4, 8)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.jit(jax.grad(total), static_argnums=1)(jnp.zeros((1, 1, 4, 8)), None)


def test_what_is_not_finite_in_one_sequence_stays_there(implementation):
    rng = np.random.default_rng(0)
    queries, keys = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 1, 4, 8), (5, 2, 4, 8)))
    table, starts = jnp.asarray([[1, 2], [3, 4]], jnp.int32), jnp.asarray([[0, 4], [0, 4]], jnp.int32)
    run = lambda keys: paged_attention(  # noqa: E731
        queries,
        keys,
        keys,
        table,
        starts,
        jnp.full((2, 1), 7, jnp.int32),
        jnp.full(2, 8, jnp.int32),
        implementation=implementation,
    )[0]
    clean, spoiled = run(keys), run(keys.at[3, :, 1].set(jnp.nan))
    np.testing.assert_array_equal(clean[0], spoiled[0])
    assert not np.isfinite(spoiled[1]).any()


class Chip(NamedTuple):
    platform: str
    device_kind: str
    compute_capability: str = ""


@pytest.mark.parametrize(
    ("chip", "pages", "chosen"),
    [
        (Chip("cpu", "cpu"), {}, "blocked"),
        (Chip("gpu", "NVIDIA H200", "9.0"), {}, "mosaic_gpu"),
        (Chip("gpu", "NVIDIA H200", "9.0"), {"dtype": "float32"}, "blocked"),
        (Chip("gpu", "NVIDIA H200", "9.0"), {"page_size": 24}, "blocked"),
        (Chip("gpu", "NVIDIA H200", "9.0"), {"head_dims": (128, 100)}, "blocked"),
        (Chip("gpu", "NVIDIA B200", "10.0"), {}, "blocked"),
        (Chip("tpu", "TPU v5 lite"), {}, "mosaic_tpu"),
        (Chip("tpu", "TPU v5 lite"), {"head_dims": (64, 64)}, "blocked"),
        (Chip("tpu", "TPU v5 lite"), {"page_size": 8}, "blocked"),
        (Chip("tpu", "TPU v5 lite"), {"dtype": "int8"}, "blocked"),
    ],
)
def test_the_chip_and_the_pages_choose(monkeypatch, chip, pages, chosen):
    monkeypatch.setattr(api.jax, "devices", lambda: [chip])
    refused = api.refusals(**pages)
    assert next(name for name in api.IMPLEMENTATIONS if name not in refused) == chosen
    assert all(str(value) in refused[f"mosaic_{chip.platform}"] for value in pages.values())


def test_a_named_kernel_that_cannot_run_says_why():
    with pytest.raises(
        ValueError, match="'mosaic_gpu' cannot run here: it needs a Hopper GPU, this is cpu; legal: None, blocked"
    ):
        paged_attention(**_arguments(implementation="mosaic_gpu"))
