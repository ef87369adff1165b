"""Every score against what its paper says, in a few lines of float64 numpy, slot by slot and head by head."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compression import COMPRESSIONS, Attended, Shape, Slots
from kvlab.compression.budget import Budget
from kvlab.compression.static import Random
from kvlab.ledger.readers import Readers, Rotary
from kvlab.ledger.states import TokenState
from kvlab.rotary import rotary_angles, rotate
from tests.compression.harness import SCORED, passes

BATCH, KV_HEADS, GROUP, DIM, WIDTH = 2, 2, 2, 8, 64
HEADS = KV_HEADS * GROUP
STORED = (53, 38)
ROTARY = Rotary(6, 100.0)
BEHIND = Rotary(4, 100.0, start=3)
"""As in latent rows, whose last numbers are turned."""


def turned(x, positions, rotary=ROTARY):
    """The rotation in float64, number by number: (i, i + dim / 2) turn together."""
    if rotary is None:
        return x
    half, start = rotary.dim // 2, rotary.start
    angles = np.asarray(positions, np.float64)[..., None] * rotary.base ** (-np.arange(half) * 2.0 / rotary.dim)
    one, other = slice(start, start + half), slice(start + half, start + 2 * half)
    first, second = x[..., one].copy(), x[..., other].copy()
    x = np.array(x)
    x[..., one] = first * np.cos(angles) - second * np.sin(angles)
    x[..., other] = second * np.cos(angles) + first * np.sin(angles)
    return x


def softmax(x, axis=-1):
    weights = np.exp(x - x.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


@pytest.fixture(scope="module", params=["rotary", "cap without rotary"])
def case(request):
    """Two sequences, as `case_of` makes them."""
    return case_of(Readers(HEADS, rotary=ROTARY) if request.param == "rotary" else Readers(HEADS, soft_cap=2.0))


def case_of(readers):
    """Two sequences: all their queries, keys and values in float64, and how they are read."""
    rng, rows = np.random.default_rng(0), []
    for stored in STORED:
        plain = rng.standard_normal((stored, HEADS, DIM)) + rng.standard_normal((1, HEADS, DIM))
        keys = rng.standard_normal((KV_HEADS, stored, DIM)) * 1.5
        keys[:, stored // 2] = keys[:, 3] * 1.01  # two that are all but the same
        values = rng.standard_normal((KV_HEADS, stored, DIM)) * rng.uniform(0.3, 3, (1, stored, 1))
        queries = turned(plain, np.arange(stored)[:, None], readers.rotary) * DIM**-0.5
        rows.append(SimpleNamespace(plain=plain * DIM**-0.5, queries=queries, keys=keys, values=values, stored=stored))
    return SimpleNamespace(rows=rows, readers=readers)


def weights_of(row, readers, cap=True):
    """[T, H, S] causal softmax weights of every query."""
    keys = np.repeat(row.keys, GROUP, axis=0)
    scores = np.einsum("thd,hsd->ths", row.queries, keys)
    if readers.soft_cap and cap:
        scores = readers.soft_cap * np.tanh(scores / readers.soft_cap)
    seen = np.tril(np.ones((row.stored, row.stored), bool))[:, None]
    return softmax(np.where(seen, scores, -np.inf))


def scored(method, case, steps=(7, 1, 30, 15)):
    """The method's score of both sequences after it has observed them in steps; the shorter one ends before."""
    padded = {name: np.zeros((BATCH, KV_HEADS, WIDTH, DIM), np.float32) for name in ("keys", "values")}
    for index, row in enumerate(case.rows):
        padded["keys"][index, :, : row.stored], padded["values"][index, :, : row.stored] = row.keys, row.values
    stored = jnp.asarray(STORED, jnp.int32)
    state = TokenState(KV_HEADS, DIM, DIM, readers=case.readers)
    arrays = method.statistics(state, Shape(Budget(slots=16), WIDTH, 16, 0, 1))
    noted = {array.name: jnp.zeros((BATCH, *array.shape), array.dtype) for array in arrays}
    start = 0
    for width in steps if arrays else ():
        seen = _step(case, start, width)
        noted = jax.jit(lambda noted, seen=seen: method.observe(noted, seen))(noted)
        start += width
    slots = Slots(
        jnp.asarray(padded["keys"]),
        jnp.asarray(padded["values"]),
        stored,
        stored,
        noted,
        case.readers,
        jnp.arange(BATCH, dtype=jnp.int32),
        0,
    )
    found = np.asarray(jax.jit(lambda: method.score(slots))())
    return [found[index, :, : row.stored] for index, row in enumerate(case.rows)]


