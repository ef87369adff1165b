"""The ledger's invariants under random operations, and its answers to impossible requests."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.ledger import NOWHERE, Ledger, Never, Plan, StateClass, Wait, stack
from kvlab.memory.spec import ArraySpec, RecurrentState, TokenState

FULL = TokenState(2, 4, 4)
WINDOWED = TokenState(2, 4, 4, window=5, num_sinks=2)
STATE = RecurrentState((ArraySpec("ssm", (3, 3), "float32"),))


def make_ledger(page_size=4, full_pages=9, window_pages=12, slots=3, max_len=24, chunk_len=6, recurrent=True) -> Ledger:
    classes = (
        StateClass("full", FULL, page_size, full_pages, 24, num_layers=2),
        StateClass("windowed", WINDOWED, page_size, window_pages, 24, num_layers=1),
        StateClass("state", STATE, 1, slots, 1, num_layers=3),
    )
    return Ledger(classes if recurrent else classes[:2], max_len, chunk_len)


class LedgerMachine(RuleBasedStateMachine):
    """Random reserve, commit and release against a shadow that only counts tokens and tags slots."""

    @initialize(page_size=st.sampled_from([1, 2, 4]), recurrent=st.booleans())
    def start(self, page_size, recurrent):
        self.recurrent = recurrent
        self.ledger = make_ledger(page_size, 40 // page_size, 40 // page_size, recurrent=recurrent)
        self.lengths: dict[int, int] = {}
        self.in_flight: dict[int, int] = {}
        self.next = 0
        # Tagged memory: who wrote each slot, as (sequence, position).
        self.tags = [{} for _ in self.ledger.classes]

    def _reserve(self, name, num_new):
        before = self.ledger.audit()
        plan = self.ledger.reserve(name, num_new)
        if isinstance(plan, Wait | Never):
            assert self.ledger.audit() == before
            return
        start = self.lengths.setdefault(name, 0)
        self.in_flight[name] = num_new
        for index, state in enumerate(self.ledger.classes):
            if not state.spec.per_token:
                continue
            one = plan.classes[index]
            readable = {}
            for page, first in zip(one.pages[0].tolist(), one.page_starts[0].tolist(), strict=True):
                if first != NOWHERE:
                    assert page != 0, "the null page is never listed"
                    readable |= {first + o: page * state.page_size + o for o in range(state.page_size)}
            for n in range(start, start + num_new):
                slot = int(one.write_slots[0, n - start])
                assert readable[n] == slot, "a token is written where the table says it is read"
                self.tags[index][slot] = (name, n)
            for n in range(start, start + num_new):
                for position in (p for live in state.spec.live(n) for p in live):
                    assert self.tags[index][readable[position]] == (name, position)

    @rule(num_new=st.integers(1, 6))
    def submit(self, num_new):
        self.next += 1
        self._reserve(self.next, num_new)

    @precondition(lambda self: set(self.lengths) - set(self.in_flight))
    @rule(data=st.data(), num_new=st.integers(1, 6))
    def grow(self, data, num_new):
        name = data.draw(st.sampled_from(sorted(set(self.lengths) - set(self.in_flight))))
        self._reserve(name, num_new)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def commit(self, data):
        name = data.draw(st.sampled_from(sorted(self.in_flight)))
        reserved = self.in_flight.pop(name)
        accepted = reserved if self.recurrent else data.draw(st.integers(0, reserved))
        self.ledger.commit(name, accepted)
        self.lengths[name] += accepted
        assert self.ledger.length(name) == self.lengths[name]

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.in_flight)))
        self.ledger.cancel(name)
        del self.in_flight[name]
        if not self.lengths[name]:
            del self.lengths[name]
            assert name not in self.ledger.sequences

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def release(self, data):
        name = data.draw(st.sampled_from(sorted(self.lengths)))
        self.ledger.release(name)
        del self.lengths[name]
        self.in_flight.pop(name, None)

    @invariant()
    def checks(self):
        if not hasattr(self, "ledger"):
            return
        self.ledger.check()
        for account, state in zip(self.ledger.audit(), self.ledger.classes, strict=True):
            if state.spec.per_token and not self.in_flight:
                tokens = sum(state.spec.live_len(n) for n in self.lengths.values())
                assert account.live == tokens * state.page_bytes // state.page_size

    def teardown(self):
        if hasattr(self, "ledger"):
            for name in self.ledger.sequences:
                self.ledger.release(name)
            for account in self.ledger.audit():
                assert account.free + account.null == account.pool


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_windowed_layers_free_what_leaves_the_window():
    ledger = make_ledger(page_size=2, full_pages=13, window_pages=8)
    for _ in range(24):
        assert isinstance(ledger.reserve("a", 1), Plan)
        ledger.commit("a", 1)
    full, windowed, _ = ledger.audit()
    assert full.allocated == 12 * full_page_bytes(ledger, 0)
    # live(24) = [0, 2) and [20, 24): pages 0, 10 and 11.
    assert windowed.allocated == 3 * full_page_bytes(ledger, 1)


def full_page_bytes(ledger, index):
    return ledger.classes[index].page_bytes


def test_never_names_the_arithmetic_and_changes_nothing():
    ledger = make_ledger(full_pages=3)
    assert isinstance(ledger.reserve("a", 6), Plan)
    ledger.commit("a", 6)
    answer = ledger.reserve("a", 6)
    assert isinstance(answer, Never)
    assert answer.reason == "full: tokens [0, 12) need 3 pages, the pool has 2"
    assert ledger.length("a") == 6
    ledger.release("a")
    too_long = make_ledger(max_len=5, full_pages=9).reserve("b", 6)
    assert isinstance(too_long, Never)
    assert "0 + 6 = 6 tokens exceed max_len = 5" in too_long.reason


def test_wait_when_others_hold_the_pages():
    ledger = make_ledger(full_pages=3)
    assert isinstance(ledger.reserve("a", 5), Plan)
    answer = ledger.reserve("b", 5)
    assert answer == Wait("full: 2 pages needed, 0 free")
    assert ledger.sequences == ("a",)


def test_a_step_that_does_not_fit_leaves_every_sequence_as_it_was():
    from tests.contracts import poisoned_session

    session = poisoned_session("hybrid", MemoryConfig(page_size=4, chunk_len=4), rows=2, max_len=12)
    session.advance({"a": [1, 2, 3]}, 4)
    before = session.ledger.audit()
    with pytest.raises(MemoryError, match="sequence 'c': ssm: 1 pages needed, 0 free"):
        session.advance({"a": [4], "b": [1, 2], "c": [1]}, 4)
    assert session.ledger.audit() == before
    assert session.ledger.sequences == ("a",)
    session.advance({"a": [4], "b": [1, 2]}, 4)


def test_misuse_is_refused():
    ledger = make_ledger()
    with pytest.raises(ValueError, match=r"num_new = 0: must be in \[1, 6\]"):
        ledger.reserve("a", 0)
    with pytest.raises(ValueError, match=r"num_new = 7"):
        ledger.reserve("a", 7)
    ledger.reserve("a", 2)
    with pytest.raises(ValueError, match="not committed"):
        ledger.reserve("a", 1)
    with pytest.raises(ValueError, match="num_accepted = 3"):
        ledger.commit("a", 3)
    with pytest.raises(
        ValueError, match="num_accepted = 1: must be all 2 reserved tokens, since state cannot be rolled"
    ):
        ledger.commit("a", 1)
    ledger.commit("a", 2)
    with pytest.raises(ValueError, match="num_accepted = 0"):
        ledger.commit("a", 0)
    ledger.release("a")
    with pytest.raises(KeyError):
        ledger.release("a")  # a double free


def test_stack_pads_to_reads_of_the_null_page_and_writes_nowhere():
    ledger = make_ledger()
    plan = ledger.reserve("a", 3)
    both = stack([plan], ledger.classes, 2, 4)
    full = both.classes[0]
    assert full.pages[1].tolist() == [0] * 24
    assert set(full.page_starts[1].tolist()) == {NOWHERE}
    outside = ledger.classes[0].num_pages * ledger.classes[0].page_size
    assert full.write_slots[1].tolist() == [outside] * 4
    assert full.write_slots[0, 3] == outside
    assert both.classes[2].pages[1, 0] == ledger.classes[2].num_pages
    assert all(leaf.dtype == np.int32 for one in both.classes for leaf in one)
    with pytest.raises(ValueError, match="do not fit"):
        stack([plan], ledger.classes, 2, 2)


def test_plans_are_deterministic():
    def plans():
        ledger = make_ledger()
        found = []
        for name in ("a", "b"):
            found.append(ledger.reserve(name, 5))
            ledger.commit(name, 5)
        ledger.release("a")
        found.append(ledger.reserve("c", 6))
        return found

    assert str(plans()) == str(plans())


def test_nowhere_is_the_kernels_nowhere():
    """Written twice because the ledger imports no JAX."""
    from pallas_kernels.paged_attention import NOWHERE as KERNELS_NOWHERE

    assert NOWHERE == KERNELS_NOWHERE


def test_the_ledger_imports_no_jax():
    import subprocess
    import sys

    code = "import kvlab.memory.ledger, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["paged", "dense"])
def test_a_pool_lets_every_sequence_grow_to_the_end(name):
    layers = [{"kv": FULL}, {"kv": WINDOWED, "conv": STATE}]
    memory = MemoryConfig(name=name, page_size=3, chunk_len=5)
    layout = MemoryLayout.of(layers, memory, max_sequences=3, max_len=23)
    ledger = layout.ledger()
    for chunk in (5, 5, 3, 1, 1, 5, 3):
        for sequence in range(3):
            assert isinstance(ledger.reserve(sequence, chunk), Plan)
            ledger.commit(sequence, chunk)
            ledger.check()
    dead = sum(account.dead for account in ledger.audit())
    reserved = sum(account.reserved for account in ledger.audit())
    assert (dead > 0) == (name == "dense") or name == "paged"
    assert reserved == 0
