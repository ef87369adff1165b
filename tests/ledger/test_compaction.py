"""Two lengths: a class may store fewer slots than its sequence has tokens. One behaviour a test; `test_machine` drives
all of them at random."""

from dataclasses import replace

import numpy as np
import pytest

from kvlab.ledger import growth
from kvlab.ledger.answers import Never, Ready, Wait
from kvlab.ledger.classes import Lengths, StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.memory_states import Statistics
from kvlab.ledger.plan import Compaction, load_plans, save_plans
from kvlab.ledger.retention import Retention
from kvlab.ledger.states import ArraySpec
from pallas_kernels.visible import NOWHERE
from tests.ledger.small import FULL, make_ledger

PAGE = 4


def full_only(num_pages: int = 9, max_len: int = 40) -> Ledger:
    """One class of full attention, in pages of 4."""
    return Ledger([StateClass("full", FULL, PAGE, num_pages, 10)], max_len, 12)


def grow(ledger: Ledger, name, count: int, **options) -> None:
    """Reserves and commits `count` tokens in one step."""
    assert ledger.reserve(name, count, **options) == Ready()
    ledger.commit(name, count)
    ledger.check()


def pages(ledger: Ledger, name, number: int = 0) -> list[int]:
    return list(ledger.running[name].holdings[number].pages.values())


