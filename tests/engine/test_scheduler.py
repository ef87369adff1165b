"""The scheduler without a device."""

from kvlab.engine.scheduler import Entry, Scheduler, Work
from kvlab.ledger.classes import Lengths
from tests.ledger.test_prefix import MODELS, make


def two_that_decode(num_pages):
    """Two sequences of the same three tokens in pages of 4, and the scheduler that runs them."""
    ledger = make(MODELS["full"], num_pages=num_pages, max_len=12, chunk_len=4)
    scheduler = Scheduler(ledger)
    for name in ("a", "b"):
        scheduler.submit(Entry(name, 3, 8, prompt=[1, 2, 3]))
    for work in scheduler.schedule():
        ledger.commit(work.entry.name, work.num_new)
        work.entry.num_computed, work.entry.num_known = 3, 4
    return ledger, scheduler


def decode(ledger, scheduler, token):
    """One step as the engine makes it: what is committed while the device works is not published yet."""
    work = scheduler.schedule()
    assert work == [Work(one, 1, 0) for one in scheduler.running]
    assert all(ledger.commit_each([one.entry.name for one in work], [token] * len(work)))
    for one in work:
        one.entry.num_computed, one.entry.num_known = one.entry.num_known, one.entry.num_known + 1
    return work


def test_looking_ahead_publishes_nothing_though_that_would_free_a_page():
    """Three usable pages, all held, two of them by the same tokens: the next step fits once that is found out, which is when the
    step on the device has turned out finite, and not before."""
    ledger, scheduler = two_that_decode(num_pages=4)
    decode(ledger, scheduler, 7)
    ledger.reserve("c", 1, lengths=Lengths(1, 1))
    assert ledger.stores[0].num_available == 0
    assert scheduler.look_ahead() is None
    assert not ledger.index.cached[0]
    assert not any(ledger.running[name].num_new for name in "ab")
    assert len(scheduler.schedule()) == 1, "room for one more page was found, and then none"
    ledger.check()


def test_the_step_ahead_is_given_out_as_it_is_or_less_who_left_or_not_at_all():
    ledger, scheduler = two_that_decode(num_pages=20)
    decode(ledger, scheduler, 7)
    ahead = scheduler.look_ahead()
    assert scheduler.schedule() is ahead
    for name in "ab":
        ledger.cancel(name)
    ahead = scheduler.look_ahead()
    first, second = scheduler.running
    scheduler.remove(first)
    assert scheduler.schedule() == [second.decoding]
    ledger.cancel("b")
    assert scheduler.look_ahead() == [second.decoding]
    scheduler.submit(Entry("c", 3, 8, prompt=[4, 5, 6]))
    work = scheduler.schedule()
    assert [(one.entry.name, one.num_new) for one in work] == [("b", 1), ("c", 3)]
    ledger.check()


def test_nobody_looks_beyond_the_end():
    ledger, scheduler = two_that_decode(num_pages=20)
    for token in (7, 8, 9, 10, 11):
        decode(ledger, scheduler, token)
    assert [one.num_computed for one in scheduler.running] == [8, 8] == [one.final_len for one in scheduler.running]
    assert scheduler.look_ahead() is None
