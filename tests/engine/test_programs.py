"""Compiled programs go with whoever uses them, and before the process runs out of mappings."""

import gc
import weakref

import jax
import pytest

from kvlab import programs
from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.engine.step import MemoryStep
from kvlab.memory.layout import MemoryConfig
from kvlab.programs import num_mappings
from tests.engine.deviceless import model

ASKED = [[1, 2, 3], [4, 5]]


def engine_of(page_size):
    """Of pages that no other test has, so that nothing is compiled already."""
    config = EngineConfig(max_batch=2, max_len=40, row_sizes=(2,), width_sizes=(8,))
    return Engine(model(), memory=MemoryConfig("paged", page_size, 8), config=config)


def answers(engine):
    return [answer.tokens for answer in engine.generate(ASKED, Sampling(max_tokens=4))]


needs_maps = pytest.mark.skipif(not num_mappings(), reason="the system does not count mappings")


@needs_maps
def test_an_engine_takes_its_programs_with_it():
    answers(engine_of(3))  # what all engines share: the sampler, and plain operations
    MemoryStep.of.cache_clear()
    gc.collect()
    before, engine = num_mappings(), engine_of(13)
    answers(engine)
    grown, step = num_mappings() - before, weakref.ref(engine.runner.step_fn)
    assert grown > 50
    del engine
    MemoryStep.of.cache_clear()
    gc.collect()
    assert step() is None
    assert num_mappings() - before < grown / 4


@needs_maps
def test_programs_are_let_go_of_before_mappings_run_out(monkeypatch):
    """With room for half of an engine's programs: engines that are gone make room silently; one that is in
    use compiles again, says so, and answers the same."""
    MemoryStep.of.cache_clear()
    jax.clear_caches()  # what tests before this one left would be let go of in the middle of it
    gc.collect()
    before = num_mappings()
    expected = answers(engine_of(11))
    half = before + (num_mappings() - before) // 2
    monkeypatch.setattr(programs, "_floor", before)
    monkeypatch.setattr(programs, "most_mappings", lambda: 2 * half - before)
    engine = engine_of(17)
    assert num_mappings() < half, "the other engine's went when another was to be made"
    monkeypatch.setattr(programs, "most_mappings", lambda: 1 << 40)
    assert answers(engine) == expected
    assert num_mappings() > half
    monkeypatch.setattr(programs, "most_mappings", lambda: 2 * half - before)
    with pytest.warns(UserWarning, match=r"mappings \(vm.max_map_count\) are taken; all are let go of"):
        programs.make_room()
    assert num_mappings() < half
    monkeypatch.setattr(programs, "most_mappings", lambda: 1 << 40)
    assert answers(engine) == expected
