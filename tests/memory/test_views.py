"""Every kind of token memory against float64 rewrites of its formula: in chunks, ragged, with NaN in all that must not
be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.ledger.memory_states import SealedState, Statistics
from kvlab.ledger.readers import Readers
from kvlab.ledger.states import LatentState, RecurrentState, RetrievalState, State, TokenState
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.lightning import IndexQueries
from kvlab.memory.views import VIEWS, view_of, whole
from kvlab.schema import ConfigError
from pallas_kernels.formats import quantised
from pallas_kernels.visible import Visible

LENGTHS = (3, 13, 8)


def drawn(widths: dict[str, tuple[int, int]], *, whole_numbers: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Random arrays [B, T, heads, D] by name; whole numbers in [-2, 2] where products shall be exact, and often
    equal."""
    rng, shape = np.random.default_rng(0), (len(LENGTHS), max(LENGTHS))
    return {
        name: (
            rng.integers(-2, 3, (*shape, *width)) if name in whole_numbers else rng.standard_normal((*shape, *width))
        ).astype(np.float32)
        for name, width in widths.items()
    }


def through(state: State, memory: MemoryConfig, arrays: dict[str, np.ndarray], ask) -> np.ndarray:
    """Outputs [B, T, ...] of `ask(view, arrays of a chunk, positions)` after each chunk was appended."""
    layout = MemoryLayout.of([{"kv": state}], memory, max_sequences=len(LENGTHS), max_len=max(LENGTHS))
    ledger, pools = layout.ledger(), layout.allocate(float("nan"))
    stored = [array.name for array in state.arrays]

    @jax.jit
    def step(pools, plan, chunk):
        positions = plan.starts[:, None] + jnp.arange(memory.chunk_len, dtype=jnp.int32)[None, :]
        view = layout.views(pools, plan)[0]["kv"].append(**{name: chunk[name] for name in stored})
        return layout.pools(({"kv": view},)), ask(view, chunk, positions)

    outputs = None
    for start in range(0, max(LENGTHS), memory.chunk_len):
        rows = [row for row, length in enumerate(LENGTHS) if length > start]
        counts = [min(memory.chunk_len, LENGTHS[row] - start) for row in rows]
        for row, count in zip(rows, counts, strict=True):
            ledger.reserve(row, count)
        chunk = {
            name: np.full((len(LENGTHS), memory.chunk_len, *array.shape[2:]), np.nan, np.float32)
            for name, array in arrays.items()
        }
        for line, (row, count) in enumerate(zip(rows, counts, strict=True)):
            for name, array in arrays.items():
                chunk[name][line, :count] = array[row, start : start + count]
        plan = ledger.plan(rows, len(LENGTHS), memory.chunk_len)
        pools, found = step(pools, jax.tree.map(jnp.asarray, plan), chunk)
        found = np.asarray(found)
        outputs = np.zeros((*arrays["queries"].shape[:2], *found.shape[2:]), np.float32) if outputs is None else outputs
        for line, (row, count) in enumerate(zip(rows, counts, strict=True)):
            outputs[row, start : start + count] = found[line, :count]
            ledger.commit(row, count)
    return outputs


