"""What a memory stored, number by number: a tie may be rounded either way, and nothing else."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.evaluation.session import Events
from kvlab.evaluation.stored import what_was_stored
from kvlab.evaluation.verify import verify
from kvlab.memory.config import MemoryConfig
from kvlab.memory.views.whole import taken
from kvlab.tasks.metrics import ACCURACY
from tests.memory.test_sealed import MEMORIES, ROWS, TOTAL, drive

LAYER, ARRAY = 0, "keys"


def test_a_tie_costs_nothing_and_a_wrong_number_a_step():
    exact = jnp.array([[127.0, 2.5 + 1e-5, 2.5 - 1e-5, -3.0]])
    rounded = jnp.array([[127.0, 3.0, 2.0, -3.0]])
    other_way = jnp.array([[127.0, 2.0, 3.0, -3.0]])
    held, excess = taken(exact, rounded, other_way)
    np.testing.assert_array_equal(held, other_way)
    assert float(excess) < 1e-6
    assert float(taken(exact, rounded, other_way.at[0, 3].add(1))[1]) == pytest.approx(1 / 127)
    held, excess = taken(exact, rounded, jnp.full_like(exact, jnp.nan))
    np.testing.assert_array_equal(held, rounded)
    assert float(excess) == 0.0


DUO = MemoryConfig(
    page_size=4, chunk_len=5, format="rotated4", compression={"type": "duo", "streaming": [[1]]}, budget=9
)
FP8 = MemoryConfig(page_size=4, chunk_len=5, format="fp8", compression={"type": "h2o", "recent": 3}, budget=0.5)


@pytest.mark.parametrize(
    ("variant", "memory"),
    [
        ("gqa", MEMORIES["rotated8"]),
        pytest.param("gqa", DUO, marks=pytest.mark.ci),
        pytest.param("hybrid", FP8, marks=pytest.mark.ci),
    ],
)
def test_every_token_is_read_back(variant, memory):
    check, session, tokens, seen = drive(variant, memory)
    stored = what_was_stored(session.layout, session.written, ROWS, TOTAL)
    arrays = [array for layer in stored for state in layer.values() for array in state.values()]
    assert arrays
    assert all(np.isfinite(array).all() for array in arrays)
    check.compare(tokens, seen, session.events)
    assert check.worst < 1e-5
    assert check.worst_stored < 1e-5


def moved(events: Events, factor: float) -> Events:
    """With one number of the first step, or of the first pages sealed, moved by a share of the largest of its layer."""
    first = events.given[0] if events.given else events.written[0].given
    (name,) = first[LAYER]
    numbers = np.array(first[LAYER][name][ARRAY])
    numbers[0, 0, 0, 0] += factor * np.nanmax(np.abs(numbers))
    layers = [dict(layer) for layer in first]
    layers[LAYER][name] = {**layers[LAYER][name], ARRAY: numbers}
    if events.given:
        return events._replace(given=[tuple(layers), *events.given[1:]])
    written = events.written[0]._replace(given=tuple(layers))
    return events._replace(written=[written, *events.written[1:]])


@pytest.mark.parametrize("name", ["rotated8", pytest.param("kivi4", marks=pytest.mark.ci)])
def test_a_number_off_by_a_step_fails_the_run(name):
    check, session, tokens, seen = drive("gqa", MEMORIES[name])
    check.compare(tokens, seen, moved(session.events, 0.1))
    assert check.worst_stored > 0.05  # a step of 4 bits is 0.13 of the largest, of 8 bits 0.008
    memory = replace(MemoryConfig(), format=MEMORIES[name].format)
    with pytest.raises(RuntimeError, match=rf"what memory\.format = {name} stores lies further"):
        verify([], [], ACCURACY, memory=memory, dtype="float32", check=check)


def test_logits_follow_what_is_stored():
    """The parallel form takes the number that was read back: what is not in the pages shows in the logits."""
    check, session, tokens, seen = drive("gqa", MEMORIES["rotated8"])
    check.compare(tokens, seen, moved(session.events, 0.5))
    assert check.worst > 1e-4
