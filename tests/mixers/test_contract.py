"""Parallel forward = chunked prefill = token-by-token decode, for every (mixer, memory, page size, chunking)."""

import numpy as np
import pytest

from kvlab.memory.layout import MemoryConfig
from tests import contracts
from tests.contracts import VARIANTS, WINDOW, assert_memory_equals_parallel

LENGTHS = (1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 7, 8, 9, 17)
"""kB - 1, kB, kB + 1 for pages of 4 and 8; w - 1, w, w + 1; and one longer than everything."""


@pytest.mark.parametrize("chunk_len", [1, 5, 16])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_paged_memory_equals_parallel_form(variant, page_size, chunk_len):
    memory = MemoryConfig(name="paged", page_size=page_size, chunk_len=chunk_len)
    assert_memory_equals_parallel(VARIANTS[variant], memory, LENGTHS, chunk_len=chunk_len)


@pytest.mark.parametrize("chunk_len", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_memory_equals_parallel_form(variant, chunk_len):
    memory = MemoryConfig(name="dense", chunk_len=chunk_len)
    assert_memory_equals_parallel(VARIANTS[variant], memory, LENGTHS, chunk_len=chunk_len)


@pytest.mark.parametrize("variant", ["gqa", "window_sinks", "mamba2", "hybrid"])
def test_bfloat16_memory_equals_parallel_form(variant):
    memory = MemoryConfig(name="paged", page_size=4, chunk_len=5)
    assert_memory_equals_parallel(VARIANTS[variant], memory, (9, 17), chunk_len=5, dtype="bfloat16", atol=0.25)


def test_the_contract_fails_for_a_cache_off_by_one_page(monkeypatch):
    """The contract must be able to fail: a table that lists a neighbour's page is noticed."""
    import kvlab.memory.ledger as ledger_module

    right = ledger_module.Ledger._plan

    def wrong(self, held, num_new):
        plan = right(self, held, num_new)
        shifted = [one._replace(pages=np.where(one.page_starts == 0, one.pages % 3 + 1, one.pages)) for one in plan.classes]
        return plan._replace(classes=tuple(shifted))

    monkeypatch.setattr(ledger_module.Ledger, "_plan", wrong)
    memory = MemoryConfig(name="paged", page_size=4, chunk_len=5)
    with pytest.raises(AssertionError):
        assert_memory_equals_parallel(VARIANTS["gqa"], memory, (9, 17), chunk_len=5)


def test_the_contract_fails_when_a_window_is_forgotten(monkeypatch):
    """A windowed layer that attends to one token more is noticed."""
    right = contracts.parallel_logits
    wider = [layer.__class__(layer.mixer, layer.config.__class__(**{**vars(layer.config), "window": WINDOW + 1}))
             for layer in VARIANTS["window"]]
    _, structure, _ = contracts.build(wider)
    monkeypatch.setattr(contracts, "parallel_logits", lambda _, params, tokens: right(structure, params, tokens))
    memory = MemoryConfig(name="paged", page_size=4, chunk_len=5)
    with pytest.raises(AssertionError):
        assert_memory_equals_parallel(VARIANTS["window"], memory, (17,), chunk_len=5)
