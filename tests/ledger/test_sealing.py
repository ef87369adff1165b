"""Sealed pages: which are sealed and when, what is free then, and what nobody may do with them. One behaviour a test;
`test_machine` drives all of them at random."""

import itertools

import numpy as np
import pytest

from kvlab.ledger.answers import Never, Ready, Wait
from kvlab.ledger.classes import Lengths, StateClass, sized_class
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.memory_states import SealedState
from kvlab.ledger.plan import load_plans, save_plans
from kvlab.ledger.retention import Sealing
from kvlab.ledger.states import TokenState
from pallas_kernels.visible import NOWHERE

PAGE, CHUNK = 4, 12
FULL, SEALED = TokenState(2, 4, 4), SealedState(2, 4, 4, group=2)


def ledger_of(residual=3, *, after_prompt=True, num_pages=12, num_sealed=11, host=10, chunk_len=CHUNK) -> Ledger:
    rule = Sealing(residual, PAGE, 6, after_prompt)
    full = StateClass("kv", FULL, PAGE, num_pages, 10, 2, num_host_pages=host, sealing=rule, sealed_name="kv.sealed")
    return Ledger([full, StateClass("kv.sealed", SEALED, PAGE, num_sealed, 10, 2, num_host_pages=host)], 40, chunk_len)


def begin(ledger: Ledger, name, prompt_len: int, **options) -> None:
    """A sequence whose prompt is computed, in steps of 6, and sealed as it goes."""
    options = {"lengths": Lengths(prompt_len, prompt_len)} | options
    done = options["hit"].length if "hit" in options else 0
    while done < prompt_len:
        count = min(6, prompt_len - done)
        assert ledger.reserve(name, count, **options) == Ready()
        ledger.commit(name, count)
        ledger.seal([name])
        ledger.check()
        done, options = done + count, {}


def decode(ledger: Ledger, name, count: int) -> None:
    for _ in range(count):
        assert ledger.reserve(name, 1) == Ready()
        ledger.commit(name, 1)
        ledger.seal([name])
        ledger.check()


def pages(ledger: Ledger, name, number: int = 0) -> list[int]:
    return list(ledger.running[name].holdings[number].pages.values())


def brute_force(residual: int, page: int, chunk: int, after_prompt: bool, prompt: int, total: int) -> list[int]:
    """Open slots before and behind every length: a page is sealed once `residual` newer slots are stored, token by
    token."""
    num_open, counts = 0, []
    for length in range(1, total + 1):
        num_open += 1
        peak = num_open
        if length >= prompt or (not after_prompt and length % chunk == 0):
            while num_open - page >= residual:
                num_open -= page
        counts.append((peak, num_open))
    return counts


@pytest.mark.parametrize("after_prompt", [True, False])
def test_when_and_how_many_are_closed_forms(after_prompt):
    for residual, page, chunk, prompt in itertools.product((0, 1, 3, 8), (1, 4), (1, 3, 6), (1, 7, 12)):
        rule = Sealing(residual, page, chunk, after_prompt)
        expected, num_open, next_due = brute_force(residual, page, chunk, after_prompt, prompt, 25), 0, 0
        for length, (peak, after) in enumerate(expected, 1):
            if length > 1:
                next_due = rule.next_due(prompt, length - 1, num_open)
            num_open += 1
            due = rule.due(prompt, length, num_open)
            assert (num_open, num_open - due * page) == (peak, after)
            if length > 1 and due:
                assert next_due == length, "a place was passed"
            elif length > 1:
                assert next_due > length, "nothing is due there"
            num_open = after
        assert max(peak for peak, _ in expected) <= rule.most(prompt, 25) <= rule.most_of_any(25)


def test_pages_that_are_full_and_old_enough_are_sealed_and_the_open_ones_are_free_at_once():
    ledger = ledger_of(residual=3)
    for count in (6, 5):
        assert ledger.reserve("a", count, **({"lengths": Lengths(11, 20)} if count == 6 else {})) == Ready()
        ledger.commit("a", count)
        before = pages(ledger, "a")
        done = ledger.seal(["a"])
        ledger.check()
        assert (done is None) == (count == 6), "a prompt is sealed at its end"
    seals, (events,) = done
    assert [(each.state_class, each.length, each.num_pages) for each in events] == [(0, 11, 2)]
    assert seals.classes[0].tolist() == [[before[0], 1], [before[1], 2]]
    assert not len(seals.classes[1])
    assert ledger.stored("a") == {"kv": 3, "kv.sealed": 8}
    assert set(before[:2]) <= set(ledger.stores[0].free)
    ledger.reserve("a", 2)
    plan = ledger.plan(["a"], 2, 2)
    open_pages, sealed = plan.classes
    assert (plan.starts.tolist(), open_pages.starts.tolist(), sealed.starts.tolist()) == ([11, 0], [3, 0], [8, 0])
    assert sealed.pages[0, :3].tolist() == [1, 2, 0]
    assert sealed.page_starts[0, :3].tolist() == [0, 4, NOWHERE]
    assert set(sealed.write_slots.flatten().tolist()) == {11 * PAGE}, "no step writes a sealed page"
    kept = pages(ledger, "a")
    assert open_pages.write_slots[0].tolist() == [kept[0] * PAGE + 3, kept[1] * PAGE]


