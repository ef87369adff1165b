"""Parallel forward = chunked prefill = token-by-token decode, for every (mixer, memory, page size, chunking)."""

import dataclasses

import numpy as np
import pytest

from kvlab.ledger.ledger import Ledger
from kvlab.ledger.memory_states import SealedState, Statistics
from kvlab.memory.layout import MemoryConfig
from kvlab.memory.views import VIEWS
from kvlab.mixers import MIXERS
from tests import contracts
from tests.contracts import VARIANTS, WINDOW, assert_memory_equals_parallel, pairs_with, states_of

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


def _name(value: str | MemoryConfig) -> str:
    if isinstance(value, str):
        return value
    return f"{value.name}-page{value.page_size}-chunk{value.chunk_len}"


def test_every_registered_mixer_and_view_is_in_the_matrix():
    mixers = {layer.mixer for layers in VARIANTS.values() for layer in layers}
    assert mixers >= set(MIXERS)
    pairs = pairs_with(MEMORIES)
    covered = {(type(state), memory.name) for variant, memory in pairs for state in states_of(variant)}
    of_mixers = {(kind, memory) for kind, memory in VIEWS if kind not in (Statistics, SealedState)}
    assert covered | {(kind, "whole") for kind, _ in covered} == of_mixers


@pytest.mark.parametrize(("variant", "memory"), pairs_with(MEMORIES), ids=_name)
def test_memory_equals_parallel_form(variant, memory):
    assert_memory_equals_parallel(variant, memory, LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "memory"), pairs_with(EVERY_PAIR), ids=_name)
def test_memory_equals_parallel_form_for_every_pair(variant, memory):
    assert_memory_equals_parallel(variant, memory, LENGTHS)


@pytest.mark.parametrize(
    ("variant", "memory", "format"),
    [
        ("gqa", "paged", "int8"),
        ("hybrid", "paged", "int4"),
        ("window_sinks", "paged", "fp8"),
        ("latent", "paged", "int4"),
        ("retrieval", "paged", "int4"),
        ("gqa", "dense", "int8"),
    ],
)
def test_quantised_memory_equals_the_parallel_form_of_rounded_keys_and_values(variant, memory, format):
    assert_memory_equals_parallel(variant, MemoryConfig(memory, page_size=4, chunk_len=5, format=format), (3, 9, 17))


HALF = ("gqa", "window_sinks", "mamba2", "hybrid", "latent", "gated_deltanet", "kda", "based", "mamba3", "rglru")


@pytest.mark.parametrize("variant", [*HALF, "deltaproduct", "retnet", "retrieval", "sink_logits"])
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
