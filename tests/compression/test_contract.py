"""What every compression keeps to, over the registry: a new method is tested here without a line of its own.

A method's file says what it keeps. Here it must keep as many slots as it was told, the protected ones among them,
whatever lies in slots that nobody wrote; and through pages, chunks, formats and every mixer its logits must be those of
the parallel form under the mask of what it kept.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compression import COMPRESSIONS, Budget, Shape, Slots
from kvlab.ledger.states import QUANTISED, ROTATED, LatentState, RecurrentState, TokenState
from kvlab.memory.config import SEALED
from kvlab.memory.layout import MemoryConfig
from kvlab.schema import ConfigError
from tests.compression.harness import (
    PROMPT,
    READERS,
    SCORED,
    STATE,
    TOTAL,
    assert_equivalent,
    layout_of,
    memory_of,
    packed,
    passes,
    plausible,
    run,
    tokens_of,
)

EVERY_METHOD = pytest.mark.parametrize("method", SCORED)


@EVERY_METHOD
def test_as_many_slots_stay_as_were_told_and_the_protected_ones_among_them(method):
    """In order, bit for bit, with zeros behind; and the same again, whatever unused slots hold."""
    memory = memory_of(method, 9)
    done = packed(memory)
    for row, stored in enumerate(done.stored):
        for head, slots in enumerate(done.kept[row]):
            assert len(set(slots)) == 9
            assert (np.diff(slots) > 0).all()
            assert {0, 1, stored - 2, stored - 1} <= set(slots) <= set(range(stored))
            for name in ("keys", "values"):
                there = done.slots(name, row, after=True)[head]
                np.testing.assert_array_equal(there[:9], done.slots(name, row, after=False)[head][slots])
                assert not there[9:].any()
    assert len({tuple(slots) for slots in done.kept[0]}) == 1 or method not in ("recency", "tova")
    again = packed(memory, unused=float("nan"))
    np.testing.assert_array_equal(again.kept, done.kept)
    assert np.isfinite(again.slots("keys", 0, after=True)).all()


@pytest.mark.parametrize("method", [name for name in SCORED if not COMPRESSIONS[name].by_place])
def test_permuting_slots_permutes_scores(method):
    """Of a method that does not say `by_place`. Sinks stay where they are: every method knows them by their place."""
    chosen, rng, stored = memory_of(method, 9).compression, np.random.default_rng(0), 20
    keys, values = (jnp.asarray(rng.normal(size=(1, 2, 24, dim)), jnp.float32) for dim in (8, 6))
    layout = layout_of("gqa", memory_of(method, 9))
    specs = [state.spec for state in layout.classes if state.is_statistics]
    noted = {
        array.name: plausible(array.name, jnp.zeros((1, *array.shape), array.dtype), rng)
        for spec in specs
        for array in spec.arrays
    }
    used = (jnp.arange(24, dtype=jnp.int32) < stored)[None, None, :, None]
    count = jnp.full(1, stored, jnp.int32)
    slots = Slots(jnp.where(used, keys, 0), jnp.where(used, values, 0), count, count, noted, READERS, count, 0)
    order = np.concatenate([np.arange(2), 2 + rng.permutation(stored - 2), np.arange(stored, 24)])
    moved = {name: noted[name].at[:, :24].set(noted[name][:, order]) for name in chosen.by_slot}
    permuted = replace(slots, keys=slots.keys[:, :, order], values=slots.values[:, :, order], noted=dict(noted) | moved)
    expected, found = np.asarray(chosen.score(slots))[:, :, order], np.asarray(chosen.score(permuted))
    np.testing.assert_allclose(found[:, :, 2:stored], expected[:, :, 2:stored], rtol=1e-4, atol=1e-6)
    assert np.ptp(expected[:, :, 2:stored]) > 1e-4, "all scores alike would prove nothing"


@pytest.mark.parametrize("method", ["h2o", "keydiff"])
def test_logits_are_those_of_the_mask(method):
    """Two of them in `make test`: what notes something of every slot, and what notes nothing."""
    assert_equivalent(run("gqa", memory_of(method, at="chunks", every=3)))


@EVERY_METHOD
def test_logits_are_those_of_the_mask_while_prefilling_and_decoding(method):
    ran = run("norms_cap_bias", memory_of(method, at="chunks", every=3))
    assert_equivalent(ran)
    if not passes(method):
        assert ran.num_compactions >= 2 * 5, "after chunks of the prompt, at its end, and while decoding"
        assert all(held.sum(axis=2).max() <= 9 + 3 for layer in ran.held() for held in layer.values())


MODELS = ("mha", "gqa", "mqa", "no_positions", "partial_rope", "latent", "hybrid", "stacked")
WAYS = [
    {"page_size": 8, "chunk_len": 32, "budget": 10},
    {"page_size": 1, "chunk_len": 3, "at": "chunks", "every": 1},
    {"page_size": 16, "chunk_len": 4, "every": 4, "budget": 0.4},
    {"page_size": 4, "chunk_len": 7, "at": "chunks", "budget": 0.5, "layers": "pyramid", "beta": 3, "every": 2},
    *({"format": format, "at": "chunks"} for format in (*QUANTISED, *ROTATED)),
    *({"format": format, "page_size": 16, "budget": 18} for format in SEALED),
]


@EVERY_METHOD
@pytest.mark.parametrize("model", MODELS)
def test_every_mixer_gets_every_method(method, model):
    assert_equivalent(run(model, memory_of(method)))


@EVERY_METHOD
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_of_storing_and_every_time(method, way):
    budget = way.get("budget", 9)
    fields = {name: value for name, value in way.items() if name != "budget"}
    model = "stacked" if "layers" in way else "gqa"
    if way.get("format") in SEALED and (passes(method) or COMPRESSIONS[method]().weighs):
        why = "works with no compression that reads on behind a prompt|no weights of every step"
        with pytest.raises(ConfigError, match=why):
            run(model, memory_of(method, budget, **fields))
        return
    ran = run(model, memory_of(method, budget, **fields))
    assert_equivalent(ran)
    assert bool(ran.num_sealed) == (way.get("format") in SEALED)


@pytest.mark.parametrize("format", [*QUANTISED, *ROTATED, *SEALED])
@pytest.mark.parametrize("model", MODELS)
def test_every_mixer_in_every_format_under_a_compression(model, format):
    """Evicted first, then rounded, or rounded when it came. Rows of latents are neither turned nor sealed, and a model
    of nothing else is refused."""
    memory = memory_of("keydiff", 18, page_size=16, format=format)
    if model == "latent" and format in (*ROTATED, *SEALED):
        with pytest.raises(ConfigError, match=f"memory.format = '{format}': (serves no layer|LatentState is not)"):
            run(model, memory)
        return
    ran = run(model, memory)
    assert_equivalent(ran)
    assert bool(ran.num_sealed) == (format in SEALED)


@EVERY_METHOD
def test_the_same_tokens_stay_however_the_prompt_is_cut_and_where_pages_end(method):
    """At the prompt's end a method sees what it would of the prompt in a single piece: sums to rounding."""
    first, *others = (
        run("gqa", memory_of(method, page_size=page_size, chunk_len=chunk_len)).held()[0]["kv"]
        for page_size, chunk_len in ((4, 5), (8, PROMPT), (4, 1))
    )
    for held in others:
        np.testing.assert_array_equal(held, first)


