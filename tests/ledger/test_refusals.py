"""What a ledger refuses, and that a refusal changes nothing: Never, Wait and misuse."""

import random

import numpy as np
import pytest

from kvlab.ledger.answers import Never, Ready, Wait
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import Lengths, StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.store import Store
from kvlab.memory.layout import MemoryConfig
from tests.ledger.small import FULL, STATE, WINDOWED, grow, make_ledger


def test_never_names_the_arithmetic_and_changes_nothing():
    ledger = make_ledger(full_pages=3)
    grow(ledger, "a", 6)
    answer = ledger.reserve("a", 6)
    assert answer == Never("full: 12 tokens need 3 pages (4 tokens a page, steps of up to 6), the pool has 2")
    assert ledger.length("a") == 6
    ledger.release("a")
    too_long = make_ledger(max_len=5).reserve("b", 6)
    assert too_long == Never("6 tokens exceed max_len = 5")


def test_a_wait_that_nobody_can_end_is_never():
    """Alone in the pool, there is nobody to wait for: all but the null page is its own, or there is no second slot."""
    ledger = make_ledger(page_size=1, full_pages=7, window_pages=30, chunk_len=6)
    grow(ledger, "a", 6)
    assert isinstance(ledger.reserve("a", 1), Never)
    single = make_ledger(slots=1)
    grow(single, "a", 4)
    assert single.reserve("a", 1, lookahead=2) == Never(
        "state: a step that may be rejected needs 2 slots, the pool has 1"
    )
    assert single.reserve("a", 1) == Ready()
    single.commit("a", 1)
    single.fork("a", "b")
    assert single.reserve("a", 1) == Wait("state: 1 page needed, 0 free or cached")


def test_what_cannot_fit_in_the_end_is_refused_at_the_beginning():
    """Admission and sizing use one definition, so that no request runs until it is stuck."""
    ledger = make_ledger(full_pages=4)
    assert isinstance(ledger.reserve("a", 4, lengths=Lengths(4, 13)), Never)
    assert ledger.reserve("a", 4, lengths=Lengths(4, 12)) == Ready()
    assert ledger.never(12) is None
    ledger.commit("a", 4)
    grow(ledger, "a", 8)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_not_never_runs_alone_to_its_end(seed):
    """Bounded progress: whatever was not refused finishes, in any chunks, in a pool that is just large enough."""
    rng = random.Random(seed)
    for _ in range(20):
        pages, slots = [rng.randrange(2, 9) for _ in range(2)], rng.randrange(1, 3)
        ledger = make_ledger(
            rng.choice([1, 2, 4]),
            *pages,
            slots,
            max_len=24,
            checkpoints=Checkpoints(rng.choice(["all", "none", "junctions"])),
        )
        total = rng.randrange(1, 25)
        if ledger.never(total):
            continue
        hit, done = ledger.lookup(list(range(total))), 0
        while done < total:
            count = rng.randrange(1, min(6, total - done) + 1)
            assert ledger.reserve("a", count, hit=None if done else hit) == Ready()
            ledger.commit("a", count)
            done += count
        ledger.check()


def test_wait_when_others_hold_the_pages():
    ledger = make_ledger(full_pages=3)
    ledger.reserve("a", 5)
    assert ledger.reserve("b", 5) == Wait("full: 2 pages needed, 0 free or cached")
    assert ledger.sequences == ("a",)


def test_a_step_that_does_not_fit_leaves_every_sequence_as_it_was():
    from tests.contracts import poisoned_session

    session = poisoned_session("hybrid", MemoryConfig(page_size=4, chunk_len=4), rows=2, max_len=12)
    session.advance({"a": [1, 2, 3]}, 4)
    before = session.ledger.audit()
    with pytest.raises(MemoryError, match="sequence 'c': ssm: 1 page needed, 0 free or cached"):
        session.advance({"a": [4], "b": [1, 2], "c": [1]}, 4)
    assert session.ledger.audit() == before
    assert session.ledger.sequences == ("a",)
    session.advance({"a": [4], "b": [1, 2]}, 4)


def test_an_allocation_that_fails_in_the_middle_changes_nothing(monkeypatch):
    """The n-th page cannot be had, for all n: whatever was taken goes back."""
    for fail_at in range(1, 6):
        ledger = make_ledger(page_size=2, full_pages=20, window_pages=20)
        grow(ledger, "a", 4)
        before, calls, take = ledger.audit(), [], Store.take

        def failing(self, calls=calls, take=take, fail_at=fail_at):
            calls.append(self)
            if len(calls) == fail_at:
                raise RuntimeError("the n-th page")
            return take(self)

        monkeypatch.setattr(Store, "take", failing)
        with pytest.raises(RuntimeError, match="the n-th page"):
            ledger.reserve("b", 6)
        monkeypatch.setattr(Store, "take", take)
        ledger.check()
        assert ledger.audit() == before
        assert ledger.sequences == ("a",)
        assert ledger.reserve("b", 6) == Ready()