def test_what_is_behind_the_kept_slots_is_free_at_once_and_tokens_go_on_from_there():
    ledger = make_ledger(page_size=PAGE, full_pages=9)
    grow(ledger, "a", 6)
    assert ledger.reserve("a", 4) == Ready()
    own = pages(ledger, "a")
    ledger.commit("a", 4, stored={"full": 5})
    ledger.check()
    assert ledger.length("a") == 10
    assert ledger.stored("a") == {"full": 5, "windowed": 10, "state": 10}
    assert pages(ledger, "a") == own[:2]
    account = ledger.audit()[0]
    slot = ledger.classes[0].page_bytes // PAGE
    assert (account.live, account.tail, account.dead) == (5 * slot, 3 * slot, 0)
    ledger.reserve("a", 4)
    plan = ledger.plan(["a"], 2, 4)
    full, windowed, state = plan.classes
    assert plan.starts.tolist() == windowed.starts.tolist() == state.starts.tolist() == [10, 0]
    assert full.starts.tolist() == [5, 0]
    held = pages(ledger, "a")
    assert full.pages[0, :4].tolist() == [*held, 0]
    assert full.page_starts[0, :4].tolist() == [0, 4, 8, NOWHERE]
    assert full.write_slots[0].tolist() == [held[slot // PAGE] * PAGE + slot % PAGE for slot in range(5, 9)]
    ledger.commit("a", 4, stored={0: 9})  # all that there is: nothing happens
    assert ledger.stored("a") == {"full": 9, "windowed": 14, "state": 14}


def test_rejected_drafts_give_back_the_pages_behind_the_slots():
    ledger = full_only()
    grow(ledger, "a", 12)
    ledger.reserve("a", 1)
    ledger.commit("a", 1, stored={"full": 3})
    ledger.reserve("a", 1, lookahead=5)
    assert len(pages(ledger, "a")) == 3
    ledger.check()
    ledger.commit("a", 1)
    ledger.check()
    assert (ledger.length("a"), ledger.stored("a"), len(pages(ledger, "a"))) == (14, {"full": 4}, 1)
    ledger.reserve("a", 3)
    ledger.cancel("a")
    ledger.check()
    assert len(pages(ledger, "a")) == 1
    ledger.reserve("a", 2, lookahead=2)
    ledger.commit("a", 3, stored={"full": 2})
    ledger.check()
    assert (ledger.length("a"), ledger.stored("a"), len(pages(ledger, "a"))) == (17, {"full": 2}, 1)


def test_a_published_prompt_stays_for_others_and_the_copy_is_its_sequences_own():
    ledger, prompt = full_only(num_pages=12), list(range(11))
    grow(ledger, "a", 11, hit=ledger.lookup(prompt))
    before = pages(ledger, "a")
    (step,) = ledger.compact({"a": {"full": 6}}).classes
    ledger.check()
    assert step.pages.tolist() == [before]
    assert (step.stored.tolist(), step.keep.tolist()) == ([11], [6])
    written = pages(ledger, "a")
    assert step.destinations.tolist() == [written]
    assert written[0] == before[2], "its own page comes first"
    assert written[1] not in before
    assert ledger.lookup(prompt).length == 8
    assert set(ledger.index.cached[0]) == set(before[:2])


def test_forks_keep_what_they_share_and_those_compacted_together_read_it_first():
    ledger = full_only(num_pages=12)
    grow(ledger, "a", 8)
    for child in "bc":
        ledger.fork("a", child)
    shared = pages(ledger, "c")
    (step,) = ledger.compact({"a": {"full": 5}, "b": {}, "c": {"full": 2}}).classes
    ledger.check()
    assert step.pages.tolist() == [shared, [0, 0], shared]
    assert step.destinations.tolist() == [pages(ledger, "a"), [12, 12], [*pages(ledger, "c"), 12]]
    assert (step.stored.tolist(), step.keep.tolist()) == ([8, 0, 8], [5, 0, 2])
    assert pages(ledger, "b") == shared
    assert not {*pages(ledger, "a"), *pages(ledger, "c")} & set(shared)


def test_a_sequence_alone_packs_in_place():
    ledger = full_only()
    grow(ledger, "a", 11)
    before = pages(ledger, "a")
    (step,) = ledger.compact({"a": {"full": 6}}).classes
    assert step.destinations.tolist() == [before[:2]]
    assert ledger.audit()[0].allocated == 2 * ledger.classes[0].page_bytes
    ledger.check()


@pytest.mark.parametrize("how", ["compact", "commit"])
def test_nothing_is_published_after_a_compaction(how):
    """Whether the ledger is told by the step's commit or between steps."""
    ledger = make_ledger(page_size=PAGE, full_pages=12, slots=6)
    if how == "compact":
        grow(ledger, "a", 6, hit=ledger.lookup(list(range(6))))
        ledger.compact({"a": {"full": 3}})
    else:
        grow(ledger, "a", 3, hit=ledger.lookup(list(range(6))))
        ledger.reserve("a", 3)
        ledger.commit("a", 3, stored={"full": 3})
    ledger.check()
    known = [set(cached) for cached in ledger.index.cached]
    for token in range(12):
        ledger.reserve("a", 1)
        if ledger.commit_each(["a"], [token]) == [False]:
            ledger.commit("a", 1, [token])
    ledger.publish()
    ledger.check()
    assert [set(cached) for cached in ledger.index.cached] == known


def test_pages_put_off_are_not_published_once_their_step_has_packed_them():
    ledger = full_only()
    grow(ledger, "a", 3, hit=ledger.lookup([1, 2, 3]))
    ledger.reserve("a", 1)
    assert ledger.commit_each(["a"], [4]) == [True]  # a full page, which waits for `publish`
    ledger.reserve("a", 1)
    ledger.commit("a", 1, [5], stored={"full": 2})
    ledger.publish()
    ledger.check()
    assert not ledger.index.cached[0]


def test_forks_and_swaps_carry_the_slots():
    state = StateClass("full", FULL, PAGE, 12, 10, num_host_pages=5)
    ledger, prompt = Ledger([state], 40, 12), list(range(11))
    grow(ledger, "a", 11, hit=ledger.lookup(prompt))
    ledger.compact({"a": {"full": 6}})
    ledger.fork("a", "b")
    assert ledger.stored("b") == {"full": 6}
    grow(ledger, "b", 3)
    assert (ledger.length("b"), ledger.stored("b")) == (14, {"full": 9})
    moved = ledger.swap_out("a")
    assert len(moved.classes[0]) == 2
    assert ledger.stored("a") == {"full": 6}
    ledger.check()
    back = ledger.swap_in("a")
    ledger.check()
    assert len(back.classes[0]) == 2, "no page of the index is a packed one"
    assert ledger.stored("a") == {"full": 6}
    grow(ledger, "a", 3)
    assert ledger.stored("a") == {"full": 9}


def test_pages_that_are_short_are_waited_for_and_alone_nobody_waits():
    ledger, prompt = full_only(num_pages=6), list(range(16))
    grow(ledger, "a", 8, hit=ledger.lookup(prompt))
    grow(ledger, "a", 8)  # four pages, all published; one is left
    grow(ledger, "b", 4)
    ledger.fork("a", "c")
    before = ledger.audit()
    assert ledger.compact({"a": {"full": 14}}) == Wait("full: 4 pages needed, 0 free or cached")
    ledger.check()
    assert ledger.audit() == before
    for other in "bc":
        ledger.release(other)
    old = pages(ledger, "a")
    answer = ledger.compact({"a": {"full": 14}})  # one page is free, the index gives up three, last first
    ledger.check()
    assert isinstance(answer, Compaction)
    (step,) = answer.classes
    assert step.destinations.tolist()[0][:3] == old[1:]
    assert set(ledger.index.cached[0]) == {old[0]}


def test_a_sequence_that_was_compacted_may_outgrow_the_pool():
    """What can never fit is a matter of slots, of max_len tokens at most."""
    ledger = full_only(num_pages=4, max_len=40)
    assert isinstance(ledger.never(13), Never)
    for length in range(8, 41, 4):
        grow(ledger, "a", 4 if length > 8 else 8)
        assert ledger.length("a") == length
        ledger.compact({"a": {"full": 4}})
        ledger.check()
    assert ledger.reserve("a", 1) == Never("41 tokens exceed max_len = 40")
    ledger.release("a")
    grow(ledger, "b", 8)
    ledger.compact({"b": {"full": 4}})
    grow(ledger, "b", 8)
    assert ledger.reserve("b", 1) == Never(
        "full: 13 tokens need 4 pages (4 tokens a page, steps of up to 12), the pool has 3"
    )


def test_what_cannot_be_is_refused_and_changes_nothing():
    ledger = make_ledger(page_size=PAGE)
    grow(ledger, "a", 6)
    ledger.reserve("a", 2)
    cases = [
        ({"fool": 1}, r"stored\['fool'\]: must be one of full, windowed, state, or a number below 3"),
        ({3: 1}, r"stored\[3\]: must be one of"),
        ({"windowed": 1}, r"stored\['windowed'\] = 1: must be left out, since windowed forgets by itself"),
        ({"state": 1}, r"stored\['state'\] = 1: must be left out, since state is recurrent"),
        ({"full": 0}, r"stored\['full'\] = 0: must be in \[1, 8\] slots"),
        ({"full": 9}, r"stored\['full'\] = 9: must be in \[1, 8\] slots"),
    ]
    for stored, message in cases:
        before = ledger.audit()
        with pytest.raises(ValueError, match=message):
            ledger.commit("a", 2, stored=stored)
        with pytest.raises(ValueError, match="'a': its step of 2 tokens is not committed"):
            ledger.compact({"a": stored})
        ledger.check()
        assert ledger.audit() == before
    ledger.commit("a", 2)
    for stored, message in cases:
        with pytest.raises(ValueError, match=message):
            ledger.compact({"a": stored})
    with pytest.raises(TypeError):
        ledger.compact({"a": {"full": 1.5}})
    ledger.fork("a", "b")
    ledger.reserve("a", 1)
    with pytest.raises(ValueError, match=r"stored\['full'\] = 7: must be left out while others share these pages"):
        ledger.commit("a", 1, stored={"full": 7})
    ledger.commit("a", 1)
    ledger.check()
    whole = Ledger([StateClass("kv", FULL, 8, 2, 1, reservation="max")], 8, 8)
    grow(whole, "a", 4)
    with pytest.raises(ValueError, match="kv is contiguous"):
        whole.compact({"a": {"kv": 2}})


def test_saved_with_the_plans(tmp_path):
    ledger = full_only()
    grow(ledger, "a", 9)
    compaction = ledger.compact({"a": {"full": 6}})
    ledger.reserve("a", 1)
    plan = ledger.plan(["a"], 2, 1)
    valid = np.arange(2 * 10 * PAGE).reshape(2, 10, PAGE) % 3 == 0
    masked = plan._replace(classes=(plan.classes[0]._replace(valid=valid),))
    save_plans(tmp_path / "plans.npz", [compaction, plan, masked])
    for loaded, saved in zip(load_plans(tmp_path / "plans.npz"), [compaction, plan, masked], strict=True):
        assert type(loaded) is type(saved)
        np.testing.assert_equal(loaded, saved)


NOTED = Statistics((ArraySpec("mass", (3,), "float32"),), until_compacted=True)


def with_statistics(num_slots: int = 3, **rules: int) -> Ledger:
    """Full attention that keeps 5 slots of a prompt, beside what is noted to choose them."""
    rule = Retention(slots=5, protected=2, **rules)
    noted = replace(NOTED, until_compacted=not rule.every)
    classes = [
        StateClass("full", FULL, PAGE, 20, 10, retention=rule, num_host_pages=9),
        StateClass("noted", noted, 1, num_slots, 1, num_host_pages=3),
    ]
    return Ledger(classes, 40, 12)


def prompted(ledger: Ledger, name, prompt_len: int) -> None:
    """Reserves and commits a prompt."""
    grow(ledger, name, prompt_len, lengths=Lengths(prompt_len, 30))


def test_statistics_go_at_the_compaction_behind_the_prompt_and_not_before():
    ledger = with_statistics(at="chunks", chunk_len=6)
    grow(ledger, "a", 6, lengths=Lengths(12, 30))
    (slot,) = pages(ledger, "a", 1)
    first = ledger.compact(ledger.due(["a"]))
    assert first.classes[1].pages.tolist() == first.classes[1].destinations.tolist() == [[slot]]
    grow(ledger, "a", 6)
    last = ledger.compact(ledger.due(["a"]))
    assert (last.classes[1].pages.tolist(), last.classes[1].destinations.tolist()) == ([[slot]], [[3]])
    ledger.check()
    assert pages(ledger, "a", 1) == []
    full, noted = ledger.audit()
    assert (noted.allocated, noted.free) == (0, noted.pool)
    assert full.allocated
    for length in (13, 14):
        grow(ledger, "a", 1)
        assert ledger.length("a") == length
    ledger.reserve("a", 1)
    assert ledger.plan(["a"], 2, 1).classes[1].pages.tolist() == [[3], [3]], "nothing is read"
    assert ledger.plan(["a"], 2, 1).classes[1].write_slots.tolist() == [[3], [3]], "and nothing is written"
    ledger.commit("a", 1)


def test_a_sequence_without_statistics_is_compacted_again_by_hand():
    ledger = with_statistics()
    prompted(ledger, "a", 10)
    ledger.compact(ledger.due(["a"]))
    again = ledger.compact({"a": {"full": 3}})
    assert again.classes[1].pages.tolist() == again.classes[1].destinations.tolist() == [[3]], "nothing is moved"
    ledger.check()
    assert ledger.stored("a")["full"] == 3


def test_statistics_that_are_needed_again_stay():
    ledger = with_statistics(every=4)
    prompted(ledger, "a", 10)
    ledger.compact(ledger.due(["a"]))
    assert len(pages(ledger, "a", 1)) == 1
    short = with_statistics()
    prompted(short, "a", 5)
    assert not short.due(["a"]), "a prompt of which all is kept"
    grow(short, "a", 1)
    assert len(pages(short, "a", 1)) == 1


def test_a_fork_a_swap_a_draft_and_another_go_on_without_statistics():
    ledger = with_statistics(num_slots=2)
    prompted(ledger, "a", 10)
    ledger.fork("a", "b")  # both read one slot
    answer = ledger.compact(ledger.due(["a", "b"]))
    assert answer.classes[1].destinations.tolist() == [[2], [2]]
    ledger.check()
    ledger.fork("a", "c")
    assert ledger.reserve("c", 1, lookahead=2) == Ready()
    ledger.commit("c", 3)
    ledger.check()
    prompted(ledger, "d", 10)
    ledger.swap_out("a")
    ledger.check()
    ledger.swap_in("a")
    grow(ledger, "a", 1)
    assert [len(pages(ledger, name, 1)) for name in "abcd"] == [0, 0, 0, 1]
    ledger.release("d")
    prompted(ledger, "e", 10)
    prompted(ledger, "f", 10)
    ledger.check()


def test_what_is_held_at_any_length_is_known_beforehand_with_statistics():
    for prompt_len in (3, 5, 6, 12):
        ledger = with_statistics()
        lengths = Lengths(prompt_len, 16)
        found = growth.grow(ledger, "a", lengths)
        assert found is not None
        assert found.at_end == growth.pages_at(ledger.classes, *lengths), prompt_len
        assert found.at_end[1] == (prompt_len <= 5)