def test_accounts_sum_and_say_what_is_where():
    ledger = ledger_of(residual=3)
    begin(ledger, "a", 11)
    kv, sealed = ledger.audit()
    assert kv.logical == 3 * FULL.unit_bytes * 2
    # 2 pages of 2 heads: numbers of 4 bits, scales and zeros of two bytes by channel and by group of two channels.
    numbers, by_channel, by_group = 2 * PAGE * 8 // 2, 2 * 2 * 4 * 2, 2 * PAGE * 2 * 2 * 2
    assert sealed.logical == sealed.allocated == 2 * 2 * (numbers + by_channel + by_group)
    assert sealed.live == 2 * 2 * numbers
    assert kv.balanced
    assert sealed.balanced


def test_chunks_are_sealed_as_they_come():
    ledger = ledger_of(residual=2, after_prompt=False)
    assert ledger.clip_first(17, 12) == 6
    seen = []
    for count in (6, 6, 5):
        assert ledger.reserve("a", count, **({"lengths": Lengths(17, 20)} if not seen else {})) == Ready()
        ledger.commit("a", count)
        ledger.seal(["a"])
        ledger.check()
        seen.append(tuple(ledger.stored("a").values()))
    assert seen == [(2, 4), (4, 8), (5, 12)]


def test_a_sequence_begun_without_lengths_is_never_sealed():
    ledger = ledger_of(residual=0)
    ledger.reserve("a", 12)
    ledger.commit("a", 12)
    assert ledger.seal(["a"]) is None
    assert not ledger.seals("a")


def test_a_prompt_is_found_up_to_its_first_sealing_and_not_behind():
    ledger, prompt = ledger_of(residual=3, after_prompt=False, num_pages=20), list(range(20))
    begin(ledger, "a", 20, hit=ledger.lookup(prompt), lengths=Lengths(20, 20))
    assert len(ledger.index.cached[0]) == 3, "three pages were full before the first sealing, at 12 tokens"
    assert ledger.running["a"].ids is None
    decode(ledger, "a", 6)
    assert len(ledger.index.cached[0]) == 3
    assert not ledger.index.cached[1]
    hit = ledger.lookup(prompt)
    assert hit.length == 8, "it ends before the place where the first sealing is due"
    ledger.unpin(hit)
    late, whole = ledger_of(residual=3, num_pages=20), list(range(20))
    begin(late, "a", 20, hit=late.lookup(whole), lengths=Lengths(20, 20))
    assert late.lookup([*whole, 1, 2, 3], prompt_len=23).length == 20, "exact as computed, before it was sealed"


def test_forks_share_what_is_sealed_and_seal_apart():
    ledger = ledger_of(residual=3)
    begin(ledger, "a", 9)
    ledger.fork("a", "b")
    ledger.check()
    (sealed,) = pages(ledger, "b", 1)
    assert ledger.stores[1].refs[sealed] == 2
    for name in "ab":
        ledger.reserve(name, 2)
        ledger.commit(name, 2)
    open_pages = {name: pages(ledger, name) for name in "ab"}
    seals, _ = ledger.seal(["a", "b"])
    ledger.check()
    assert seals.classes[0].tolist() == [[open_pages[name][0], pages(ledger, name, 1)[1]] for name in "ab"]
    assert len({*pages(ledger, "a", 1), *pages(ledger, "b", 1)}) == 3
    ledger.release("a")
    ledger.check()
    assert pages(ledger, "b", 1)[0] == sealed
    assert ledger.stores[1].refs[sealed] == 1


def test_swaps_carry_both_kinds_of_pages():
    ledger = ledger_of(residual=3)
    begin(ledger, "a", 15, hit=ledger.lookup(list(range(15))), lengths=Lengths(15, 15))
    held = [pages(ledger, "a", number) for number in (0, 1)]
    moved = ledger.swap_out("a")
    ledger.check()
    assert [classes[:, 0].tolist() for classes in moved.classes] == held
    assert ledger.stored("a") == {"kv": 3, "kv.sealed": 12}
    back = ledger.swap_in("a")
    ledger.check()
    assert [len(classes) for classes in back.classes] == [1, 3], "no page of the index is a renumbered one"
    decode(ledger, "a", 5)
    assert ledger.stored("a") == {"kv": 4, "kv.sealed": 16}


def test_a_cancelled_step_leaves_what_is_sealed():
    ledger = ledger_of(residual=3)
    begin(ledger, "a", 11)
    held = [pages(ledger, "a", number) for number in (0, 1)]
    ledger.reserve("a", 6)
    with pytest.raises(ValueError, match="'a': its step of 6 tokens is not committed"):
        ledger.seal(["a"])
    ledger.cancel("a")
    ledger.check()
    assert [pages(ledger, "a", number) for number in (0, 1)] == held
    ledger.reserve("a", 1, lookahead=3)
    ledger.commit("a", 1)
    ledger.check()
    assert ledger.stored("a") == {"kv": 4, "kv.sealed": 8}


