"""Slots are not positions once something was compacted, and not every slot counts: views against float64, with NaN in
what must not be read."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.ledger.states import TokenState
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from pallas_kernels.visible import Visible

HEADS, DIM, PAGE = 2, 4, 4


class Memory:
    """One sequence of one layer, driven by hand; what it stores, in float64."""

    def __init__(self):
        state = TokenState(HEADS, DIM, DIM, visible=Visible())
        self.layout = MemoryLayout.of([{"kv": state}], MemoryConfig("paged", PAGE, 8), max_sequences=1, max_len=40)
        self.ledger, self.pools = self.layout.ledger(), self.layout.allocate(float("nan"))
        self.rng, self.kept = np.random.default_rng(0), np.zeros((2, 0, HEADS, DIM))

    def advance(self, count: int, valid: np.ndarray | None = None) -> None:
        """A step of `count` tokens, its outputs checked. `valid` [num_pages, page] says which slots count."""
        keys, values, queries = self.rng.standard_normal((3, 1, count, HEADS, DIM)).astype(np.float32)
        self.ledger.reserve("a", count)
        plan = self.ledger.plan(["a"], 1, count)
        if valid is not None:
            plan = plan._replace(classes=(plan.classes[0]._replace(valid=valid[None]),))
        (views,) = self.layout.views(self.pools, plan)
        view = views["kv"].append(keys=jnp.asarray(keys), values=jnp.asarray(values))
        positions = jnp.asarray(plan.starts)[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
        outputs = np.asarray(view.attend(jnp.asarray(queries), positions)[0])[0]
        self.pools = self.layout.pools([{"kv": view}])
        self.ledger.commit("a", count)
        self.kept = np.concatenate([self.kept, np.stack([keys[0], values[0]])], axis=1)
        counted = np.ones(self.kept.shape[1], bool) if valid is None else valid.reshape(-1)[: self.kept.shape[1]]
        for token in range(count):
            seen = np.flatnonzero(counted[: self.kept.shape[1] - count + token + 1])
            np.testing.assert_allclose(outputs[token], attended(queries[0, token], self.kept[:, seen]), atol=1e-5)

    def compact(self, chosen: list[int]) -> None:
        """Keeps these slots, packed by hand as the ledger says; whatever else the pool holds becomes NaN."""
        (found,) = self.ledger.compact({"a": {0: len(chosen)}}).classes
        pool, num_pages = self.pools[0]["kv"], self.layout.classes[0].num_pages
        for number, name in enumerate(("keys", "values")):
            old = np.asarray(pool[name])[found.pages[0]].transpose(0, 2, 1, 3).reshape(-1, HEADS, DIM)
            packed = np.full((len(found.destinations[0]) * PAGE, HEADS, DIM), np.nan, np.float32)
            packed[: len(chosen)] = old[chosen]
            new = np.full((num_pages, HEADS, PAGE, DIM), np.nan, np.float32)
            new[0] = 0
            for page, tile in zip(found.destinations[0], packed.reshape(-1, PAGE, HEADS, DIM), strict=True):
                if page < num_pages:
                    new[page] = tile.transpose(1, 0, 2)
            pool = pool | {name: jnp.asarray(new)}
            np.testing.assert_array_equal(old[chosen], self.kept[number, chosen].astype(np.float32))
        self.pools, self.kept = ({"kv": pool},), self.kept[:, chosen]


def attended(query: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Softmax attention of one query [H, D] over keys and values [2, S, H, D], in float64."""
    scores = np.einsum("hd,shd->hs", query.astype(np.float64), stored[0]) / DIM**0.5
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hs,shd->hd", weights / weights.sum(axis=1, keepdims=True), stored[1])


@pytest.mark.parametrize("chosen", [[0, 3, 4, 9, 12], [1, 2, 5, 6, 7, 8, 10, 11], [12]])
def test_a_compacted_sequence_goes_on_behind_its_slots(chosen):
    """Chunks and single tokens, across pages; the length stays that of the tokens."""
    memory = Memory()
    for count in (8, 5):
        memory.advance(count)
    memory.compact(chosen)
    assert list(memory.ledger.stored("a").values()) == [len(chosen)]
    for count in (1, 5, 1, 4):
        memory.advance(count)
    assert memory.ledger.length("a") == 13 + 11


def test_slots_that_do_not_count_are_not_read():
    memory = Memory()
    memory.advance(8)
    holes = np.ones((memory.layout.classes[0].table_len, PAGE), bool)
    holes.reshape(-1)[[0, 2, 3, 7]] = False
    for count in (1, 3):
        memory.advance(count, holes)
