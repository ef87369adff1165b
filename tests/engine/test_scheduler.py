"""The scheduler without a device."""

from kvlab.engine.entries import Entry, Step, Work
from kvlab.engine.scheduler import Scheduler
from kvlab.ledger.classes import Lengths
from tests.ledger.test_prefix import MODELS, make


def two_that_decode(num_pages):
    """Two sequences of the same three tokens in pages of 4, and the scheduler that runs them."""
    ledger = make(MODELS["full"], num_pages=num_pages, max_len=12, chunk_len=4)
    scheduler = Scheduler(ledger)
    for name in ("a", "b"):
        scheduler.submit(Entry(name, 3, 8, ids=[1, 2, 3], indexed=True))
    for entry, num_new, _ in scheduler.schedule().work:
        ledger.commit(entry.name, num_new)
        entry.num_computed, entry.num_known = 3, 4
    return ledger, scheduler


def commit(ledger, work, token):
    """As the engine does while the device works: what is committed is not published yet."""
    assert all(ledger.commit_each([part.entry.name for part in work], [token] * len(work)))
    for entry, _, _ in work:
        entry.num_computed, entry.num_known = entry.num_known, entry.num_known + 1


def decode(ledger, scheduler, token):
    """A step in which everybody decodes."""
    step = scheduler.schedule()
    assert step == Step([Work(entry, 1, 0) for entry in scheduler.running])
    commit(ledger, step.work, token)


def test_scheduling_ahead_publishes_nothing_though_that_would_free_a_page():
    """Three usable pages, all held, two of them by the same tokens: the next step fits once that is found out, which is
    when the step on the device has turned out finite, and not before."""
    ledger, scheduler = two_that_decode(num_pages=4)
    decode(ledger, scheduler, 7)
    ledger.reserve("c", 1, lengths=Lengths(1, 1))
    assert ledger.stores[0].num_available == 0
    assert scheduler.schedule_ahead() is None
    assert not ledger.index.cached[0]
    assert not any(ledger.running[name].num_new for name in "ab")
    assert len(scheduler.schedule().work) == 1, "room for one more page was found, and then none"
    ledger.check()


def test_the_step_behind_is_reserved_for_everybody_and_nobody_comes_in_before_it():
    ledger, scheduler = two_that_decode(num_pages=20)
    decode(ledger, scheduler, 7)
    behind = scheduler.schedule_ahead()
    assert behind == [Work(entry, 1, 0) for entry in scheduler.running]
    first, second = scheduler.running
    scheduler.remove(first)  # the step before turned out to end it, while the one behind is under way
    ledger.check()
    commit(ledger, behind[1:], 8)
    scheduler.submit(Entry("c", 3, 8, ids=[4, 5, 6], indexed=True))
    assert scheduler.schedule_ahead() is None, "somebody waits and there is room"
    work = scheduler.schedule().work
    assert [(part.entry.name, part.num_new) for part in work] == [(second.name, 1), ("c", 3)]
    ledger.check()


def test_who_is_rejected_and_who_moves_is_part_of_the_step():
    ledger = make(MODELS["full"], num_pages=4, max_len=12, chunk_len=4)
    scheduler = Scheduler(ledger)
    for name, final_len in (("fits", 8), ("never", 13)):
        scheduler.submit(Entry(name, 3, final_len))
    step = scheduler.schedule()
    assert [part.entry.name for part in step.work] == ["fits"]
    assert [(entry.name, reason) for entry, reason in step.rejected] == [("never", "13 tokens exceed max_len = 12")]
    assert not step.before
    ledger.commit("fits", 3)
    step.work[0].entry.num_computed, step.work[0].entry.num_known = 3, 4
    assert scheduler.schedule() == Step([Work(step.work[0].entry, 1, 0)]), "a step says what happened in it alone"


def test_nobody_looks_beyond_the_end():
    ledger, scheduler = two_that_decode(num_pages=20)
    for token in (7, 8, 9, 10, 11):
        decode(ledger, scheduler, token)
    assert [entry.num_computed for entry in scheduler.running] == [8, 8]
    assert [entry.final_len for entry in scheduler.running] == [8, 8]
    assert scheduler.schedule_ahead() is None