def test_no_step_and_no_draft_passes_a_sealing():
    ledger = ledger_of(residual=3)
    begin(ledger, "a", 9)
    assert ledger.stored("a") == {"kv": 5, "kv.sealed": 4}
    assert ledger.room_ahead("a") == 2, "the next page is sealed at 7 open slots"
    decode(ledger, "a", 2)
    assert ledger.stored("a") == {"kv": 3, "kv.sealed": 8}
    assert ledger.room_ahead("a") == 4


def test_sealed_pages_that_are_short_are_waited_for():
    ledger = ledger_of(residual=0, num_sealed=4, num_pages=20)
    begin(ledger, "a", 8)
    ledger.reserve("b", 8, lengths=Lengths(8, 8))
    ledger.commit("b", 8)
    before = ledger.audit()
    assert ledger.seal(["a", "b"]) == Wait("kv.sealed: 2 pages needed, 1 free or cached")
    ledger.check()
    assert ledger.audit() == before
    ledger.release("a")
    assert ledger.seal(["b"]) is not None
    ledger.check()


def test_published_pages_behind_a_sealed_prefix_do_not_keep_it_from_being_evicted():
    """What the sequence sealed, the index alone holds; what it still reads is behind that."""
    ledger = ledger_of(residual=8, num_pages=6)
    begin(ledger, "a", 16, hit=ledger.lookup(list(range(16))), lengths=Lengths(16, 16))
    assert len(ledger.index.cached[0]) == 4
    assert ledger.stores[0].num_available == 3, "one page was never used, two are cached alone"
    begin(ledger, "b", 12)
    assert len(pages(ledger, "b")) == 2
    ledger.check()
    assert not ledger.index.cached[0], "pages behind those that went are of no use"
    assert ledger.stored("a") == {"kv": 8, "kv.sealed": 8}
    assert ledger.stored("b") == {"kv": 8, "kv.sealed": 4}


def test_long_sequences_fit_where_little_stays_open_and_no_others():
    ledger = ledger_of(residual=3, num_pages=4)
    assert isinstance(ledger.never(13), Never)
    assert ledger.never(40, prompt_len=12) is None
    assert isinstance(ledger.never(40, prompt_len=13), Never), "a prompt is held open once"
    begin(ledger, "a", 12)
    decode(ledger, "a", 28)
    assert ledger.stored("a") == {"kv": 4, "kv.sealed": 36}
    assert ledger.reserve("a", 1) == Never("41 tokens exceed max_len = 40")


@pytest.mark.parametrize("after_prompt", [True, False])
@pytest.mark.parametrize("residual", [0, 3, 8])
def test_a_pool_of_the_stated_size_is_enough(residual, after_prompt):
    """Every sequence grows to the end, in pools that were sized for them: alone in time, or all at once."""
    rule = Sealing(residual, PAGE, 6, after_prompt)
    sizes = {"num_layers": 1, "page_size": PAGE, "contiguous": False, "max_sequences": 3, "max_len": 30, "chunk_len": 6}
    for prompt_len in (None, 20):
        full = sized_class("kv", FULL, **sizes, prompt_len=prompt_len, sealing=rule)
        sealed = sized_class("kv.sealed", SEALED, **sizes, prompt_len=prompt_len)
        ledger = Ledger([StateClass(**{**vars_of(full), "sealed_name": "kv.sealed"}), sealed], 30, 6)
        for name in "abc":
            begin(ledger, name, 20)
        for _, name in itertools.product(range(10), "abc"):
            decode(ledger, name, 1)
        assert [ledger.length(name) for name in "abc"] == [30] * 3


def vars_of(state: StateClass) -> dict:
    return {name: getattr(state, name) for name in state.__dataclass_fields__}


def test_saved_with_the_plans(tmp_path):
    ledger = ledger_of(residual=3)
    ledger.reserve("a", 11, lengths=Lengths(11, 20))
    first = ledger.plan(["a"], 2, 11)
    ledger.commit("a", 11)
    seals, _ = ledger.seal(["a"])
    ledger.reserve("a", 1)
    plans = [first, seals, ledger.plan(["a"], 2, 1)]
    save_plans(tmp_path / "plans.npz", plans)
    for loaded, saved in zip(load_plans(tmp_path / "plans.npz"), plans, strict=True):
        assert type(loaded) is type(saved)
        np.testing.assert_equal(loaded, saved)
    for name, arrays in {
        "moves of no class": {"0/1/moves": seals.classes[0]},
        "a hole": {"0/0/moves": 1, "0/2/moves": 1},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **dict.fromkeys(arrays, seals.classes[0]))
        with pytest.raises(ValueError, match="not a file of plans"):
            load_plans(tmp_path / f"{name}.npz")
