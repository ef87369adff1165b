"""Selecting, packing and moving statistics against loops over slots; and errors put there on purpose, each of which a
check must see."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.memory import compacting
from kvlab.memory.compacting import select
from pallas_kernels.visible import NOWHERE
from tests.compression.harness import TOLERANCE, memory_of, packed, run


def selected(scores, valid, protected, keep):
    """The protected slots, then the best, the newer of equals: one row and head at a time."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    slots = [slot for slot in range(len(scores)) if valid[slot]]
    order = sorted(slots, key=lambda slot: (not protected[slot], 0 if protected[slot] else -scores[slot], -slot))
    return sorted(order[:keep])


def check_selection():
    rng = np.random.default_rng(0)
    for _ in range(8):
        scores = rng.integers(0, 4, (3, 2, 16)).astype(np.float32)
        scores[rng.random(scores.shape) < 0.1] = np.nan
        scores[rng.random(scores.shape) < 0.1] = -np.inf
        stored, keep = rng.integers(1, 17, 3), rng.integers(4, 12, 3)
        valid = np.arange(16)[None] < stored[:, None]
        protected = valid & ((np.arange(16)[None] < 1) | (np.arange(16)[None] >= stored[:, None] - 2))
        arrays = (jnp.asarray(array) for array in (scores, valid, protected, keep.astype(np.int32)))
        found = np.asarray(compacting.select(*arrays, 12))
        for row in range(3):
            for head in range(2):
                wanted = selected(scores[row, head], valid[row], protected[row], keep[row])
                assert found[row, head].tolist() == wanted + [NOWHERE] * (12 - len(wanted))


def check_statistics():
    """What was noted of a slot stands where the slot went, zeros behind; what is of no slot stays."""
    done = packed(memory_of("h2o", 9))
    before, after = done.before[0]["kv.noted"], done.after[0]["kv.noted"]
    noted = done.plan.classes[1]
    for row in range(2):
        was, now = noted.pages[row, 0], noted.destinations[row, 0]
        for name in ("mass", "readers"):
            for head in range(2):
                there = after[name][now][:, head]
                np.testing.assert_array_equal(there[:9], before[name][was][done.kept[row, head], head])
                assert not there[9:].any()


def check_ties():
    """Of equal keys the newer ones stay, in every head."""
    done = packed(memory_of("knorm", 9), ties=True)
    for row, stored in enumerate(done.stored):
        lengths = np.linalg.norm(done.slots("keys", row, after=False), axis=-1)[:, :stored].round(5)
        protected = [slot < 2 or slot >= stored - 2 for slot in range(stored)]
        for head in range(2):
            assert done.kept[row, head].tolist() == selected(-lengths[head], [True] * stored, protected, 9)


def check_equivalence(budget: int):
    """A budget of its own for every error: a compiled program is taken again where all is equal."""
    ran = run("gqa", memory_of("h2o", budget, at="chunks", every=3))
    assert ran.worst <= TOLERANCE


CHECKS = {
    "selection": check_selection,
    "statistics": check_statistics,
    "ties": check_ties,
    "equivalence of 11": lambda: check_equivalence(11),
    "equivalence of 12": lambda: check_equivalence(12),
}


@pytest.mark.parametrize("check", ["selection", "statistics", "ties"])
def test_it_is_what_loops_say(check):
    CHECKS[check]()


def a_page_off(pool, pages, destinations, kept):
    """Reads every slot a page further on."""
    page_size = next(iter(pool.values())).shape[2]
    return PACK(pool, pages, destinations, jnp.where(kept < NOWHERE, jnp.maximum(kept - page_size, 0), kept))


def older_of_equals(scores, valid, protected, keep, width):
    """Ties go to the older slot."""
    turned = [jnp.flip(array, axis=-1) for array in (scores, valid, protected)]
    found = select(*turned, keep, width)
    return jnp.sort(jnp.where(found < NOWHERE, scores.shape[-1] - 1 - found, NOWHERE), axis=-1)


def protects_nothing(scores, valid, protected, keep, width):
    """Forgets the sinks and the newest slots."""
    return select(scores, valid, jnp.zeros_like(protected), keep, width)


def unsorted(scores, valid, protected, keep, width):
    """Says other slots than were packed: the last two exchanged places."""
    found = select(scores, valid, protected, keep, width)
    return found.at[..., 0].set(found[..., 1]).at[..., 1].set(found[..., 0])


def stale(array, kept):
    """Statistics stay where they were."""
    return array


PACK = compacting.pack
PLANTED = [
    ("pack", a_page_off, "equivalence of 11"),
    ("select", older_of_equals, "selection"),
    ("select", older_of_equals, "ties"),
    ("select", protects_nothing, "selection"),
    ("select", unsorted, "equivalence of 12"),
    ("_moved", stale, "statistics"),
]


@pytest.mark.parametrize(("name", "wrong", "check"), PLANTED, ids=[f"{wrong.__name__}-{c}" for _, wrong, c in PLANTED])
def test_a_planted_error_is_seen(monkeypatch, name, wrong, check):
    monkeypatch.setattr(compacting, name, wrong)
    with pytest.raises(AssertionError):
        CHECKS[check]()
