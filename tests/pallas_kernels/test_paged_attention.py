"""Paged attention against a float64 brute force, over its option space, with NaN in all that must not be read."""

import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels.debug import debugging
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.formats import Quantised, Scheme, kivi, quantised
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention import NOWHERE, Lists, Pages, api, paged_attention
from pallas_kernels.paged_attention.cases import CASES, KIVI, generated
from pallas_kernels.paged_attention.proof import brute_force, by_api, check
from pallas_kernels.selection import Asked, recording
from pallas_kernels.visible import Visible
from tests.pallas_kernels.cases import numbers


@pytest.fixture(params=["blocked", "reference"])
def how(request):
    """Every implementation; blocks so short that even short sequences have several."""
    return {"implementation": request.param, "tiles": {"block_len": 16} if request.param == "blocked" else {}}


SPACE = {
    "dtypes": ("float32", "bfloat16"),
    "page_sizes": (1, 3, 8, 40),
    "dims": (2, 8, 16, 32, 80),
    "formats": ("int8", "fp8", "int4"),
}


@pytest.mark.parametrize("case", (CASES | KIVI).values(), ids=CASES | KIVI)
def test_equals_float64(how, case):
    check(by_api(**how), **case)


@pytest.mark.parametrize("number", numbers(5))
def test_equals_float64_over_the_option_space(how, number):
    check(by_api(**how), **generated(number, **SPACE))


def test_a_wrong_page_is_caught(how):
    with pytest.raises(AssertionError):
        check(by_api(**how), **CASES["one head each"], misread=1)


MASKS = [
    Visible(),
    Visible(1),
    Visible(7),
    Visible(70, 2),
    Visible(100),
    *(Visible(chunk=length) for length in (1, 24, 64, 70)),
]


