"""The GPU kernel of paged attention in tiles of 64 rows, in the simulator with race detection."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import proof, sharing
from pallas_kernels.paged_attention.cases import CASES, KIVI, generated
from pallas_kernels.paged_attention.gpu_tiled import in_tiles
from tests.pallas_kernels.cases import LEDGER_CASES, Fetched, named, numbers

check = partial(proof.check, is_compiled=False)
NUM_STAGES = 2
simulated = partial(
    in_tiles, num_pieces=3, max_stages=NUM_STAGES, interpret=plgpu.InterpretGPUParams(detect_races=True)
)
"""With two stages and few pieces, so that the ring turns and short sequences are split."""
FORMATS = [name for name in CASES if name.startswith(("int", "fp"))]


@pytest.fixture(autouse=True)
def clean():
    yield
    reset_gpu_interpret_mode_state()


@named(
    CASES | KIVI,
    *KIVI,
    "one head each",
    "a chunk in two tiles, window, sinks, soft cap",
    "large logits",
    "slots that are not valid, window, sinks",
    "fp8 by token, tiny values",
    "int8 by channel, valid slots",
    "int8 by channel, keys beyond float16",
    "int4 by channel",
)
def test_equals_float64_without_a_race(case, capfd):
    check(simulated, **case, dtype=jnp.bfloat16)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("lengths 0, 1, page, page + 1; an empty one first and last", marks=pytest.mark.ci),
        pytest.param(FORMATS[0], marks=pytest.mark.ci),
        "several blocks, odd head dims",
        "head dims of 80, 3 queries of 3 heads, window, sinks, soft cap",
        "int8 by token, head dims of 96",
        "KIVI of 2 bits",
    ],
)
def test_blackwell_equals_float64_without_a_race(name, capfd):
    """The other chip's products; everything else is the same code."""
    check(partial(simulated, chip="blackwell"), **(CASES | KIVI)[name], dtype=jnp.bfloat16)
    assert "RACE" not in capfd.readouterr().out


SPACE = {
    "dtypes": ("bfloat16", "float16"),
    "page_sizes": (8, 16, 32, 64),
    "dims": (32, 64, 96),
    "formats": ("int8", "fp8", "int4"),
    "quantised_page_sizes": (32, 64),
}


@pytest.mark.parametrize("number", numbers(1))
def test_equals_float64_over_the_option_space(number, capfd):
    chip = "blackwell" if number % 4 == 3 else "hopper"
    check(partial(simulated, chip=chip), **generated(number, **SPACE))
    assert "RACE" not in capfd.readouterr().out


LONG = {"lengths": [600], "num_queries": 1, "group": 1, "kv_heads": 1, "dtype": jnp.bfloat16}
"""In pieces of four blocks, so that both stages of the ring are used again."""


@pytest.mark.parametrize(("page_size", "dims", "dtype"), [(64, (64, 64), jnp.float16), (128, (16, 144), jnp.bfloat16)])
def test_pages_of_any_size_and_wide_values(page_size, dims, dtype, capfd):
    check(simulated, **{**LONG, "lengths": [page_size * 3 + 9], "dims": dims, "page_size": page_size, "dtype": dtype})
    assert "RACE" not in capfd.readouterr().out


def test_the_ring_is_used_again_without_a_race(capfd):
    check(simulated, **LONG)
    assert "RACE" not in capfd.readouterr().out


def test_many_sequences_are_not_cut(monkeypatch):
    monkeypatch.setattr(sharing, "ENOUGH", 1)
    check(simulated, lengths=[9, 0, 130], num_queries=1, group=2, kv_heads=1, dtype=jnp.bfloat16)


@pytest.mark.parametrize("case", LEDGER_CASES)
def test_live_pages_are_fetched_once(case, monkeypatch):
    """And little else: the queries, once for each piece."""
    ledger = Fetched()
    ledger.count_loads(monkeypatch)
    assert 1 < ledger.of(check, simulated, case) <= 1.05


def test_a_wrong_page_is_caught():
    with pytest.raises(AssertionError):
        check(simulated, misread=1, **CASES["one head each"], dtype=jnp.bfloat16)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_conversion_waits_for_pages_and_for_products(format, monkeypatch, capfd):
    """Of a quantised page, both: the copy that is read too early, and the staged block overwritten too early."""
    real = plgpu.barrier_wait
    for skipped in ("arrived", "free"):

        def wait(barrier, skipped=skipped):
            num_barriers = getattr(getattr(barrier, "ref", barrier), "shape", ())
            if num_barriers != ((4,) if skipped == "arrived" else (2,)):
                real(barrier)

        monkeypatch.setattr(plgpu, "barrier_wait", wait)
        said = ""
        try:
            check(simulated, **{**LONG, "lengths": [900], "format": format, "page_size": 32, "dims": (32, 32)})
        except (AssertionError, ValueError, jax.errors.JaxRuntimeError) as error:
            said = str(error)
        reset_gpu_interpret_mode_state()
        assert "race" in (said + capfd.readouterr().out).lower()


@pytest.mark.parametrize("side", ["who reads does not wait for the copy", "who copies does not wait for the reader"])
def test_a_missing_barrier_is_caught(monkeypatch, side, capfd):
    """The first wait of a loop is the producer's for a free stage; all others are the consumer's."""
    real, in_producer = plgpu.barrier_wait, side.startswith("who copies")

    def wait(barrier):
        frees = getattr(getattr(barrier, "ref", barrier), "shape", ()) == (NUM_STAGES,)
        if frees != in_producer:
            real(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", wait)
    said = ""
    try:
        check(simulated, **LONG)
    except (AssertionError, jax.errors.JaxRuntimeError) as error:
        said = str(error)
    assert "race" in (said + capfd.readouterr().out).lower()
