"""What is read on behind the prompt decides what stays: KVzip and the oracle, against weights in float64."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compression import COMPRESSIONS
from kvlab.compression.base import Attended, Slots
from kvlab.compression.second_pass import KVzip, Oracle
from kvlab.ledger.readers import Readers
from kvlab.ledger.states import TokenState
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.schema import ConfigError
from tests.compression.driven import PROMPT, ROWS, TOTAL, drive, kept_by, tokens_of, true_weights
from tests.contracts import build


def seen(weights: np.ndarray, real: np.ndarray) -> Attended:
    num_tokens = weights.shape[1]
    nothing = jnp.zeros(weights.shape[:2], jnp.int32)
    queries = jnp.zeros((len(weights), num_tokens, weights.shape[2], 4))
    return Attended(queries, nothing, nothing, jnp.asarray(real), lambda: jnp.asarray(weights, jnp.float32))


def test_the_score_is_the_most_that_any_query_of_the_pass_gives():
    """[B 2, T 3, H 4, S 9] on 2 KV heads; padded queries count for nothing, whatever they weigh."""
    rng, method = np.random.default_rng(0), KVzip()
    first, second = rng.uniform(size=(2, 2, 3, 4, 9))
    real = np.array([[True, True, True], [True, False, False]])
    noted = {"attention": jnp.zeros((2, 7, 2))}
    for weights in (first, second):
        noted = method.listen(noted, seen(weights, real))
    assert method.observe(noted, seen(first + 9, real)) is noted, "the prompt's own queries have no say"
    expected = np.zeros((2, 2, 9))
    for row, token, head, slot in np.ndindex(2, 3, 4, 9):
        if real[row, token]:
            most = max(first[row, token, head, slot], second[row, token, head, slot])
            expected[row, head // 2, slot] = max(expected[row, head // 2, slot], most)
    expected[:, :, 7:] = 0
    slots = Slots(jnp.zeros((2, 2, 9, 4)), jnp.zeros((2, 2, 9, 4)), jnp.array([9, 9]), None, noted, None, None, 0)
    np.testing.assert_allclose(method.score(slots), expected, rtol=1e-6)
    shared = replace(method, share="layer").score(slots)
    np.testing.assert_allclose(shared, np.repeat(expected.mean(axis=1, keepdims=True), 2, axis=1), rtol=1e-6)


def test_a_long_prompt_is_repeated_in_pieces_and_each_says_where_it_begins():
    prompt = list(range(100, 110))
    method = KVzip(repeat_len=4, anchor=2, prefix=(7,))
    assert list(method.pieces(prompt, None)) == [
        [7, 100, 101, 102, 103],
        [7, 102, 103, 104, 105, 106, 107],
        [7, 106, 107, 108, 109],
    ]
    assert max(map(len, method.pieces(prompt, None))) == method.second_pass(20, 10).num_read
    assert method.second_pass(20) == (7, 27)
    assert list(replace(method, repeat_len=10).pieces(prompt, None)) == [[7, *prompt]]
    assert replace(method, repeat_len=10).second_pass(20, 10) == (11, 21)
    assert replace(method, repeat_len=1, anchor=8).second_pass(20, 10).num_read == 3


def test_an_oracle_must_know_what_follows():
    assert list(Oracle().pieces([1, 2], [3, 4])) == [[3, 4]]
    assert list(Oracle().pieces([1, 2], [])) == []
    with pytest.raises(ValueError, match="must know the tokens that follow"):
        next(Oracle().pieces([1, 2], None))
    assert Oracle().second_pass(20, 12) == (8, 20)
    assert Oracle().second_pass(20) == (19, 20)


@pytest.mark.parametrize("field", ["at", "every"])
@pytest.mark.parametrize("name", ["kvzip", "oracle", "streaming", "duo"])
def test_what_has_no_meaning_cannot_be_asked(name, field):
    wrong = {"at": "chunks", "every": 4}[field]
    given = {"streaming": [[0]]} if name == "duo" else {}
    with pytest.raises(ConfigError, match=field):
        COMPRESSIONS[name].build({field: wrong} | given)


@pytest.mark.parametrize(
    ("method", "words"),
    [({"type": "kvzip"}, "reads on behind a prompt"), ({"type": "knorm", "heads": "ada"}, "must compact once")],
)
def test_sealed_pages_are_refused(method, words):
    def layout() -> MemoryLayout:
        memory = MemoryConfig(compression=method, budget=64, format="kivi4")
        state = TokenState(2, 32, 32, readers=Readers(4))
        return MemoryLayout.of([{"kv": state}], memory, max_sequences=1, max_len=256)

    with pytest.raises(ConfigError, match=words):
        layout()


def expected_sets(weights: np.ndarray, budget: int, sinks: int, recent: int, *, shared: bool = False) -> np.ndarray:
    """[B, K, budget] the protected slots, and the best of the others by the largest weight [B, K, G, pass, prompt]."""
    scores = weights.max(axis=(2, 3))
    if shared:
        scores = np.repeat(scores.mean(axis=1, keepdims=True), scores.shape[1], axis=1)
    scores[:, :, :sinks], scores[:, :, scores.shape[2] - recent :] = 2, 2
    return np.sort(np.argsort(-scores, axis=2, kind="stable")[:, :, :budget], axis=2)


@pytest.mark.parametrize("variant", ["gqa", "norms_cap_bias", "hybrid"])
def test_kvzip_keeps_what_repeating_the_prompt_attends_to(variant):
    check, session = drive(variant, {"type": "kvzip", "sinks": 2, "recent": 1}, 9)
    assert check.worst < 1e-5
    prompt = tokens_of()[:, :PROMPT]
    (weights,) = true_weights(variant, np.concatenate([prompt, prompt], axis=1))[-1:]
    expected = expected_sets(weights[:, :, :, PROMPT:, :PROMPT], 9, 2, 1)
    for row, kept in kept_by(session, len(session.layout.states) - 1).items():
        np.testing.assert_array_equal(kept, expected[row])
    assert len(session.compacted) == ROWS, "a sequence at a time"
    assert len(session.ledger.sequences) == ROWS
    session.release_all()
    assert all(len(store.free) == store.state.num_usable for store in session.ledger.stores)


def test_kvzip_in_pieces_keeps_the_best_of_all_pieces():
    method = KVzip(sinks=0, repeat_len=9, anchor=3, prefix=(1, 2))
    check, session = drive("gqa", method.plain(), 7)
    assert check.worst < 1e-5
    prompt, scores = tokens_of()[:, :PROMPT], []
    for index in range(3):
        pieces = [list(method.pieces(row.tolist(), None))[index] for row in prompt]
        (weights,) = true_weights("gqa", np.concatenate([prompt, pieces], axis=1))
        scores.append(weights[:, :, :, PROMPT:, :PROMPT])
    expected = expected_sets(np.concatenate(scores, axis=3), 7, 0, 0)
    for row, kept in kept_by(session, 0).items():
        np.testing.assert_array_equal(kept, expected[row])


@pytest.mark.parametrize("share", ["head", "layer"])
def test_the_oracle_keeps_what_really_follows_attends_to(share):
    check, session = drive("gqa", {"type": "oracle", "sinks": 1, "recent": 2, "share": share}, 8)
    assert check.worst < 1e-5
    (weights,) = true_weights("gqa", tokens_of())
    expected = expected_sets(weights[:, :, :, PROMPT:, :PROMPT], 8, 1, 2, shared=share == "layer")
    for row, kept in kept_by(session, 0).items():
        np.testing.assert_array_equal(kept, expected[row])


def test_a_pass_leaves_nothing_behind_and_its_pages_are_in_the_pool():
    model, *_ = build("gqa")
    sizes = {"max_sequences": ROWS, "max_len": TOTAL}

    def layout_of(compression, **options):
        method = {"type": compression} if isinstance(compression, str) else compression
        memory = MemoryConfig(
            page_size=4, chunk_len=5, compression=method | {"sinks": 2, "recent": 2}, budget=9, **options
        )
        return MemoryLayout.of(model.states(), memory, **sizes, prompt_len=PROMPT)

    plain, zipped, piecewise = map(layout_of, ("h2o", "kvzip", {"type": "kvzip", "repeat_len": 8, "anchor": 2}))
    assert zipped.classes[0].num_pages - plain.classes[0].num_pages == -(-PROMPT // 4) + 1
    assert piecewise.classes[0].num_pages - plain.classes[0].num_pages == -(-10 // 4) + 1
    assert zipped.classes[1].num_pages == ROWS + 1, "and a slot for the fork's statistics"
    assert (plain.pass_len, zipped.pass_len, piecewise.pass_len) == (TOTAL, 2 * PROMPT, PROMPT + 10)
