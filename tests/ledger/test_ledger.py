"""The ledger's answers, one behaviour a test; `test_machine` drives all of them at random."""

import tracemalloc

import numpy as np
import pytest

from kvlab.ledger.answers import Ready, Wait
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import load_plans, save_plans
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from pallas_kernels.visible import NOWHERE
from tests.ledger.small import FULL, STATE, WINDOWED, grow, make_ledger


def test_windowed_layers_free_what_leaves_the_window():
    ledger = make_ledger(page_size=2, full_pages=13, window_pages=8)
    grow(ledger, "a", 24, step=1)
    full, windowed, _ = ledger.audit()
    assert full.allocated == 12 * ledger.classes[0].page_bytes
    # live(24) = [0, 2) and [20, 24): pages 0, 10 and 11.
    assert windowed.allocated == 3 * ledger.classes[1].page_bytes


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
    assert all(leaf is None or leaf.dtype == np.int32 for step in both.classes for leaf in step)
    with pytest.raises(ValueError, match=r"1 step of 3 tokens: must fit in \[2, 2\]"):
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