def _step(case, start, width):
    """What attention shows of `width` tokens: rows that end before are padded with noise."""
    queries = np.full((BATCH, width, HEADS, DIM), 99.0, np.float32)
    weights = np.zeros((BATCH, width, HEADS, WIDTH), np.float32)
    real = np.zeros((BATCH, width), bool)
    for index, row in enumerate(case.rows):
        count = min(max(row.stored - start, 0), width)
        queries[index, :count] = row.queries[start : start + count]
        weights[index, :count, :, : row.stored] = weights_of(row, case.readers)[start : start + count]
        weights[index, count:] = 7.0
        real[index, :count] = True
    places = jnp.broadcast_to(start + jnp.arange(width, dtype=jnp.int32)[None, :], (BATCH, width))
    arrays = jnp.asarray(queries), places, places, jnp.asarray(real)
    return Attended(*arrays, lambda: jnp.asarray(weights), case.readers)


def by_kv_head(per_query_head):
    """[H, S] to [K, S], by mean."""
    return per_query_head.reshape(KV_HEADS, GROUP, -1).mean(axis=1)


def snapkv(row, readers, window=6, pool=5):
    weights = weights_of(row, readers)[-window:].mean(axis=0)[:, : row.stored - window]
    padded = np.pad(weights, ((0, 0), (pool // 2, pool // 2)))
    means = np.stack([padded[:, j : j + pool].mean(axis=1) for j in range(row.stored - window)], axis=1)
    return by_kv_head(means)


def h2o(row, readers, by_readers=True):
    weights = weights_of(row, readers).sum(axis=0)
    return by_kv_head(weights / np.arange(row.stored, 0, -1) if by_readers else weights)


def tova(row, readers):
    return np.broadcast_to(weights_of(row, readers)[-1].mean(axis=0), (KV_HEADS, row.stored))


def keydiff(row, readers):
    unit = row.keys / np.linalg.norm(row.keys, axis=-1, keepdims=True)
    anchor = unit.mean(axis=1, keepdims=True)
    return -(row.keys * anchor).sum(-1) / np.linalg.norm(row.keys, axis=-1) / np.linalg.norm(anchor, axis=-1)


def lagkv(row, readers, sinks=4, lag=8, across=False):
    score, parts = np.ones((KV_HEADS, row.stored)), (row.stored - sinks) // lag
    for head in range(KV_HEADS):
        for part in range(parts - 1):
            here = slice(sinks + part * lag, sinks + (part + 1) * lag)
            after = slice(here.stop, here.stop + lag)
            found = 0
            for array in (row.keys[head], row.values[head]):
                low, high = array[after].min(axis=0), array[after].max(axis=0)
                found = found + softmax(((array[here] - low) / (high - low)).std(axis=1, ddof=1)) / 2
            score[head, here] = found if across else np.argsort(np.argsort(found)) / lag
    return score


def expected(row, readers, sinks=4, future=32, covariance=True, values=True, epsilon=0.0):
    mean_turn = np.mean(
        [[turned(unit, n, readers.rotary) for unit in np.eye(DIM)] for n in range(row.stored, row.stored + future)],
        axis=0,
    ).T
    score = np.zeros((HEADS, row.stored - sinks))
    for head in range(HEADS):
        queries, keys = row.plain[sinks:, head], row.keys[head // GROUP, sinks:]
        mean, spread = mean_turn @ queries.mean(axis=0), mean_turn @ np.cov(queries.T, bias=True) @ mean_turn.T
        exponent = keys @ mean + covariance * np.einsum("nd,de,ne->n", keys, spread, keys) / 2
        score[head] = softmax(exponent)
    score = by_kv_head(score)
    return (score + epsilon) * np.linalg.norm(row.values[:, sinks:], axis=-1) if values else score


def rkv(row, readers, window=6, pool=3, weight=0.3, threshold=0.5):
    score = np.zeros((KV_HEADS, row.stored))
    for head in range(KV_HEADS):
        products = np.einsum("tgd,sd->gts", row.queries[-window:, head * GROUP :][:, :GROUP], row.keys[head])
        if readers.soft_cap:
            products = readers.soft_cap * np.tanh(products / readers.soft_cap)
        importance = softmax(products.max(axis=0)[:, : row.stored - window]).mean(axis=0)
        padded = np.pad(importance, pool // 2)
        importance = np.array([padded[j : j + pool].max() for j in range(len(importance))])
        unit = row.keys[head] / np.linalg.norm(row.keys[head], axis=1, keepdims=True)
        cosines = unit @ unit.T
        for j in range(row.stored):
            cosines[j, j] = 0
            similar = np.flatnonzero(cosines[j] > threshold)
            if len(similar):
                cosines[j, similar[-1]] = 0
        redundant = softmax(cosines.mean(axis=0))[: row.stored - window]
        score[head, : row.stored - window] = weight * importance - (1 - weight) * redundant
    return score


ROWS = [
    ("knorm", {}, lambda row, _: -np.linalg.norm(row.keys, axis=-1), 0, 0),
    ("knorm", {"keep": "long"}, lambda row, _: np.linalg.norm(row.keys, axis=-1), 0, 0),
    ("recency", {}, lambda row, _: np.broadcast_to(np.arange(row.stored), (KV_HEADS, row.stored)), 0, 0),
    ("snapkv", {"window": 6, "recent": 6}, snapkv, 0, 6),
    ("snapkv", {"window": 6, "recent": 6, "pool": 1}, lambda *case: snapkv(*case, pool=1), 0, 6),
    ("h2o", {}, h2o, 0, 0),
    ("h2o", {"by_readers": False}, lambda *case: h2o(*case, by_readers=False), 0, 0),
    ("tova", {}, tova, 0, 0),
    ("keydiff", {}, keydiff, 0, 0),
    ("lagkv", {"lag": 8}, lagkv, 0, 0),
    ("lagkv", {"lag": 8, "across": True}, lambda *case: lagkv(*case, across=True), 0, 0),
    ("expected", {"future": 32}, expected, 4, 0),
    ("expected", {"future": 32, "epsilon": 0.1}, lambda *case: expected(*case, epsilon=0.1), 4, 0),
    ("expected", {"future": 32, "covariance": False, "values": False},
     lambda *case: expected(*case, covariance=False, values=False), 4, 0),
    ("rkv", {"window": 6, "pool": 3, "weight": 0.3}, rkv, 0, 6),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields", "reference", "first", "last"), ROWS, ids=[f"{row[0]} {row[1]}" for row in ROWS]
)
def test_a_score_is_the_papers(case, name, fields, reference, first, last):
    """To float32's rounding; slots that are protected anyway (the first, the last) are not compared."""
    method = COMPRESSIONS[name].build(fields)
    for row, found in zip(case.rows, scored(method, case), strict=True):
        wanted = reference(row, case.readers)
        compared = found[:, first : row.stored - last]
        wanted = wanted[:, : compared.shape[1]]
        np.testing.assert_allclose(compared, wanted, rtol=2e-5, atol=2e-6 * np.abs(wanted).max())


def test_expected_attention_where_the_last_numbers_are_turned():
    """Latent rows: the queries' distribution is that of absorbed ones, and only their rotary part is turned back."""
    case = case_of(Readers(HEADS, rotary=BEHIND))
    for row, found in zip(case.rows, scored(COMPRESSIONS["expected"].build({"future": 32}), case), strict=True):
        np.testing.assert_allclose(found[:, 4:], expected(row, case.readers), rtol=2e-5, atol=2e-6)


def test_every_method_has_a_reference():
    """Random draws have none, `test_contract` says what must hold of them; methods that read on behind the prompt have
    theirs in `test_second_pass`."""
    assert {row[0] for row in ROWS} == {name for name in SCORED if name != "random" and not passes(name)}


def test_the_rotation_of_the_references_is_the_models():
    x = np.random.default_rng(3).standard_normal((1, 5, 1, DIM))
    cos, sin = rotary_angles(jnp.arange(5, dtype=jnp.int32)[None], ROTARY.dim, ROTARY.base)
    np.testing.assert_allclose(
        rotate(jnp.asarray(x, jnp.float32), cos, sin)[0], turned(x[0], np.arange(5)[:, None]), atol=1e-5
    )


def test_statistics_are_counted_bytes():
    """METHODS: window * H * D for the last queries, D + D * D a head for their distribution, two numbers a slot."""
    state = TokenState(KV_HEADS, DIM, DIM, readers=Readers(HEADS))
    shape = Shape(Budget(slots=16), WIDTH, 16, 0, 1)

    def num_bytes(name, **fields):
        return sum(array.num_bytes for array in COMPRESSIONS[name].build(fields).statistics(state, shape))

    assert num_bytes("snapkv", window=6, recent=6) == 4 * (6 * HEADS * DIM + 1)
    assert num_bytes("tova") == 4 * (HEADS * DIM + 1)
    assert num_bytes("expected") == 4 * (HEADS * (DIM + DIM * DIM) + 1)
    assert num_bytes("h2o") == 4 * 2 * WIDTH * KV_HEADS
    assert num_bytes("keydiff") == num_bytes("lagkv") == num_bytes("knorm") == 0


def test_a_random_draw_does_not_hang_on_the_slots_that_pages_have():
    def drawn(num_slots, share):
        empty, count = jnp.zeros((2, 3, num_slots, DIM)), jnp.array([8, 10])
        slots = Slots(empty, empty, count, count, {}, None, jnp.array([4, 7]), 1)
        return np.asarray(Random(share=share).score(slots))

    for share in ("head", "layer"):
        few, more = drawn(12, share), drawn(20, share)
        np.testing.assert_array_equal(few, more[:, :, :12])
        assert len(np.unique(few)) == few.size / (1 if share == "head" else 3)