def test_what_cannot_be_dropped_in_part_stays_and_what_forgets_by_itself_does():
    layout = layout_of("hybrid", memory_of("keydiff"))
    assert [set(joined) for joined in layout.joined] == [set(), set(), {"kv"}]
    kept = [state for state in layout.classes if state.retention is None]
    assert any(isinstance(state.spec, RecurrentState) for state in kept)
    assert any(isinstance(state.spec, TokenState) and state.spec.span is not None for state in kept)


@EVERY_METHOD
@pytest.mark.parametrize(
    ("model", "reason"),
    [("mamba2", "one state a sequence cannot be dropped in part"), ("window", "a window forgets by itself")],
)
def test_a_model_in_which_nothing_can_be_dropped_is_refused(method, model, reason):
    with pytest.raises(ConfigError, match=f"memory.compression = '{method}': serves no layer of this model.*{reason}"):
        layout_of(model, memory_of(method))


@EVERY_METHOD
def test_a_budget_below_what_is_protected_is_refused(method):
    protected = COMPRESSIONS[method].build({}).sinks + COMPRESSIONS[method].build({}).recent
    if protected > 1:
        with pytest.raises(ConfigError, match=rf"memory.budget = .*must be at least the {protected} slots"):
            layout_of("gqa", MemoryConfig(compression={"type": method}, budget=protected - 1))  # pyright: ignore


def test_a_method_that_weighs_by_queries_asks_who_reads():
    silent = [replace(STATE, readers=None), LatentState(6, 2, "float32")]
    for method in SCORED:
        kind = COMPRESSIONS[method]
        for state in silent:
            chosen = kind.build({})
            shape = Shape(Budget(slots=64), 128, 16, 0, 1)
            if kind.uses_readers:
                with pytest.raises(ConfigError, match=f"{method} weighs tokens by queries"):
                    chosen.parts(state, shape)
            else:
                assert set(chosen.parts(state, shape)) == {""}


def test_bytes_fall_as_stated():
    """Pages held after the prompt are those of the budget, to the page, and what was noted is counted beside."""
    for method in ("knorm", "h2o"):
        layout = layout_of("gqa", memory_of(method, 9, every=3), prompt_len=PROMPT)
        ledger = layout.ledger()
        tokens = tokens_of()
        assert tokens.shape[1] == TOTAL
        for start in range(0, PROMPT, 5):
            width = min(5, PROMPT - start)
            ledger.reserve(0, width)
            ledger.commit(0, width)
        ledger.compact({0: {"kv": 9}}, {0: 0})
        accounts = {account.name: account for account in ledger.audit()}
        assert accounts["kv"].allocated == 3 * layout.classes[0].page_bytes, "9 slots in pages of 4"
        if method == "h2o":
            assert accounts["kv.noted"].allocated == 4 * 2 * 2 * 24, "two float32 a slot and head, in whole pages"
