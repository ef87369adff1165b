"""Shapes checked by beartype, strict dtypes and ranks, warnings as errors: only here, never in a run."""

import gc
import os
import time
from pathlib import Path

from jaxtyping import install_import_hook

# Wherever arrays cross a boundary; ledger and scheduler are plain integers, and tests call them millions of times.
CHECKED = [
    "mixers",
    "models",
    "memory.pools",
    "memory.layout",
    "engine.step",
    "engine.sampling",
    "evaluation.score",
    "tasks",
    "training",
]
install_import_hook([*(f"kvlab.{name}" for name in CHECKED), "pallas_kernels"], "beartype.beartype")

# One compilation cache for the suite and the commands it starts, so that each program is compiled once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"))
# A third of the time would be LLVM's, for programs that run once; XLA_FLAGS= in the environment has them optimised.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
# The simulator of GPUs wants a thread for every warpgroup; XLA has as many as this says, or as there are cores.
os.environ.setdefault("NPROC", "8")
os.environ["PALLAS_KERNELS_TILES"] = "/nowhere/tiles.json"  # not what was found on this machine
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests import timing  # noqa: E402
from tests.tiers import CHILDREN, UNUSED_ROWS, mark, seconds_of_tests  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--seconds-to", type=Path, help="write what each test takes into this file, JSON")


def pytest_configure(config):
    """A test that is named runs, whatever its tier."""
    if (path := config.getoption("--seconds-to")) is not None:
        timing.register(config, path)
    is_chosen = any(word.startswith("-m") for word in config.invocation_params.args)
    if any("::" in argument for argument in config.args) and not is_chosen:
        config.option.markexpr = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks every test with its tier, before `-m` chooses among them."""
    unused = mark(items, CHILDREN, seconds_of_tests())
    is_everything = config.args_source is config.ArgsSource.TESTPATHS and not config.option.ignore
    config.stash[UNUSED_ROWS] = unused if is_everything else []


@pytest.fixture(scope="session")
def counted_at() -> list[float]:
    """When `few_programs` last counted, seconds."""
    return [time.monotonic()]


@pytest.fixture(autouse=True)
def few_programs(counted_at: list[float]):
    """Lets go of compiled programs once they hold too many mappings: the kernel allows 65,530 in a process, and XLA on
    CPU crashes, without a word, at the next one. Counting takes longer than most tests: every five seconds."""
    yield
    maps = Path("/proc/self/maps")
    if time.monotonic() - counted_at[0] < 5 or not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
    counted_at[0] = time.monotonic()


@pytest.fixture
def config_of():
    """Composes a config from overrides, as `kvlab run` would."""
    from kvlab.compose import compose

    return lambda *overrides: compose(list(overrides))
