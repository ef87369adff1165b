"""The TPU kernel of paged attention in the simulator: race detection, memory that begins as NaN, both ways of running
copies."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.cases import CASES, KIVI, generated
from pallas_kernels.paged_attention.proof import check
from tests.pallas_kernels.cases import LEDGER_CASES, Fetched, numbers, on_tpu


def simulated(mode: str) -> partial:
    """Blocks of 16 tokens and items of few rows, so that short sequences have several."""
    return partial(tpu.paged_attention, block_len=16, max_rows=8, interpret=on_tpu(mode))


@pytest.fixture(autouse=True)
def clean():
    yield
    pltpu.reset_tpu_interpret_mode_state()


IN_BOTH_MODES = [
    pytest.param(case, mode, id=f"{name}-{mode}", marks=() if number % 2 == (mode == "eager") else pytest.mark.slow)
    for number, (name, case) in enumerate((CASES | KIVI).items())
    for mode in ("on_wait", "eager")
]
"""Copies that arrive at the wait and those that arrive at once take turns; the other of each case is slow."""


@pytest.mark.parametrize(("case", "mode"), IN_BOTH_MODES)
def test_equals_float64_without_a_race(case, mode, capfd):
    check(simulated(mode), **case, dtype=jnp.bfloat16)
    assert "RACE" not in capfd.readouterr().out  # jax 0.11 only prints it


@pytest.mark.parametrize("name", ["several blocks, odd head dims", "large logits", "int4 by channel"])
def test_float32_equals_float64_without_a_race(name, capfd):
    check(simulated("on_wait"), **CASES[name], dtype=jnp.float32)
    assert "RACE" not in capfd.readouterr().out  # jax 0.11 only prints it


SPACE = {
    "dtypes": ("float32", "bfloat16"),
    "page_sizes": (8, 16, 64),
    "dims": (8, 16, 32, 80),
    "formats": ("int8", "fp8", "int4"),
    "quantised_page_sizes": (32, 64),
}


@pytest.mark.parametrize("number", numbers(2))
def test_equals_float64_over_the_option_space(number, capfd):
    check(simulated("on_wait" if number % 2 else "eager"), **generated(number, **SPACE))
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("case", LEDGER_CASES)
def test_live_pages_are_fetched_once(case, monkeypatch):
    ledger = Fetched()
    ledger.count_copies(monkeypatch)
    assert ledger.of(check, simulated("eager"), case) == 1


def test_a_wrong_page_is_caught():
    with pytest.raises(AssertionError):
        check(simulated("eager"), misread=1, **CASES["one head each"], dtype=jnp.bfloat16)


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
        check(simulated(mode), **CASES["one head each"], dtype=jnp.bfloat16)
    except (AssertionError, jax.errors.JaxRuntimeError) as error:
        said = str(error)
    assert "nan" in said if mode == "on_wait" else "RACE" in said + capfd.readouterr().out
