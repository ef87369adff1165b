"""A memory of which steps read only some pages: it computes what brute force says, and knows its bytes."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.compression import COMPRESSIONS
from kvlab.engine.step import MemoryStep
from kvlab.engine.swap import HostTier
from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.session import Session
from kvlab.memory import compacting
from kvlab.memory.layout import MemoryConfig, MemoryLayout, stored_states
from kvlab.memory.page_index import page_keys
from kvlab.memory.pools import num_bytes
from kvlab.models.transformer import ModelConfig, Transformer, merge, split
from kvlab.schema import ConfigError
from kvlab.selection import SELECTIONS
from tests.contracts import VARIANTS, VOCAB, run_ragged, states_of
from tests.selection.brute_force import logits_of

LAYERS = {
    "attention": [*VARIANTS["sink_logits"], *VARIANTS["window"], *VARIANTS["gqa"]],
    "latent": VARIANTS["latent"],
    "shared": [VARIANTS["yoco"][1], *VARIANTS["window"], *VARIANTS["yoco"][2:]],
}
PROMPT = 11
METHOD = {"fraction": 0.5, "dense_layers": 0}


@functools.cache
def build(name):
    """A model with weights large enough that what is read shows."""
    model = Transformer(LAYERS[name], ModelConfig(model_dim=16, tie_embeddings=False), VOCAB, rngs=nnx.Rngs(0))
    structure, params = split(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), params)
    return merge(structure, params), structure, params


def memory_of(method="quest", *, page_size=4, chunk_len=5, format="model", compression=None, budget=None, **fields):
    selection = SELECTIONS[method](**METHOD | fields)
    sizes = {"page_size": page_size, "chunk_len": chunk_len, "format": format}
    return MemoryConfig(**sizes, selection=selection, compression=compression, budget=budget)


def session_of(name, memory, *, rows=3, max_len=24, host_len=0, **options):
    model, structure, params = build(name)
    layout = MemoryLayout.of(model.states(), memory, max_sequences=rows, max_len=max_len, host_len=host_len)
    session = Session(MemoryStep.of(structure, layout), params, layout.allocate(float("nan")), **options)
    session.decode_from = PROMPT
    return session


def sequences(*lengths):
    rng = np.random.default_rng(len(lengths))
    return {f"{i}": rng.integers(0, VOCAB, n).astype(np.int32) for i, n in enumerate(lengths)}


def expected(name, memory, tokens):
    model, *_ = build(name)
    states = stored_states(model.states(), memory)
    return logits_of(model, states, memory.selection, memory.page_size, tokens, PROMPT)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("attention", {"prefill": "dense"}),
        ("attention", {"prefill": "sparse", "format": "int8", "method": "mean_key"}),
        ("latent", {"prefill": "sparse", "pages": 3, "page_size": 3, "last_pages": 2}),
        ("attention", {"prefill": "sparse", "chunk_len": 3, "first_pages": 0, "page_size": 7}),
        ("attention", {"prefill": "dense", "chunk_len": 16, "format": "int4", "page_size": 1}),
        ("shared", {"prefill": "sparse"}),
    ],
    ids=str,
)
def test_every_way_of_chunks_computes_what_brute_force_says(name, fields):
    """Ragged sequences in pools that hold NaN; then others, which use the pages of those before, token by token."""
    memory = memory_of(**fields)
    session = session_of(name, memory)
    for width, lengths in ((memory.chunk_len, (24, 9, 17)), (1, (13, 24, 18))):
        mine = sequences(*lengths)
        for key, found in run_ragged(session, mine, width).items():
            np.testing.assert_allclose(found, expected(name, memory, mine[key]), atol=2e-4, rtol=2e-4, err_msg=key)


def test_a_query_does_not_read_everything():
    """The brute force above would agree with a memory that always reads all, if reading less made no difference."""
    memory, everything = memory_of(prefill="sparse"), memory_of(prefill="sparse", fraction=1.0)
    tokens = sequences(24)["0"]
    less, all_of_it = (expected("attention", each, tokens) for each in (memory, everything))
    assert np.abs(less - all_of_it).max() > 0.1 * np.abs(all_of_it).max()
    complete = build("attention")[0]
    np.testing.assert_allclose(
        all_of_it, complete.logits(complete.parallel(jnp.asarray(tokens[None])))[0], atol=2e-4, rtol=2e-4
    )


def assert_index_is_what_keys_say(session):
    """Of every page that a sequence holds: exactly, whatever happened to it."""
    layout, checked = session.layout, 0
    for layer, states in enumerate(layout.states):
        for name, index in states.items():
            state, pool = layout.classes[index], session.pools[layer][name]
            if state.spec.reading is None:
                continue
            for held in session.ledger.running.values():
                holding = held.holdings[index]
                for logical, page in holding.pages.items():
                    used = min(state.page_size, held.length - holding.dropped - logical * state.page_size)
                    keys = np.asarray(page_keys(state.spec, pool, jnp.asarray([[page]])))[0, 0, :, :used]
                    assert (np.asarray(pool["key_min"][page]) == keys.min(axis=1)).all(), f"page {logical}"
                    assert (np.asarray(pool["key_max"][page]) == keys.max(axis=1)).all(), f"page {logical}"
                    checked += 1
    return checked


def test_the_index_travels_with_its_pages():
    """Through chunks, a rejected draft, a fork whose open page is copied, and the host and back."""
    session = session_of("attention", memory_of(), host_len=60)
    tokens = sequences(24)["0"]
    for start in range(0, 10, 5):
        session.advance({"a": tokens[start : start + 5]}, 5)
    ledger, step = session.ledger, session.step
    assert ledger.reserve("a", 1, 2).ready
    wrong = np.zeros((3, 5), np.int32)
    wrong[0, :3] = [tokens[10], VOCAB - 1 - tokens[11], VOCAB - 1 - tokens[12]]
    _, session.pools = step.run(session.params, session.pools, ledger.plan(["a"], 3, 5), wrong)
    ledger.commit("a", 1)
    session.advance({"a": tokens[11:12]}, 1)  # over the first of the drafts; the other is behind it, and not read
    assert_index_is_what_keys_say(session)
    session.advance({"a": tokens[12:15]}, 5)
    ledger.fork("a", "b")
    session.advance({"a": tokens[15:16], "b": tokens[:1]}, 1)
    host = HostTier(session.layout)
    host.take(session.pools, ledger.swap_out("a"))
    session.advance({"c": tokens[:5]}, 5)  # into the pages that are free now
    session.pools = host.give_back(session.pools, ledger.swap_in("a"))
    ledger.check()
    assert assert_index_is_what_keys_say(session) == 2 * (4 + 4 + 2)
    forked = {"a": [*tokens[:16], *tokens[16:18]], "b": [*tokens[:15], tokens[0], *tokens[20:22]]}
    logits = session.advance({"a": tokens[16:18], "b": tokens[20:22]}, 5)
    for row, mine in enumerate(forked.values()):
        wanted = expected("attention", memory_of(), np.array(mine))[-2:]
        np.testing.assert_allclose(logits[row, :2], wanted, atol=2e-4, rtol=2e-4)


@functools.cache
def compacted(method, format, name="attention"):
    """Sequences that were compacted at their prompt's end and while decoding, every step observed, and their logits."""
    compression = COMPRESSIONS[method](sinks=1, recent=3, every=4, **({"window": 3} if method == "snapkv" else {}))
    memory = memory_of(compression=compression, budget=9, format=format, page_size=2, fraction=0.7)
    session = session_of(name, memory, poisons=True, observes=True)
    session.prompt_len = PROMPT
    tokens, seen = np.stack(list(sequences(24, 24, 24).values())), {}
    for start, end in ((0, 5), (5, 10), (10, 11), *((at, at + 1) for at in range(11, 24))):
        width = 1 if start >= PROMPT else 5
        logits = session.advance({row: tokens[row, start:end] for row in range(3)}, width)
        seen |= {at: np.asarray(logits[:, at - start]) for at in range(start, end)}
    return session, tokens, seen


