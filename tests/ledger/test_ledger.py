"""The ledger's answers, one behaviour a test; `test_machine` drives all of them at random."""

import random
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from kvlab.ledger.accounting import PARTS, as_table
from kvlab.ledger.answers import Never, Ready, Wait
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import Lengths, StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import load_plans, save_plans
from kvlab.ledger.states import ArraySpec, RecurrentState, TokenState
from kvlab.ledger.store import Store
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from pallas_kernels.visible import NOWHERE, Visible

FULL = TokenState(2, 4, 4)
WINDOWED = TokenState(2, 4, 4, visible=Visible(window=5, num_sinks=2))
STATE = RecurrentState((ArraySpec("ssm", (3, 3), "float32"),))


def make_ledger(
    page_size=4, full_pages=9, window_pages=12, slots=3, max_len=24, chunk_len=6, recurrent=True, host=0, **options
) -> Ledger:
    classes = (
        StateClass("full", FULL, page_size, full_pages, 24, num_layers=2, num_host_pages=host),
        StateClass("windowed", WINDOWED, page_size, window_pages, 24, num_layers=1, num_host_pages=host),
        StateClass("state", STATE, 1, slots, 1, num_layers=3, num_host_pages=host),
    )
    return Ledger(classes if recurrent else classes[:2], max_len, chunk_len, page_size=page_size, **options)


def grow(ledger: Ledger, name, count: int, step: int | None = None) -> None:
    """Reserves and commits `count` tokens."""
    for start in range(0, count, step or ledger.chunk_len):
        num_new = min(step or ledger.chunk_len, count - start)
        assert ledger.reserve(name, num_new) == Ready()
        ledger.commit(name, num_new)
        ledger.check()


def test_windowed_layers_free_what_leaves_the_window():
    ledger = make_ledger(page_size=2, full_pages=13, window_pages=8)
    grow(ledger, "a", 24, step=1)
    full, windowed, _ = ledger.audit()
    assert full.allocated == 12 * ledger.classes[0].page_bytes
    # live(24) = [0, 2) and [20, 24): pages 0, 10 and 11.
    assert windowed.allocated == 3 * ledger.classes[1].page_bytes


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
    assert single.reserve("a", 1) == Wait("state: 1 pages needed, 0 free or cached")


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
    with pytest.raises(MemoryError, match="sequence 'c': ssm: 1 pages needed, 0 free or cached"):
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


def test_a_shared_page_is_copied_by_whoever_writes_it_and_kept_by_the_last():
    """A page with two holders is never written: while the copier's step is in flight it holds the source as well."""
    ledger = make_ledger(recurrent=False)
    grow(ledger, "a", 6)
    ledger.fork("a", "b")
    ledger.check()
    shared = dict(ledger.running["a"].holdings[0].pages)
    ledger.reserve("a", 1)
    copies = ledger.plan(["a"], 2, 1).classes[0].copies
    assert copies.tolist() == [[shared[1], ledger.running["a"].holdings[0].pages[1]]]
    ledger.commit("a", 1)
    ledger.reserve("b", 1)
    assert ledger.running["b"].holdings[0].pages == shared
    assert ledger.plan(["b"], 2, 1).has_copies is False
    ledger.commit("b", 1)
    ledger.reserve("a", 1)
    assert ledger.plan(["a"], 2, 1).has_copies is False, "copied once"
    ledger.check()


def test_a_cancelled_copy_gives_the_shared_page_back():
    ledger = make_ledger(recurrent=False)
    grow(ledger, "a", 6)
    ledger.fork("a", "b")
    before = ledger.audit()
    ledger.reserve("a", 1)
    ledger.check()
    ledger.cancel("a")
    ledger.check()
    assert ledger.audit() == before