def attention(queries, keys, values, seen, scale) -> np.ndarray:
    """Softmax attention of one sequence, [T, H, D] over [T, K, D], in float64; `seen(t)` lists what token t reads."""
    outputs = np.zeros((*queries.shape[:2], values.shape[2]))
    group = queries.shape[1] // keys.shape[1]
    for t, head in np.ndindex(queries.shape[:2]):
        places = seen(t)
        scores = keys[places, head // group].astype(np.float64) @ queries[t, head] * scale
        weights = np.exp(scores - scores.max())
        outputs[t, head] = weights @ values[places, head // group] / weights.sum()
    return outputs


def assert_right(found: np.ndarray, expected: list[np.ndarray], tolerance: float = 1e-6) -> None:
    for row, length in enumerate(LENGTHS):
        error = np.linalg.norm(found[row, :length] - expected[row][:length])
        assert error <= tolerance * np.linalg.norm(expected[row][:length])


PLACES = [MemoryConfig("paged", 1, 5), MemoryConfig("paged", 4, 5), MemoryConfig("paged", 4, 1)]


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
@pytest.mark.parametrize(
    "memory", [MemoryConfig("paged", 4, 5), MemoryConfig("paged", 4, 1), MemoryConfig("dense", 1, 5)]
)
def test_quantised_tokens_are_the_rounded_ones(memory, format):
    visible = Visible(6, 2)
    arrays = drawn({"queries": (4, 8), "keys": (2, 8), "values": (2, 6)})
    held = MemoryConfig(memory.name, memory.page_size, memory.chunk_len, format)
    found = through(
        TokenState(2, 8, 6, visible=visible), held, arrays, lambda view, chunk, at: view.attend(chunk["queries"], at)[0]
    )
    keys, values = (np.asarray(quantised(jnp.asarray(arrays[name]), format).values()) for name in ("keys", "values"))
    seen = [[p for p in range(t + 1) if visible.sees(t, p)] for t in range(max(LENGTHS))]
    expected = [
        attention(queries, k, v, seen.__getitem__, 8**-0.5)
        for queries, k, v in zip(arrays["queries"], keys, values, strict=True)
    ]
    assert_right(found, expected)


@pytest.mark.parametrize("visible", [Visible(), Visible(6, 2), Visible(chunk=5)], ids=str)
@pytest.mark.parametrize("memory", [MemoryConfig("paged", 4, 5), MemoryConfig("dense", 1, 5)], ids=lambda m: m.name)
def test_the_states_mask_is_applied(memory, visible):
    """In pages, in rows, and in the parallel form."""
    arrays = drawn({"queries": (4, 8), "keys": (2, 8), "values": (2, 6)})
    state = TokenState(2, 8, 6, visible=visible, readers=Readers(4, scale=0.5))
    found = through(state, memory, arrays, lambda view, chunk, at: view.attend(chunk["queries"], at)[0])
    seen = [[p for p in range(t + 1) if visible.sees(t, p)] for t in range(max(LENGTHS))]
    rows = zip(*(arrays[name] for name in ("queries", "keys", "values")), strict=True)
    expected = [attention(*row, seen.__getitem__, 0.5) for row in rows]
    assert_right(found, expected)
    (layer,) = whole([{"kv": state}], *arrays["queries"].shape[:2])
    view = layer["kv"].append(**{name: jnp.asarray(arrays[name]) for name in ("keys", "values")})
    assert_right(np.asarray(view.attend(jnp.asarray(arrays["queries"]), None)[0]), expected)


@pytest.mark.parametrize("memory", PLACES)
def test_latent_rows_are_keys_and_values(memory):
    arrays = drawn({"queries": (3, 8), "keys": (1, 8)})
    found = through(
        LatentState(6, 2, "float32", readers=Readers(3, scale=0.3)),
        memory,
        arrays,
        lambda view, chunk, at: view.attend(chunk["queries"], at)[0],
    )
    expected = [
        attention(queries, rows, rows[..., :6], lambda t: list(range(t + 1)), 0.3)
        for queries, rows in zip(arrays["queries"], arrays["keys"], strict=True)
    ]
    assert found.shape[3] == 6
    assert_right(found, expected)


def chosen(state: RetrievalState, queries: np.ndarray, weights: np.ndarray, index: np.ndarray):
    """Brute force, in float64: what token t reads. Of the tokens that it sees those with the highest scores, newer ones
    first among equals; or their blocks, the first one and its own before any other."""

    def scores(t: int) -> np.ndarray:
        products = queries[t].astype(np.float64) @ index[: t + 1].astype(np.float64).T
        return weights[t].astype(np.float64) @ np.maximum(products, 0)

    def tokens(t: int) -> list[int]:
        found = scores(t)
        return sorted(sorted(range(t + 1), key=lambda p: (-found[p], -p))[: state.num_selected])

    def blocks(t: int) -> list[int]:
        found, size = scores(t), state.index_block
        own = t // size
        best = [found[b * size : (b + 1) * size].max() for b in range(own + 1)]
        order = sorted(range(own + 1), key=lambda b: (b not in (0, own), -best[b], -b))
        read = set(order[: state.num_selected // size])
        return [p for p in range(t + 1) if p // size in read]

    return blocks if state.index_block else tokens


RETRIEVALS = [
    RetrievalState(2, 8, 6, index_dim=3, num_selected=num_selected, dtype="float32", index_block=block)
    for num_selected, block in ((4, 0), (1, 0), (6, 3), (8, 4), (4, 1), (6, 2))
]
RETRIEVED = drawn(
    {
        "queries": (4, 8),
        "keys": (2, 8),
        "values": (2, 6),
        "index": (1, 3),
        "index_queries": (2, 3),
        "index_weights": (1, 2),
    },
    whole_numbers=("index", "index_queries", "index_weights"),
)


def retrieved(view, chunk, at):
    asked = IndexQueries(chunk["index_queries"], chunk["index_weights"][:, :, 0])
    return view.attend(chunk["queries"], at, index_queries=asked)[0]


def expected_of_retrieval(state: RetrievalState) -> list[np.ndarray]:
    names = ("queries", "keys", "values", "index_queries", "index_weights", "index")
    return [
        attention(queries, keys, values, chosen(state, asked, weights[:, 0], index[:, 0]), 8**-0.5)
        for queries, keys, values, asked, weights, index in zip(*(RETRIEVED[name] for name in names), strict=True)
    ]


def test_scores_of_retrieval_are_often_equal():
    """Else the order among equals would not be tested: half of the scores or more are zero."""
    asked, weights, index = (RETRIEVED[name] for name in ("index_queries", "index_weights", "index"))
    scores = np.einsum("btj,btjs->bts", weights[:, :, 0], np.maximum(asked @ index.transpose(0, 2, 3, 1), 0))
    assert (scores == 0).mean() > 0.3


@pytest.mark.parametrize("state", RETRIEVALS, ids=lambda state: f"{state.num_selected}-{state.index_block}")
@pytest.mark.parametrize("memory", PLACES, ids=lambda m: f"page{m.page_size}-chunk{m.chunk_len}")
def test_retrieval_reads_what_scores_highest_and_the_newer_of_equals(memory, state):
    assert_right(through(state, memory, RETRIEVED, retrieved), expected_of_retrieval(state))


@pytest.mark.parametrize("state", RETRIEVALS, ids=lambda state: f"{state.num_selected}-{state.index_block}")
def test_retrieval_of_whole_sequences_selects_alike(state):
    (layer,) = whole([{"kv": state}], *RETRIEVED["queries"].shape[:2])
    view = layer["kv"].append(**{name: jnp.asarray(RETRIEVED[name]) for name in ("keys", "values", "index")})
    assert_right(np.asarray(retrieved(view, jax.tree.map(jnp.asarray, RETRIEVED), None)), expected_of_retrieval(state))


def test_what_a_memory_cannot_hold_is_refused_by_name():
    def refused(state: State, **fields) -> str:
        with pytest.raises(ConfigError) as caught:
            MemoryLayout.of([{"kv": state}], MemoryConfig(**fields), max_sequences=1, max_len=8)
        return str(caught.value)

    assert "memory.format = 'int4': " in refused(TokenState(1, 5, 5), format="int4")
    assert refused(TokenState(1, 5, 5), format="int4").endswith("legal: model, int8, fp8")
    assert refused(LatentState(6, 1), format="int4").endswith("legal: model, int8, fp8")
    assert refused(LatentState(6, 2), name="dense") == "memory.name = 'dense': cannot hold LatentState; legal: paged"
    with pytest.raises(ConfigError, match=r"format = 'int8.channel': must be one of model, int8, fp8, int4"):
        MemoryConfig(format="int8.channel")
    with pytest.raises(ValueError, match="whole page"):
        view_of(TokenState(1, 4, 4), "paged").check(TokenState(1, 4, 4).stored("int8.channel"))


def test_every_state_has_a_parallel_form():
    of_memories = {Statistics, SealedState}  # no mixer has one
    kinds = {kind for kind, _ in VIEWS} - of_memories
    assert kinds == {TokenState, LatentState, RetrievalState, RecurrentState}
    assert all((kind, "whole") in VIEWS for kind in kinds)