@pytest.mark.parametrize(("method", "format"), [("snapkv", "int8"), ("h2o", "model"), ("knorm", "int4")])
def test_it_composes_with_compressions_and_formats(method, format):
    session, tokens, seen = compacted(method, format)
    assert len(session.compacted) == 4
    assert_index_is_what_keys_say(session)
    session.ledger.check()
    check = MaskCheck(build("attention")[1], session.params, session.layout)
    check.compare(tokens, seen, session.events)
    assert check.worst < 1e-5
    assert check.num_compared == 24 * 3


def test_each_layer_that_reads_the_same_pages_chooses_for_itself():
    """And is verified under its own mask: under that of another reader logits differ."""
    session, tokens, seen = compacted("knorm", "model", "shared")
    check = MaskCheck(build("shared")[1], session.params, session.layout)
    check.compare(tokens, seen, session.events)
    assert check.worst < 1e-5
    last = session.steps[-1]
    assert [len(reads["kv"]) for reads in last.is_read if reads] == [3]
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in itertools.pairwise(last.is_read[0]["kv"]))
    steps = [each._replace(is_read=({"kv": each.is_read[0]["kv"][::-1]}, *each.is_read[1:])) for each in session.steps]
    check.compare(tokens, seen, session.events._replace(steps=steps))
    assert check.worst > 1e-3


def test_a_compaction_that_forgets_the_index_is_caught(monkeypatch):
    monkeypatch.setattr(compacting, "noted_anew", lambda method, state, pool, pages, num_slots: pool)
    compacted.cache_clear()
    MemoryStep.of.cache_clear()
    with pytest.raises(AssertionError, match="page"):
        assert_index_is_what_keys_say(compacted("knorm", "model")[0])
    compacted.cache_clear()
    MemoryStep.of.cache_clear()