def test_misuse_is_refused_and_changes_nothing():
    ledger = make_ledger(host=9)
    cases = [
        (lambda: ledger.reserve("a", 0), r"num_new = 0, lookahead = 0: num_new must be at least 1"),
        (lambda: ledger.reserve("a", -3), "num_new = -3"),
        (lambda: ledger.reserve("a", 7), "at most 6"),
        (lambda: ledger.reserve("a", 3, 4), "num_new = 3, lookahead = 4"),
        (lambda: ledger.reserve("a", 1, -1), "lookahead = -1"),
        (lambda: ledger.evict("fool", 1), r"evict\('fool', 1\): .* full, windowed, state"),
        (lambda: ledger.evict("full", -1), "at least 0 pages"),
    ]
    in_flight = [
        (lambda: ledger.reserve("a", 1), "'a': its step of 2 tokens is not committed"),
        (lambda: ledger.fork("a", "b"), "'a': its step of 2 tokens is not committed"),
        (lambda: ledger.swap_out("a"), "'a': its step of 2 tokens is not committed"),
        (lambda: ledger.commit("a", 3), r"num_accepted = 3: must be in \[0, 2\]"),
        (lambda: ledger.commit("a", -1), "num_accepted = -1"),
    ]
    settled = [
        (lambda: ledger.commit("a", 0), r"num_accepted = 0: must be in \[0, 0\]"),
        (lambda: ledger.cancel("a"), "'a': no step is in flight"),
        (lambda: ledger.plan(["a"], 1, 1), "'a': no step is reserved"),
        (lambda: ledger.fork("a", "a"), "'a': the name is in use"),
        (lambda: ledger.reserve("a", 1, hit=ledger.lookup([1])), "hit and lengths belong to its first step"),
    ]

    def all_refused(rows):
        for call, message in rows:
            before = ledger.audit()
            with pytest.raises(ValueError, match=message):
                call()
            ledger.check()
            assert ledger.audit() == before

    all_refused(cases)
    ledger.reserve("a", 2)
    all_refused(in_flight)
    ledger.commit("a", 2)
    all_refused(settled)
    ledger.reserve("a", 2)
    with pytest.raises(
        ValueError, match="num_accepted = 1: must be all 2 reserved tokens, since state cannot be rolled"
    ):
        ledger.commit("a", 1)
    ledger.cancel("a")
    ledger.release("a")
    for call in (ledger.release, ledger.commit, ledger.cancel, ledger.length, ledger.swap_out):
        with pytest.raises(KeyError, match="'a': holds nothing"):  # a double free, and its kin
            call("a", *([1] if call == ledger.commit else []))
    with pytest.raises(KeyError, match="is not swapped out"):
        ledger.swap_in("a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Ledger([StateClass("a", FULL, 4, 9, 9)], 0, 1),
            "max_len = 0, chunk_len = 1, page_size = 16: all must be integers",
        ),
        (
            lambda: Ledger([StateClass("a", FULL, 4, 99, 4)], 64, 8),
            "a: table_len = 4: must be at least 16 for max_len = 64",
        ),
        (lambda: Ledger([StateClass("a", FULL, 4, 9, 9)] * 2, 8, 2), "each with its own name"),
        (lambda: StateClass("a", STATE, 16, 9, 1), "page_size = 16, table_len = 1: must be 1 and 1"),
        (lambda: StateClass("a", FULL, 4.5, 9, 9), "page_size = 4.5"),
        (
            lambda: Ledger([StateClass("a", FULL, 4, 9, 9), StateClass("b", WINDOWED, 2, 9, 9)], 8, 2),
            r"page_size = \[2, 4\]",
        ),
        (lambda: StateClass("a", FULL, 0, 9, 9), "a: page_size = 0: must be at least 1"),
        (lambda: StateClass("a", FULL, 4, 1, 9), "a: num_pages = 1: must be at least 2, the null page counted"),
        (lambda: StateClass("a", STATE, 1, 0, 1), "a: num_pages = 0: must be at least 1"),
        (lambda: StateClass("a", FULL, 4, 9, 9, num_layers=-1), "num_layers = -1"),
        (lambda: StateClass("a", FULL, 4, 9, 9, reservation="maxx"), r"reservation = 'maxx': did you mean max"),
        (lambda: StateClass("a", STATE, 1, 9, 1, reservation="max"), "recurrent states take none"),
    ],
)
def test_impossible_pools_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_counts_are_integers():
    """numpy's become Python's, so that nothing wraps around; others are refused."""
    classes = [StateClass("full", FULL, 4, 300, 150), StateClass("state", STATE, 1, 3, 1)]
    ledger = Ledger(classes, 600, 255)
    for _ in range(2):
        ledger.reserve("a", np.uint8(200))
        ledger.commit("a", np.uint8(200))
    assert ledger.length("a") == 400
    assert type(ledger.length("a")) is int
    for bad in (1.0, float("nan"), "1", None):
        with pytest.raises(TypeError):
            ledger.reserve("a", bad)
    ledger.reserve("a", 2)
    with pytest.raises(TypeError):
        ledger.commit("a", 1.5)
    ledger.commit("a", 2)
    ledger.check()
    with pytest.raises(ValueError, match=r"lengths = \(9, 3\)"):
        ledger.reserve("b", 1, lengths=Lengths(9, 3))


def test_a_sequence_is_in_a_step_once():
    ledger = make_ledger()
    ledger.reserve("a", 2)
    with pytest.raises(ValueError, match="each may be in a step once"):
        ledger.plan(["a", "a"], 2, 2)


def test_a_refused_hit_is_what_it_was():
    ledger = make_ledger()
    hit = ledger.lookup(list(range(9)))
    assert isinstance(ledger.reserve("a", 4, hit=hit, lengths=Lengths(9, 99)), Never)
    assert all(holding.lengths is None for holding in hit.holdings)
    assert hit in ledger.hits
