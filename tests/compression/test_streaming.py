"""What forgets by position alone: StreamingLLM for all heads, DuoAttention for some."""

import hashlib
import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compression.duo import Duo
from kvlab.compression.streaming import Streaming
from kvlab.lab.laboratory import Laboratory
from kvlab.ledger.readers import Readers
from kvlab.ledger.states import LatentState, TokenState
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.views.split import SplitTokens
from kvlab.memory.views.whole import WholeTokens
from kvlab.schema import ConfigError
from pallas_kernels.visible import Visible
from tests.compression.driven import ROWS, TOTAL, drive
from tests.contracts import build
from tests.lab.test_execute import small

STREAMING = {"type": "streaming", "sinks": 3}


@pytest.mark.parametrize("variant", ["mha", "hybrid"])
def test_between_steps_exactly_the_budget_is_held(variant):
    check, session = drive(variant, STREAMING, 10)
    assert check.worst < 1e-5
    assert not session.compacted
    for state, account in zip(session.layout.classes, session.ledger.audit(), strict=True):
        if state.name == "kv" or (state.spec.per_token and state.spec.visible == Visible(8, 3)):
            assert account.logical == ROWS * 10 * state.spec.unit_bytes * state.num_layers


def test_prompts_are_never_held_whole():
    _, session = drive("gqa", STREAMING, 10)
    (state,) = session.layout.classes
    # one page of sinks, a band of window and chunk at its worst alignment
    assert session.ledger.counters.peak_pages[0] <= ROWS * (1 + (7 + 5 + 4 - 2) // 4 + 1)
    assert state.num_pages < 1 + ROWS * -(-TOTAL // 4)


@pytest.mark.parametrize(("budget", "words"), [(0.5, "must be slots"), ("64KiB", "must be slots"), (2, "at least 3")])
@pytest.mark.parametrize("method", [STREAMING, {"type": "duo", "sinks": 3, "streaming": [[0]]}])
def test_a_budget_that_cannot_be_meant_is_refused(budget, words, method):
    model, *_ = build("gqa")
    memory = MemoryConfig(compression=method, budget=budget)
    with pytest.raises(ConfigError, match=rf"memory\.budget.*{words}"):
        MemoryLayout.of(model.states(), memory, max_sequences=1, max_len=TOTAL)


def test_a_run_that_cannot_be_is_refused_before_it_is_trained(tmp_path):
    for overrides, words in (
        (["compression=streaming", "memory.budget=0.9"], "must be slots for streaming"),
        (["compression=duo", "memory.budget=9", "memory.compression.streaming=[[7]]"], "below the 4 KV heads"),
    ):
        config = small(tmp_path, "memory.compression.sinks=0", *overrides)
        with pytest.raises(ConfigError, match=words):
            Laboratory.of(config, abstract=True)


@pytest.mark.parametrize("variant", ["window", "mamba2"])
def test_a_model_that_forgets_already_is_refused(variant):
    model, *_ = build(variant)
    with pytest.raises(ConfigError, match="serves no layer of this model"):
        MemoryLayout.of(model.states(), MemoryConfig(compression=STREAMING, budget=8), max_sequences=1, max_len=TOTAL)


def test_heads_held_apart_are_attended_to_as_if_they_were_not():
    """[B 2, T 9, K 3, G 2]: heads 0 and 2 see everything, head 1 a sink and the last 3; in float64."""
    rng = np.random.default_rng(0)
    queries, keys, values = rng.standard_normal((2, 9, 6, 4)), *rng.standard_normal((2, 2, 9, 3, 4))
    heads = (("full", (0, 2)), ("streaming", (1,)))
    counts = jnp.array([9, 9])
    state = TokenState(3, 4, 4, readers=Readers(6, scale=0.7, soft_cap=2.0))
    parts = {
        "full": WholeTokens(state.of_heads(2), {}, counts),
        "streaming": WholeTokens(replace(state.of_heads(1), visible=Visible(3, 1)), {}, counts),
    }
    sinks = rng.standard_normal(6)
    view = SplitTokens.of_parts(heads, parts)
    view = view.append(keys=jnp.asarray(keys, jnp.float32), values=jnp.asarray(values, jnp.float32))
    found, view = view.attend(jnp.asarray(queries, jnp.float32), None, sink_logits=jnp.asarray(sinks, jnp.float32))
    for row, head in np.ndindex(2, 6):
        scores = 2 * np.tanh(0.7 * queries[row, :, head] @ keys[row, :, head // 2].T / 2)
        query, key = np.indices((9, 9))
        seen = key <= query
        if head // 2 == 1:
            seen &= (key > query - 3) | (key < 1)
        weights = np.where(seen, np.exp(scores), 0)
        total = weights.sum(axis=1, keepdims=True) + np.exp(sinks[head])
        expected = weights / total @ values[row, :, head // 2]
        np.testing.assert_allclose(found[row, :, head], expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(view.parts()["streaming"].pool["keys"][:, :, 0], np.float32(keys[:, :, 1]))


@pytest.mark.parametrize(("variant", "streaming", "format"), [("gqa", [[1]], "int8"), ("mha", [[3, 0]], "model")])
def test_duo_is_the_parallel_form_under_a_mask_for_each_head(variant, streaming, format):
    method = {"type": "duo", "sinks": 2, "streaming": streaming}
    check, session = drive(variant, method, 7, format=format)
    assert check.worst < 1e-5
    full, windowed = session.layout.classes
    assert (full.name, windowed.name) == ("kv.full", "kv.streaming")
    assert windowed.spec.num_kv_heads == len(streaming[0])
    logical = [account.logical for account in session.ledger.audit()]
    assert logical == [ROWS * TOTAL * full.spec.unit_bytes, ROWS * 7 * windowed.spec.unit_bytes]


def test_all_heads_or_none_are_one_state():
    state = TokenState(2, 4, 4)
    for heads, expected in (((), state), ((1, 0), replace(state, visible=Visible(6, 3)))):
        model_states = [{"kv": state}, {"kv": state}]
        memory = MemoryConfig(page_size=4, compression={"type": "duo", "sinks": 3, "streaming": [heads, [1]]}, budget=8)
        layout = MemoryLayout.of(model_states, memory, max_sequences=1, max_len=64)
        assert layout.classes[0].spec == expected
        assert layout.stored == tuple(model_states)


def refused(method, states=None):
    memory = MemoryConfig(compression=method, budget=8)
    with pytest.raises(ConfigError) as error:
        MemoryLayout.of(states or [{"kv": TokenState(2, 4, 4)}], memory, max_sequences=1, max_len=64)
    return str(error.value)


def test_heads_that_the_model_lacks_are_refused(tmp_path):
    assert "must be below the 2 KV heads" in refused({"type": "duo", "streaming": [[2]]})
    assert "a list for each compressed layer, 1 in all" in refused({"type": "duo", "streaming": [[0], [1]]})
    assert "cannot be split" in refused({"type": "duo", "streaming": [[0]]}, [{"latents": LatentState(4, 2)}])
    for given, words in (({}, "must be given"), ({"streaming": [[1, 1]]}, "not name a head twice")):
        with pytest.raises(ConfigError, match=words):
            Duo.build(given)
    with pytest.raises(ConfigError, match=r"must be a file that ranks heads \(FileNotFoundError\)"):
        Duo(ranking=str(tmp_path / "none.json"))


def test_a_ranking_says_which_heads_stream(tmp_path):
    path = tmp_path / "heads.json"
    order = [(1, 0), (0, 1), (0, 0), (1, 1)]
    path.write_text(json.dumps({"ranking": [{"layer": layer, "head": head, "lost": 0.1} for layer, head in order]}))
    pinned = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [Duo(ranking=str(path), share=0.75, sha256=pinned).streaming_heads(layer, 2, 2) for layer in (0, 1)] == [
        (0, 1),
        (0,),
    ]
    assert [Duo(ranking=str(path), share=0.25).streaming_heads(layer, 2, 2) for layer in (0, 1)] == [(), (0,)]
    for sizes in ((2, 3), (1, 2)):
        with pytest.raises(ConfigError, match="must rank all"):
            Duo(ranking=str(path)).streaming_heads(0, *sizes)
    with pytest.raises(ConfigError, match="must be that of"):
        Duo(ranking=str(path), sha256="0" * 64)
    assert Streaming().retention(TokenState(2, 4, 4), None) is None
