"""Parallel forward = chunked prefill = token-by-token decode, for every (mixer, memory, page size, chunking)."""

import dataclasses

import numpy as np
import pytest

from kvlab.ledger.ledger import Ledger
from kvlab.memory.layout import MemoryConfig
from tests import contracts
from tests.contracts import VARIANTS, WINDOW, assert_memory_equals_parallel

LENGTHS = (1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 7, 8, 9, 17)
"""kB - 1, kB, kB + 1 for pages of 4 and 8; w - 1, w, w + 1; and one longer than everything."""

MEMORIES = [
    *(MemoryConfig(name="paged", page_size=page, chunk_len=chunk) for page, chunk in ((1, 5), (4, 1), (4, 5), (8, 17))),
    MemoryConfig(name="dense", chunk_len=1),
    MemoryConfig(name="dense", chunk_len=5),
]
EVERY_PAIR = [
    *(MemoryConfig(name="paged", page_size=page, chunk_len=chunk) for page in (1, 3, 4, 16) for chunk in (1, 2, 7, 16)),
    *(MemoryConfig(name="dense", chunk_len=chunk) for chunk in (2, 7, 17)),
]


def _name(memory: MemoryConfig) -> str:
    return f"{memory.name}-page{memory.page_size}-chunk{memory.chunk_len}"


@pytest.mark.parametrize("memory", MEMORIES, ids=_name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_equals_parallel_form(variant, memory):
    assert_memory_equals_parallel(variant, memory, LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("memory", EVERY_PAIR, ids=_name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_equals_parallel_form_for_every_pair(variant, memory):
    assert_memory_equals_parallel(variant, memory, LENGTHS)


@pytest.mark.parametrize("variant", ["gqa", "window_sinks", "mamba2", "hybrid"])
def test_bfloat16_memory_equals_parallel_form(variant):
    memory = MemoryConfig(name="paged", page_size=4, chunk_len=5)
    assert_memory_equals_parallel(variant, memory, (9, 17), dtype="bfloat16")


def test_the_contract_fails_for_a_table_off_by_one_page(monkeypatch):
    right = Ledger.plan

    def wrong(self, *arguments):
        plan = right(self, *arguments)
        shifted = [c._replace(pages=np.where(c.page_starts == 0, c.pages % 3 + 1, c.pages)) for c in plan.classes]
        return plan._replace(classes=tuple(shifted))

    monkeypatch.setattr(Ledger, "plan", wrong)
    with pytest.raises(AssertionError):
        assert_memory_equals_parallel("gqa", MemoryConfig(page_size=4, chunk_len=5), (9, 17))


def test_the_contract_fails_for_a_window_off_by_one(monkeypatch):
    layer = VARIANTS["window"][0]
    wider = dataclasses.replace(layer, config=dataclasses.replace(layer.config, window=WINDOW + 1))
    monkeypatch.setitem(VARIANTS, "window_wider", [wider])
    right = contracts.parallel_logits
    monkeypatch.setattr(contracts, "parallel_logits", lambda _, *rest: right("window_wider", *rest))
    with pytest.raises(AssertionError):
        assert_memory_equals_parallel("window", MemoryConfig(page_size=4, chunk_len=5), (17,))


def test_the_contract_fails_for_a_state_that_is_not_reset(monkeypatch):
    from kvlab.memory.views.slots import StateSlots

    monkeypatch.setattr(
        StateSlots, "read", lambda self: {name: array[self.plan.pages[:, 0]] for name, array in self.pool.items()}
    )
    with pytest.raises(AssertionError):
        assert_memory_equals_parallel("mamba2", MemoryConfig(page_size=4, chunk_len=5), (9, 17))