@pytest.mark.parametrize("visible", MASKS, ids=str)
def test_flash_attention_equals_brute_force(visible):
    """Longer than one block of queries, so that block edges and bands are covered."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((1, 150, 4, 8)).astype(np.float32)
    keys, values = (rng.standard_normal((1, 150, 2, dim)).astype(np.float32) for dim in (8, 6))
    outputs = flash_attention(*map(jnp.asarray, (queries, keys, values)), visible=visible, soft_cap=20.0)
    scoring = Scoring(8**-0.5, 20.0, visible)
    for t in (0, 1, 6, 23, 24, 63, 64, 65, 70, 127, 128, 149):
        for head in range(4):
            row = (x[0, :, head // 2].astype(np.float64) for x in (keys, values))
            query = queries[0, t, head].astype(np.float64)
            expected, _ = brute_force(query, *row, t, scoring)
            np.testing.assert_allclose(outputs[0, t, head], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"soft_cap": 0.0}, "soft_cap = 0.0: must be positive"),
        ({"keys": jnp.zeros((1, 5, 2, 7))}, r"keys = \(1, 5, 2, 7\): must be \[B, T, K, D\]"),
        ({"values": jnp.zeros((1, 5, 1, 8))}, r"values = \(1, 5, 1, 8\): must be"),
        ({"values": jnp.zeros((1, 4, 2, 8))}, r"values = \(1, 4, 2, 8\): must be"),
    ],
)
def test_flash_attention_names_the_limit(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    arguments = {"queries": jnp.zeros((1, 5, 4, 8)), "keys": jnp.zeros((1, 5, 2, 8)), "values": jnp.zeros((1, 5, 2, 8))}
    with pytest.raises(ValueError, match=message):
        flash_attention(**arguments | changes)


def _arguments(*, keys=None, values=None, table=None, starts=None, valid=None, **changes):
    """Three pages of 4 slots, 2 KV heads of 8 dims; a sequence of one query and two entries."""
    pool, entries = jnp.zeros((3, 2, 4, 8)), jnp.zeros((1, 2), jnp.int32)
    given = (pool if keys is None else keys), (pool if values is None else values)
    lists = (entries if table is None else table), (entries if starts is None else starts), valid
    arguments = {
        "queries": jnp.zeros((1, 1, 4, 8)),
        "pages": Pages(*given),
        "lists": Lists(*lists),
        "query_positions": jnp.zeros((1, 1), jnp.int32),
        "kv_lens": jnp.ones(1, jnp.int32),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": jnp.zeros((1, 1, 3, 8))}, "num_heads = 3: must be a multiple of num_kv_heads = 2"),
        ({"soft_cap": 0.0}, "soft_cap = 0.0: must be positive"),
        ({"soft_cap": float("inf")}, "soft_cap = inf: must be positive and finite"),
        ({"valid": jnp.ones((1, 2, 4), jnp.int32)}, "lists.valid of int32: must be bool"),
        ({"starts": jnp.zeros((1, 3), jnp.int32)}, r"lists.starts = \(1, 3\): must have the shape of the table"),
        (
            dict.fromkeys(("table", "starts"), jnp.zeros((1, 3, 2), jnp.int32)),
            r"lists.table = \(1, 3, 2\): must list pages for each of 2 KV heads",
        ),
        ({"valid": jnp.ones((1, 2, 3), bool)}, r"lists.valid = \(1, 2, 3\): must be \(1, 2, 4\)"),
        ({"kv_lens": jnp.ones(2, jnp.int32)}, r"kv_lens = \(2,\): must be \(1,\)"),
        ({"query_positions": jnp.zeros((1, 2), jnp.int32)}, r"query_positions = \(1, 2\): must be \(1, 1\)"),
        (
            {"values": quantised(jnp.zeros((3, 2, 4, 8)), "int8")},
            "pages.values of int8: must be stored as keys are, float32",
        ),
        (
            dict.fromkeys(
                ("keys", "values"), Quantised(jnp.zeros((3, 2, 4, 8), jnp.int8), jnp.zeros((3, 2, 8)), "int8")
            ),
            r"pages.keys.scales = \(3, 2, 8\): must be \(3, 2, 4\), one for each token",
        ),
        (
            dict.fromkeys(("keys", "values"), jnp.zeros((3, 2, 4, 8), jnp.int8)),
            "pages.keys of int8: must be floating, or Quantised with scales",
        ),
        ({"queries": jnp.zeros((1, 4, 8))}, r"queries = float32\[1, 4, 8\]: must be floating \[B, T, H, D\]"),
        ({"keys": jnp.zeros((3, 0, 4, 8))}, r"pages.keys = \(3, 0, 4, 8\): must be \[P, K, page, D\]"),
        (
            dict.fromkeys(("table", "starts"), jnp.zeros(2, jnp.int32)),
            r"lists.table = \(2,\): must be \[B, N\]",
        ),
        ({"kv_lens": jnp.ones(1)}, "kv_lens of float32: must be int32"),
        ({"pages": Pages(jnp.zeros((3, 2, 4, 8)))}, r"pages.value_dim = None: must be in \[1, 8\]"),
        ({"pages": Pages(jnp.zeros((3, 2, 4, 8)), value_dim=9)}, r"pages.value_dim = 9: must be in \[1, 8\]"),
        ({"pages": Pages(*2 * [jnp.zeros((3, 2, 4, 8))], 8)}, "pages.value_dim = 8: must be None beside values"),
        ({"implementation": "mosaic"}, "'mosaic' is not available here; legal: None, blocked, reference"),
    ],
)
def test_wrong_arguments_name_the_limit(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would see some of them first
    with pytest.raises(ValueError, match=message):
        paged_attention(**_arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": jnp.array([[2, -1]])}, r"lists.table\[0, 1\] = -1: must be in \[0, 3\)"),
        ({"table": jnp.array([[3, 0]])}, r"lists.table\[0, 0\] = 3: must be in \[0, 3\)"),
        ({"starts": jnp.array([[0, -4]])}, r"lists.starts\[0, 1\] = -4: must be in \[0, "),
    ],
)
def test_tables_that_cannot_be_right_are_refused_while_debugging(changes, message):
    with debugging(), pytest.raises(ValueError, match="paged_attention: " + message):
        paged_attention(**_arguments(**changes))
    run = lambda: (jax.block_until_ready(jax.jit(paged_attention)(**_arguments(**changes))), jax.effects_barrier())  # noqa: E731
    with debugging(), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        run()
    unused = jnp.full((1, 2), NOWHERE)
    with debugging():
        paged_attention(**_arguments(table=jnp.array([[9, -9]]), starts=unused))


def test_pages_outside_the_pool_are_harmless(how):
    """The nearest one is read, whatever reads it."""
    pool = jnp.arange(3 * 2 * 4 * 8, dtype=jnp.float32).reshape(3, 2, 4, 8)
    pools = {"keys": pool, "values": pool, "kv_lens": jnp.array([5]), "query_positions": jnp.array([[4]])}
    starts = {"starts": jnp.array([[0, 4]]), **how}
    found, _ = paged_attention(**_arguments(**pools, **starts, table=jnp.array([[-7, 99]])))
    nearest, _ = paged_attention(**_arguments(**pools, **starts, table=jnp.array([[0, 2]])))
    np.testing.assert_array_equal(found, nearest)


def test_a_named_implementation_is_honoured():
    """Only the reference can be differentiated."""
    rng = np.random.default_rng(0)
    queries, pool = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1, 1, 4, 8), (3, 2, 4, 8)))
    arrays = {"table": jnp.array([[1, 0]]), "starts": jnp.array([[0, NOWHERE]]), "kv_lens": jnp.array([3])}
    arrays |= {"query_positions": jnp.array([[2]])}

    spoiled = pool.at[0].set(jnp.nan).at[:, :, 3].set(jnp.nan)

    def total(queries, name):
        memory = {"keys": spoiled, "values": spoiled, **arrays}
        return (paged_attention(**_arguments(queries=queries, implementation=name, **memory))[0] ** 2).sum()

    found = jax.grad(total)(queries, "reference")
    step = jnp.zeros_like(queries).at[0, 0, 1, 2].set(1e-2)
    change = (total(queries + step, "reference") - total(queries - step, "reference")) / 2e-2
    assert jnp.isfinite(found).all(), "what nobody sees is no part of any gradient"
    assert abs(float(found[0, 0, 1, 2] - change)) < 1e-3
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.jit(jax.grad(total), static_argnums=1)(jnp.zeros((1, 1, 4, 8)), None)


@pytest.mark.parametrize("empty", ["sequences", "queries", "entries"])
def test_nothing_is_answered_with_nothing(how, empty):
    batch, tokens, entries = (0 if empty == axis else 2 for axis in ("sequences", "queries", "entries"))
    tables = dict.fromkeys(("table", "starts"), jnp.zeros((batch, entries), jnp.int32))
    shapes = {"queries": jnp.ones((batch, tokens, 4, 8)), "query_positions": jnp.zeros((batch, tokens), jnp.int32)}
    arguments = _arguments(**tables, **shapes, kv_lens=jnp.ones(batch, jnp.int32), **how)
    outputs, log_sum_exp, mass = paged_attention(**arguments, with_page_mass=True)
    assert outputs.shape == (batch, tokens, 4, 8)
    assert mass.shape == (batch, tokens, 4, entries)
    assert not outputs.any()
    assert (log_sum_exp == -jnp.inf).all()


def test_what_is_not_finite_in_one_sequence_stays_there(how):
    rng = np.random.default_rng(0)
    queries, keys = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 1, 4, 8), (5, 2, 4, 8)))
    table, starts = jnp.asarray([[1, 2], [3, 4]], jnp.int32), jnp.asarray([[0, 4], [0, 4]], jnp.int32)
    run = lambda keys: paged_attention(  # noqa: E731
        queries,
        Pages(keys, keys),
        Lists(table, starts),
        jnp.full((2, 1), 7, jnp.int32),
        jnp.full(2, 8, jnp.int32),
        **how,
    )[0]
    clean, spoiled = run(keys), run(keys.at[3, :, 1].set(jnp.nan))
    np.testing.assert_array_equal(clean[0], spoiled[0])
    assert not np.isfinite(spoiled[1]).any()


class Chip(NamedTuple):
    platform: str
    device_kind: str
    compute_capability: str = ""


H200, V5E = Chip("gpu", "NVIDIA H200", "9.0"), Chip("tpu", "TPU v5 lite")


@pytest.mark.parametrize(
    ("chip", "pages", "chosen"),
    [
        (Chip("cpu", "cpu"), {}, "blocked"),
        (Chip("gpu", "NVIDIA H200", "9.0"), {}, "mosaic_gpu"),
        (Chip("gpu", "NVIDIA H200", "9.0"), {"format": "float32"}, "blocked"),
        (Chip("gpu", "NVIDIA H200", "9.0"), {"format": "int8"}, "mosaic_gpu"),
        (Chip("gpu", "NVIDIA H200", "9.0"), {"format": "int4", "page_size": 16}, "blocked"),
        (Chip("gpu", "NVIDIA H200", "9.0"), {"format": "fp8", "head_dims": (80, 80)}, "blocked"),
        (Chip("gpu", "NVIDIA H200", "9.0"), {"page_size": 24}, "blocked"),
        (Chip("gpu", "NVIDIA H200", "9.0"), {"head_dims": (128, 100)}, "blocked"),
        (Chip("gpu", "NVIDIA B200", "10.0"), {}, "mosaic_gpu"),
        (Chip("gpu", "NVIDIA A100", "8.0"), {}, "blocked"),
        (Chip("tpu", "TPU v5 lite"), {}, "mosaic_tpu"),
        (Chip("tpu", "TPU v5 lite"), {"head_dims": (64, 64)}, "blocked"),
        (Chip("tpu", "TPU v5 lite"), {"head_dims": (512, 512)}, "blocked"),
        (Chip("tpu", "TPU v5 lite"), {"page_size": 8}, "blocked"),
        (Chip("tpu", "TPU v5 lite"), {"format": "int8"}, "mosaic_tpu"),
        (Chip("tpu", "TPU v5 lite"), {"format": "int8", "page_size": 16}, "blocked"),
        (Chip("tpu", "TPU v5 lite"), {"format": "int4", "head_dims": (128, 128)}, "blocked"),
        (Chip("tpu", "TPU v5 lite"), {"format": "float16"}, "blocked"),
        (Chip("tpu", "TPU v5 lite"), {"dtype": "float16"}, "blocked"),
    ],
)
def test_the_chip_and_the_pages_choose(monkeypatch, chip, pages, chosen):
    monkeypatch.setattr(jax, "devices", lambda: [chip])
    refused = api.refusals(Asked(**pages))
    assert next(name for name in api.IMPLEMENTATIONS if name not in refused) == chosen
    if chosen == "blocked" and pages:
        assert all(str(value) in refused[f"mosaic_{chip.platform}"] for value in pages.values())


TOKENS = Scheme("int4", "token", 32, has_zeros=True, scale_dtype="bfloat16")


@pytest.mark.parametrize(
    ("chip", "schemes", "dims", "said"),
    [
        (H200, kivi(), (128, 128), None),
        (H200, kivi(), (64, 96), None),
        (H200, kivi("int2", "int4", 64), (64, 256), None),
        (H200, kivi("int4", "int4", 16), (128, 128), "group = 16: must be a multiple of 32 channels"),
        (
            H200,
            kivi("int2", "int4"),
            (96, 64),
            r"head dims = \(96, 64\): must be multiples of 64 in .* for pages of int2",
        ),
        (H200, kivi(), (128, 128), "page_size = 32: must be a multiple of 64, where groups"),
        (H200, (TOKENS, TOKENS), (128, 128), "keys by token, values by token: must be by channel and by token"),
        (V5E, kivi(), (256, 256), None),
        (V5E, kivi(), (128, 128), "must be multiples of 256 for pages of int4"),
        (V5E, kivi("int2", "int2"), (256, 256), "rows of 2 bits are too narrow"),
        (V5E, kivi("int4", "int2"), (256, 256), "rows of 2 bits are too narrow"),
        (V5E, (TOKENS, TOKENS), (256, 256), "must be keys by channel and values by token in groups"),
    ],
)
def test_the_chip_and_the_schemes_choose(monkeypatch, chip, schemes, dims, said):
    """What a kernel does not read is said, and read by XLA."""
    monkeypatch.setattr(jax, "devices", lambda: [chip])
    page_size = 32 if said and said.startswith("page_size = 32") else 64
    tiles = [jax.ShapeDtypeStruct((3, 2, page_size, dim), jnp.bfloat16) for dim in dims]
    of_keys, of_values = (
        jax.eval_shape(partial(quantised, scheme=scheme), tile) for scheme, tile in zip(schemes, tiles, strict=True)
    )
    refused = api.refusals(Asked.of(Pages(of_keys, of_values), 4, jnp.bfloat16))
    kernel = f"mosaic_{chip.platform}"
    assert next(name for name in api.IMPLEMENTATIONS if name not in refused) == (kernel if said is None else "blocked")
    assert said is None or re.search(said, refused[kernel]), refused[kernel]


def test_what_was_taken_is_recorded():
    with recording() as taken:
        paged_attention(**_arguments())
        jax.jit(partial(paged_attention, implementation="reference"))(**_arguments())
    paged_attention(**_arguments())
    assert {op: set(names) for op, names in taken.items()} == {"paged_attention": {"blocked", "reference"}}


def test_a_named_kernel_that_cannot_run_says_why():
    with pytest.raises(
        ValueError,
        match="'mosaic_gpu' cannot run here: it needs a Hopper or Blackwell GPU, this is cpu; legal: None, blocked",
    ):
        paged_attention(**_arguments(implementation="mosaic_gpu"))