def test_a_cancelled_copy_never_lets_two_write_one_page():
    """The soak's find: writing in place beside a copy in flight is wrong once the copier cancels and comes back."""
    ledger = make_ledger(recurrent=False)
    grow(ledger, "a", 6)
    ledger.fork("a", "b")
    ledger.reserve("a", 1)
    ledger.reserve("b", 1)
    ledger.commit("b", 1)
    ledger.cancel("a")
    for name in "ba":
        ledger.reserve(name, 1)
        slot = int(ledger.plan([name], 1, 1).classes[0].write_slots[0, 0])
        assert ledger.stores[0].refs[slot // 4] == 1
        ledger.check()


def test_a_first_step_is_accepted_whole_or_not_at_all_beside_a_state():
    ledger = make_ledger()
    ledger.reserve("a", 6, hit=ledger.lookup(list(range(9))))
    with pytest.raises(ValueError, match="num_accepted = 4: must be all 6 reserved tokens"):
        ledger.commit("a", 4)
    ledger.commit("a", 0)
    ledger.check()
    assert ledger.length("a") == 0


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


def test_looking_alone_is_neither_a_hit_nor_a_use():
    ledger = make_ledger(full_pages=20, window_pages=20)
    ledger.reserve("a", 4, hit=ledger.lookup(list(range(9))))
    ledger.commit("a", 4)
    for _ in range(500):
        ledger.unpin(ledger.lookup(list(range(9))))
    assert ledger.counters.hit_tokens == 0
    assert all(page.uses == 1 for page in ledger.index.cached[0].values())
    ledger.release("a")
    for _ in range(500):
        ledger.unpin(ledger.lookup(list(range(9))))
    assert ledger.counters.hit_tokens == 0


def test_a_prefix_that_is_found_again_and_again_costs_no_memory():
    """Each hit that is let go queues its pages for eviction anew; the entries of before are swept."""
    ledger, prompt = make_ledger(full_pages=20, window_pages=20, recurrent=False), list(range(9))
    ledger.reserve("a", 6, hit=ledger.lookup(prompt))
    ledger.commit("a", 6)
    ledger.release("a")
    ledger.unpin(hit := ledger.lookup(prompt))
    assert hit.length == 4
    tracemalloc.start()
    for _ in range(5_000):
        ledger.unpin(ledger.lookup(prompt))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 400_000


def test_a_rejected_recurrent_step_leaves_the_old_state_where_it_was():
    ledger = make_ledger()
    grow(ledger, "a", 4)
    slot = ledger.running["a"].holdings[2].pages[0]
    ledger.reserve("a", 1, lookahead=3)
    plan = ledger.plan(["a"], 1, 4).classes[2]
    assert plan.pages.tolist() == [[slot]]
    assert plan.write_slots[0, 0] != slot
    with pytest.raises(ValueError, match="num_accepted = 2: must be 0 or all 4 reserved tokens"):
        ledger.commit("a", 2)
    ledger.commit("a", 0)
    ledger.check()
    assert ledger.running["a"].holdings[2].pages == {0: slot}
    assert ledger.length("a") == 4


def test_a_rejection_names_the_first_state_that_cannot_roll_back():
    states = [StateClass(name, STATE, 1, 4, 1) for name in ("first", "second")]
    ledger = Ledger(states, 9, 9)
    grow(ledger, "a", 2)
    ledger.reserve("a", 3)
    with pytest.raises(ValueError, match="since first cannot be rolled back"):
        ledger.commit("a", 2)


def test_lookahead_slots_are_accounted_and_given_back():
    ledger = make_ledger(recurrent=False)
    grow(ledger, "a", 4)
    ledger.reserve("a", 1, lookahead=5)
    full = ledger.audit()[0]
    slot = FULL.unit_bytes * 2
    assert (full.live, full.lookahead, full.tail) == (4 * slot, 5 * slot, 3 * slot)
    ledger.commit("a", 2)
    full = ledger.audit()[0]
    assert (full.live, full.lookahead, full.tail) == (6 * slot, 0, 2 * slot)
    ledger.reserve("a", 3, lookahead=2)
    full = ledger.audit()[0]
    assert (full.live, full.lookahead, full.tail) == (6 * slot, 2 * slot, 4 * slot)


def test_swapping_frees_the_device_and_brings_the_same_pages_back():
    ledger = make_ledger(host=4, full_pages=4)
    grow(ledger, "a", 9)
    out = ledger.swap_out("a")
    assert [len(pages) for pages in out.classes] == [3, 3, 1]
    assert all(account.allocated == 0 for account in ledger.audit())
    assert (ledger.sequences, list(ledger.suspended), ledger.length("a")) == ((), ["a"], 9)
    with pytest.raises(ValueError, match="'a': is swapped out"):
        ledger.reserve("a", 1)
    grow(ledger, "b", 9)
    assert ledger.swap_in("a") == Wait("full: 3 pages needed, 0 free or cached")
    assert ledger.swap_out("b") == Wait("full: 3 host pages needed, 1 free")
    ledger.release("b")
    back = ledger.swap_in("a")
    for there, here in zip(out.classes, back.classes, strict=True):
        assert there[:, 1].tolist() == here[:, 1].tolist()
    ledger.check()
    grow(ledger, "a", 1)
    ledger.swap_out("a")
    ledger.release("a")
    ledger.check()


def test_a_kept_state_is_given_up_before_its_own_sequence_must_wait():
    """One slot only: the checkpoint shares it with the sequence, which goes on in place."""
    ledger = make_ledger(slots=1, checkpoints=Checkpoints("all"))
    ledger.reserve("a", 4, hit=ledger.lookup(list(range(9))))
    ledger.commit("a", 4)
    assert ledger.index.cached[2]
    assert ledger.reserve("a", 4) == Ready()
    ledger.check()
    assert not ledger.index.cached[2]


def test_pages_computed_twice_are_given_up_for_the_first():
    ledger = make_ledger(recurrent=False, window_pages=20, full_pages=20)
    prompt = list(range(9))
    for name in ("a", "b"):
        ledger.reserve(name, 6, hit=ledger.lookup(prompt))
    for name in ("a", "b"):
        ledger.commit(name, 6)
    ledger.check()
    assert [account.duplicate for account in ledger.audit()] == [0, 0]
    assert ledger.counters.deduplicated_pages == 2
    assert ledger.running["a"].holdings[0].pages[0] == ledger.running["b"].holdings[0].pages[0]


@pytest.mark.parametrize("reservation", [None, "max"])
@pytest.mark.parametrize("format", ["model", "int8", "int4.channel"])
@pytest.mark.parametrize("spec", [FULL, WINDOWED])
def test_logical_bytes_are_what_the_state_states(spec, format, reservation):
    held = spec.stored(format)
    state = StateClass("kv", held, 4, 24, 6, num_layers=2, reservation=reservation)
    ledger = Ledger((state,), 24, 6, page_size=4)
    for name, count in (("a", 19), ("b", 3)):
        grow(ledger, name, count)
    (account,) = ledger.audit()
    assert account.logical == sum(2 * held.logical_bytes(count, 4) for count in (19, 3))
    assert (account.live_scale > 0) == (format != "model")
    assert account.live_scale <= account.scale


def test_accounts_add_up_in_sums_tables_and_frames():
    ledger = make_ledger(page_size=2, full_pages=20, window_pages=20)
    for name, count in (("a", 9), ("b", 5)):
        grow(ledger, name, count)
    ledger.fork("a", "c")
    accounts = ledger.audit()
    total = accounts[0] + accounts[1] + accounts[2]
    assert total.balanced
    assert all(type(value) is int for account in accounts for value in list(account.as_dict().values())[1:])
    frame = pd.DataFrame([account.as_dict() for account in accounts])
    assert (frame[list(PARTS)].sum(axis=1) == frame["pool"]).all()
    assert frame["pool"].sum() == total.pool == sum(state.pool_bytes for state in ledger.classes)
    assert (
        frame["shared"].sum()
        == total.shared
        == sum(len(ledger.running["a"].holdings[i].pages) * state.page_bytes for i, state in enumerate(ledger.classes))
    )
    text = as_table(accounts)
    assert "full" in text
    assert "lookahead" not in text, "rows that are zero everywhere are left out"
    assert f"{accounts[0].live:,}" in text
    assert str(accounts[0]).splitlines()[1].split() == ["pool", f"{accounts[0].pool:,}", "100.0%"]


def test_counters_start_at_nothing_and_count():
    ledger = make_ledger(host=9, full_pages=20, window_pages=20)
    assert vars(ledger.counters) == {
        "looked_up_tokens": 0,
        "hit_tokens": 0,
        "deduplicated_pages": 0,
        "swapped_pages": 0,
        "dropped_slots": 0,
        "peak_bytes": 0,
        "peak_pages": [0, 0, 0],
    }
    ledger.reserve("a", 6, hit=ledger.lookup(list(range(9))))
    ledger.commit("a", 6)
    ledger.swap_out("a")
    ledger.swap_in("a")
    assert ledger.counters.looked_up_tokens == 9
    # Two pages of each token class and one state go. The published page of each comes back from the index.
    assert ledger.counters.swapped_pages == 5 + 3
    assert ledger.counters.peak_pages == [2, 2, 1]


def test_stranded_bytes_and_the_pool_for_all():
    ledger = make_ledger(full_pages=3, recurrent=False)
    grow(ledger, "a", 6)
    full, windowed = ledger.audit()
    assert windowed.free > 0
    assert (full.stranded, windowed.stranded) == (0, windowed.free)  # no page of `full` is left: nobody else can begin
    ledger.release("a")
    grow(ledger, "b", 1)
    assert all(account.stranded == 0 for account in ledger.audit())
    peaks = ledger.counters
    split = sum(n * state.page_bytes for n, state in zip(peaks.peak_pages, ledger.classes, strict=True))
    assert peaks.peak_bytes == split == 2 * ledger.classes[0].page_bytes + 2 * ledger.classes[1].page_bytes


def test_a_plan_pads_to_reads_of_the_null_page_and_writes_nowhere():
    ledger = make_ledger()
    ledger.reserve("a", 3)
    both = ledger.plan(["a"], 2, 4)
    full = both.classes[0]
    assert full.pages[1].tolist() == [0] * 24
    assert set(full.page_starts[1].tolist()) == {NOWHERE}
    outside = ledger.classes[0].num_pages * ledger.classes[0].page_size
    assert full.write_slots[1].tolist() == [outside] * 4
    assert full.write_slots[0, 3] == outside
    assert both.classes[2].pages[1, 0] == both.classes[2].write_slots[1, 0] == ledger.classes[2].num_pages
    assert all(leaf.dtype == np.int32 for step in both.classes for leaf in step[:-1])
    with pytest.raises(ValueError, match=r"1 steps of 3 tokens do not fit \[2, 2\]"):
        ledger.plan(["a"], 2, 2)


def test_saved_plans_come_back_and_nothing_else_does(tmp_path):
    ledger = make_ledger(recurrent=False)
    grow(ledger, "a", 6)
    ledger.fork("a", "b")
    for name in "ab":
        ledger.reserve(name, 1)
    plans = [ledger.plan(["a", "b"], 2, 1), ledger.plan(["b"], 1, 3)]
    save_plans(tmp_path / "plans.npz", plans)
    for saved, plan in zip(load_plans(tmp_path / "plans.npz"), plans, strict=True):
        np.testing.assert_equal(saved, plan)
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    with pytest.raises(ValueError, match=r"other\.npz: x is float64, not int32: not a file of plans"):
        load_plans(tmp_path / "other.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "plans.npz").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cut\.npz: not a file of plans"):
        load_plans(tmp_path / "cut.npz")
    with np.load(tmp_path / "plans.npz") as stored:
        arrays = {name: stored[name] for name in stored.files if name != "1/0/copies"}
    np.savez(tmp_path / "less.npz", **arrays)
    with pytest.raises(ValueError, match="step 1 lacks copies"):
        load_plans(tmp_path / "less.npz")


def test_nowhere_is_the_kernels_nowhere():
    """Written twice because the ledger imports no JAX."""
    from pallas_kernels.paged_attention import NOWHERE as KERNELS_NOWHERE

    assert NOWHERE == KERNELS_NOWHERE


def test_the_ledger_imports_no_jax():
    import subprocess
    import sys

    code = "import kvlab.ledger.ledger, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["paged", "dense"])
def test_a_pool_lets_every_sequence_grow_to_the_end(name):
    layers = [{"kv": FULL}, {"kv": WINDOWED, "conv": STATE}]
    memory = MemoryConfig(name=name, page_size=3, chunk_len=5)
    layout = MemoryLayout.of(layers, memory, max_sequences=3, max_len=23)
    ledger = layout.ledger()
    for chunk in (5, 5, 3, 1, 1, 5, 3):
        for sequence in range(3):
            assert ledger.reserve(sequence, chunk) == Ready()
            ledger.commit(sequence, chunk)
            ledger.check()
    assert (sum(account.dead for account in ledger.audit()) > 0) == (name == "dense") or name == "paged"
    assert sum(account.reserved for account in ledger.audit()) == 0