def test_a_wrong_mask_is_caught():
    """What was read is checked against what is stated, and the logits against what was read."""
    session, tokens, seen = compacted("snapkv", "int8")
    check = MaskCheck(build("attention")[1], session.params, session.layout)
    steps = [*session.steps[:-1], swapped(session.steps[-1])]
    check.compare(tokens, seen, session.events._replace(steps=steps))
    assert check.worst > 1e-3
    last = session.steps[-1]
    for spoil, reason in ((jnp.ones_like, "pages of"), (jnp.zeros_like, "read 0 pages")):
        wrong = last._replace(is_read=jax.tree.map(spoil, last.is_read))
        with pytest.raises(AssertionError, match=reason):
            check.compare(tokens, seen, session.events._replace(steps=[*session.steps[:-1], wrong]))


def swapped(step):
    """A step that says of each page that was chosen that it was the next one."""

    def wrong(is_read):
        is_read = np.array(is_read)
        for row in is_read.reshape(-1, is_read.shape[-1]):
            newest = np.flatnonzero(row).max()
            row[1:newest] = np.roll(row[1:newest], 1)
        return is_read

    return step._replace(is_read=jax.tree.map(wrong, step.is_read))


@pytest.mark.parametrize("method", ["quest", "mean_key", "recency", "oracle"])
def test_bytes_held_grow_by_the_index_and_bytes_read_are_those_of_the_pages(method):
    """Held: against the arrays and the account. Read: counted from what the queries of the last step said."""
    memory = memory_of(method, format="int8", fraction=0.4)
    session = session_of("attention", memory, observes=True)
    tokens = sequences(23, 23, 23)
    for start in (0, 5, 10, 15, 20):
        logits = session.advance({name: each[start : min(23, start + 5)] for name, each in tokens.items()}, 5)
    assert np.isfinite(np.asarray(logits[:, :3])).all()
    layout = session.layout
    assert num_bytes(session.pools) == layout.pool_bytes
    plain = MemoryLayout.of(
        build("attention")[0].states(), replace(memory, selection=None), max_sequences=3, max_len=24
    )
    index = {"quest": 2 * 8 * 4, "mean_key": 8 * 4}.get(method, 0) * 2  # channels of 4 bytes, of 2 heads
    of_pages = sum(state.num_layers * state.num_pages for state in layout.classes if state.spec.reading) * index
    assert layout.pool_bytes - plain.pool_bytes == of_pages
    for state, account in zip(layout.classes, session.ledger.audit(), strict=True):
        assert account.balanced
        assert account.logical == 3 * state.num_layers * state.spec.logical_bytes(23, 4)
        assert (
            account.statistics
            == account.live_statistics
            == (3 * 6 * state.num_layers * index if state.spec.reading else 0)
        )
    session.advance({name: each[:1] for name, each in tokens.items()}, 1)
    state = layout.classes[layout.states[0]["kv"]]
    is_read = np.asarray(session.steps[-1].is_read[0]["kv"][0])[
        0, 0
    ]  # of 6 pages, the last with 3 slots before this token
    sizes = np.array([4, 4, 4, 4, 4, 3])
    by_head = 2 * (8 + 4)  # keys and values in int8, each with a scale
    for head in is_read:
        read = sizes[head[:6]].sum()
        looked_at = (23 - read) * (8 + 4) if method == "oracle" else 0
        assert state.spec.read_bytes(23) == 6 * index + 2 * (read * by_head + looked_at)
    assert state.spec.read_bytes(23) < state.spec.logical_bytes(23) or method == "oracle"


@pytest.mark.parametrize(
    ("layers", "fields", "sentence"),
    [
        ("window", {}, "memory.selection = 'quest': serves no layer of this model: a window reads little by itself"),
        ("mamba2", {}, "memory.selection = 'quest': serves no layer of this model: one state a sequence has no pages"),
        ("gqa", {"dense_layers": 2}, "memory.selection.dense_layers = 2: must be below 1, the layers of this model"),
        ("retrieval", {}, "memory.selection = 'quest': serves no layer of this model: it selects by itself"),
    ],
)
def test_a_model_of_which_nothing_can_select_is_refused(layers, fields, sentence):
    with pytest.raises(ConfigError) as caught:
        stored_states([{"state": state} for state in states_of(layers)], memory_of(**fields))
    assert str(caught.value).startswith(sentence)


def test_heads_that_store_different_pages_are_refused():
    """And layers that cannot select are passed over: the window beside them, and what is dense."""
    states = build("attention")[0].states()
    held = stored_states(states, memory_of(dense_layers=1))
    assert [layer["kv"].reading is None for layer in held] == [True, True, False]
    compression = COMPRESSIONS["streaming"]()
    with pytest.raises(ConfigError, match=r"memory.selection = 'quest': must be all with compression = streaming"):
        MemoryLayout.of(states, memory_of(compression=compression, budget=16), max_sequences=1, max_len=24)
