"""Where every byte is, by hand: accounts, counters and tables."""

import pandas as pd
import pytest

from kvlab.ledger.accounting import PARTS, as_table
from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from tests.ledger.small import FULL, WINDOWED, grow, make_ledger


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
