"""Decoding on GPUs with the factors swapped, in the simulator with race detection: the kernel."""

from functools import partial
from typing import Any

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import proof
from pallas_kernels.paged_attention.cases import CASES, KIVI, generated
from pallas_kernels.paged_attention.gpu_producer import Producer
from pallas_kernels.paged_attention.gpu_ring import Part
from tests.pallas_kernels.cases import LEDGER_CASES, Fetched, named, numbers
from tests.pallas_kernels.decoding import simulated

check = partial(proof.check, is_compiled=False)


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
