"""Slots dealt to heads by their scores, in whole tiles: AdaKV against its definition, and attention over what was
dealt."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compression import Compression
from kvlab.ledger.readers import Readers
from kvlab.ledger.retention import Retention
from kvlab.ledger.states import LatentState, TokenState
from kvlab.memory.compacting import select
from kvlab.memory.dealing import deal, in_tiles, pack_tiles
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.views.dealt import attend_tiles, merged, parted
from kvlab.schema import ConfigError
from pallas_kernels.paged_attention import Lists, Pages, paged_attention
from pallas_kernels.visible import NOWHERE
from tests.compression.driven import PROMPT, ROWS, TOTAL, drive

PAGE = 4


def dealt(scores: np.ndarray, stored: int, keep: int, sinks: int, recent: int, safeguard: float) -> list[int]:
    """Slots of each head [K, N] by the definition, in float64: best K * keep of all, of which each head's protected
    tiles and its safeguard are certain; then whole tiles by largest remainder."""
    num_heads = len(scores)
    certain = max(max(1, -(-(sinks + recent) // PAGE)) * PAGE, int(safeguard * keep + 1e-6))
    rows = []
    for head in range(num_heads):
        free = [slot for slot in range(stored) if not (slot < sinks or slot >= stored - recent)]
        guarded = [slot for slot in range(stored - 1, -1, -1) if slot not in free]
        order = guarded + sorted(free, key=lambda slot: (-scores[head, slot], -slot))
        for place, slot in enumerate(order):
            score = 0.0 if slot in guarded else scores[head, slot]
            rows.append((place >= certain, slot in free, -score, -slot, head))
    counts = [0] * num_heads
    for row in sorted(rows)[: num_heads * keep]:
        counts[row[-1]] += 1
    tiles, rest = [count // PAGE for count in counts], [count % PAGE for count in counts]
    for head in sorted(range(num_heads), key=lambda head: (-rest[head], head))[: sum(rest) // PAGE]:
        tiles[head] += 1
    assert sum(tiles) == num_heads * keep // PAGE
    return [min(count * PAGE, stored) for count in tiles]


@pytest.mark.parametrize("seed", range(6))
def test_counts_are_adakvs_in_whole_tiles_and_their_sum_is_known(seed):
    rng = np.random.default_rng(seed)
    num_heads, num_slots = int(rng.integers(2, 6)), 28
    sinks, recent = (int(n) for n in rng.integers(0, 4, 2))
    stored, keep = np.array([23, 28, 9]), np.array([12, 16, 8])
    scores = rng.gamma(0.3, size=(3, num_heads, num_slots)) * rng.gamma(0.5, size=(3, num_heads, 1))
    scores = np.round(scores, 2)  # ties
    scores[:, :, 5] = np.nan
    places = np.arange(num_slots)
    valid = places < stored[:, None]
    protected = valid & ((places < sinks) | (places >= stored[:, None] - recent))
    arrays = (
        jnp.asarray(scores, jnp.float32),
        jnp.asarray(valid),
        jnp.asarray(protected),
        jnp.asarray(keep, jnp.int32),
    )
    found = np.asarray(deal(*arrays, PAGE, sinks + recent, 0.2))
    definite = np.where(np.isnan(scores), -np.inf, np.float32(scores))
    for row in range(3):
        assert found[row].tolist() == dealt(definite[row], stored[row], keep[row], sinks, recent, 0.2)
    assert len(np.unique(found[1])) > 1 or seed, "heads do get different counts"
    kept = np.asarray(select(*arrays[:3], jnp.asarray(found), num_slots))
    np.testing.assert_array_equal((kept < NOWHERE).sum(axis=2), found)
    for row, head in np.ndindex(3, num_heads):
        mine = kept[row, head, : found[row, head]]
        assert set(np.flatnonzero(protected[row])) <= set(mine)
        left = [slot for slot in range(stored[row]) if slot not in mine]
        chosen = [slot for slot in mine if not protected[row, slot]]
        if left and chosen:
            assert definite[row, head, left].max() <= definite[row, head, chosen].min()


def test_rounding_by_largest_remainder():
    counts = jnp.array([[7, 2, 3], [4, 8, 0], [6, 6, 12]], jnp.int32)
    assert np.asarray(in_tiles(counts, 4)).tolist() == [[2, 0, 1], [1, 2, 0], [2, 1, 3]]


def test_what_was_dealt_is_attended_to_where_it_lies():
    """Two sequences: of the first 3 pages were dealt, 2 tiles to head 0, 5 to head 1, 2 to head 2, of which head 1's
    last is not full; the second was never compacted. Then a page and a half of newer tokens. In float64."""
    rng, dim = np.random.default_rng(0), 4
    num_pages, num_heads = 12, 3
    source = rng.standard_normal((2, num_pages, num_heads, PAGE, dim)).astype(np.float32)
    counts = np.array([[8, 18, 8], [0, 0, 0]], np.int32)
    kept = np.full((2, num_heads, 20), NOWHERE, np.int32)
    for head in range(num_heads):
        kept[0, head, : counts[0, head]] = np.sort(rng.choice(19, counts[0, head], replace=False))
    pages, destinations = np.array([[3, 4, 5, 6, 7], [0] * 5]), np.array([[7, 2, 4], [num_pages] * 3])
    arrays = {"keys": jnp.asarray(source[0]), "values": jnp.asarray(source[1])}
    pool = pack_tiles(arrays, pages, destinations, jnp.asarray(kept), jnp.asarray(counts))
    untouched = [page for page in range(num_pages) if page not in destinations[0]]
    for name, before in arrays.items():
        np.testing.assert_array_equal(pool[name][jnp.asarray(untouched)], before[jnp.asarray(untouched)])

    table = jnp.array([[7, 2, 4, 9, 10], [1, 8, 11, 0, 0]], jnp.int32)
    starts = jnp.array([[0, 4, 8, 12, 16], [0, 4, 8, NOWHERE, NOWHERE]], jnp.int32)
    slots = np.array([18, 10])  # stored after the step, as the host counts them
    queries = rng.standard_normal((2, 2, 6, dim)).astype(np.float32)
    whole, tiles = parted(Lists(table, starts), jnp.asarray(counts), PAGE)
    everything = Pages(pool["keys"], pool["values"])
    options = {"scale": 0.6, "soft_cap": None}
    positions = jnp.asarray(slots[:, None] - 2 + np.arange(2), jnp.int32)
    newer = paged_attention(
        jnp.asarray(queries), everything, whole, positions, jnp.asarray(slots, jnp.int32), **options
    )
    state = TokenState(num_heads, dim, dim, readers=Readers(6, scale=0.6))
    older = attend_tiles(
        state, jnp.asarray(queries), everything, tiles, jnp.asarray(counts), jnp.array([2, 2], jnp.int32)
    )
    found = np.asarray(merged(newer[:2], older)[0])
    for row, token, head in np.ndindex(2, 2, 6):
        kv, end = head // 2, slots[row] - 1 + token
        seen = {"keys": [], "values": []}
        for index, name in enumerate(seen):
            flat = source[index][pages[row]].transpose(1, 0, 2, 3)[kv].reshape(-1, dim)
            seen[name] += [flat[slot] for slot in kept[row, kv, : counts[row, kv]]]
            first = 12 if row == 0 else 0
            for slot in range(first, end):
                seen[name].append(source[index][int(table[row, slot // PAGE]), kv, slot % PAGE])
        keys, values = (np.array(each, np.float64) for each in seen.values())
        weights = np.exp(0.6 * keys @ queries[row, token, head].astype(np.float64))
        np.testing.assert_allclose(found[row, token, head], weights @ values / weights.sum(), rtol=2e-5, atol=1e-5)


def test_counts_of_whole_pages():
    retention = Retention(fraction=0.5, protected=6, unit=4)
    assert [retention.keep(length) for length in (40, 37, 20, 10, 3)] == [20, 16, 8, 8, 8]
    assert Retention(slots=10, unit=4).keep(99) == 8


@dataclass(frozen=True)
class Skewed(Compression):
    """Later heads are worth more, later slots a little."""

    name: ClassVar[str] = "skewed"

    def score(self, slots):
        heads, places = (jnp.arange(size, dtype=jnp.float32) for size in slots.keys.shape[1:3])
        return jnp.broadcast_to(100 * heads[None, :, None] + places[None, None, :], slots.keys.shape[:3])


@pytest.mark.parametrize(
    ("variant", "method", "format", "counts"),
    [
        ("gqa", {"type": "knorm", "sinks": 1, "recent": 2, "heads": "ada", "safeguard": 0.0}, "int8", None),
        ("mha", Skewed(sinks=1, recent=2, heads="ada", safeguard=0.0), "model", [4, 4, 4, 20]),
        ("mha", Skewed(sinks=0, recent=0, heads="ada", safeguard=1.0), "model", [8, 8, 8, 8]),
    ],
)
def test_a_run_equals_the_parallel_form_under_each_heads_own_mask(variant, method, format, counts):
    """Of 9 slots asked 8 are held, two pages of 4, whatever each head has of them."""
    check, session = drive(variant, method, 9, format=format)
    assert check.worst < 1e-5
    (compacted,) = session.compacted
    found = (np.asarray(compacted.kept[0]["kv"])[:ROWS] < NOWHERE).sum(axis=2)
    assert (found == counts).all() if counts else len(np.unique(found)) > 1
    assert ((-(-found // 4)).sum(axis=1) == 2 * found.shape[1]).all()
    account = session.ledger.audit()[0]
    assert account.allocated == ROWS * (2 + -(-(TOTAL - PROMPT) // 4)) * session.layout.classes[0].page_bytes


def refused(given, state=None, budget=64):
    memory = MemoryConfig(page_size=16, compression={"heads": "ada", **given}, budget=budget)
    states = [{"kv": state or TokenState(2, 4, 4)}]
    with pytest.raises(ConfigError) as error:
        MemoryLayout.of(states, memory, max_sequences=1, max_len=256)
    return str(error.value)


def test_what_cannot_be_dealt_is_refused():
    assert "must be uniform with at = chunks" in refused({"type": "knorm", "at": "chunks"})
    assert "must be uniform with at = end, every = 4" in refused({"type": "knorm", "every": 4})
    assert "must be at least 16 slots with heads = ada: whole pages of 16" in refused({"type": "knorm"}, budget=15)
    with pytest.raises(ConfigError, match="heads"):
        MemoryConfig(compression={"type": "streaming", "heads": "ada"}, budget=8)
    memory = MemoryConfig(compression={"type": "knorm", "heads": "ada"}, budget=64)
    layout = MemoryLayout.of([{"kv": LatentState(4, 2)}], memory, max_sequences=1, max_len=256)
    assert [state.name for state in layout.classes] == ["kv"], "of a single head there is nothing to deal"
