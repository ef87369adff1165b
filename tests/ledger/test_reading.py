"""How many pages a step reads, and where a prompt ends: closed forms, and what the ledger makes of them."""

from dataclasses import replace

import numpy as np
import pytest

from kvlab.ledger.classes import Lengths, StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import load_plans, save_plans
from kvlab.ledger.reading import Reading
from kvlab.ledger.states import ArraySpec, LatentState, RetrievalState, TokenState
from pallas_kernels.visible import Visible

INDEX = tuple(ArraySpec(name, (2, 3), "bfloat16", per_page=True, is_statistics=True) for name in ("key_min", "key_max"))
PLAIN = TokenState(2, 3, 5, "bfloat16")


@pytest.mark.parametrize(
    "reading",
    [
        Reading(4, pages=3),
        Reading(4, fraction=0.3, first=0),
        Reading(3, fraction=0.25, last=2),
        Reading(1, pages=5, first=2, last=3),
        Reading(4, fraction=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("reads_keys", [False, True])
def test_bytes_read_are_those_of_the_pages_read(reading, reads_keys):
    """Counted page by page: its own and the first ones, then any other full pages."""
    reading = replace(reading, reads_keys=reads_keys)
    state = replace(PLAIN, format="int8", reading=reading, index=INDEX)
    key, value, of_page = 2 * (3 + 4), 2 * (5 + 4), 2 * 2 * 3 * 2
    assert state.page_bytes(reading.page_size) == reading.page_size * (key + value) + of_page
    for n in range(40):
        size = reading.page_size
        pages = [min(size, n - begin) for begin in range(0, n + 1, size)]  # slots before token n, its own page last
        wanted = reading.pages if reading.pages is not None else int(reading.fraction * len(pages) + 1e-9)
        wanted = min(len(pages), max(wanted, reading.first + reading.last))
        assert reading.num_read(len(pages)) == wanted
        slots = sum([*pages[-1:], *pages[:-1]][:wanted])
        looked_at = (n - slots) * key if reads_keys else 0
        held = sum(slots > 0 for slots in pages)
        assert state.read_bytes(n) == slots * (key + value) + looked_at + held * of_page
        assert state.logical_bytes(n) == n * (key + value) + held * of_page


@pytest.mark.parametrize(
    "make",
    [
        lambda: Reading(4),
        lambda: Reading(4, pages=2, fraction=0.5),
        lambda: Reading(4, pages=1),
        lambda: Reading(4, fraction=1.5),
        lambda: Reading(0, pages=2),
        lambda: Reading(4, pages=2, last=0),
        lambda: TokenState(1, 2, 2, visible=Visible(3), reading=Reading(4, pages=2)),
        lambda: RetrievalState(1, 2, 2, 1, 1, reading=Reading(4, pages=2)),
        lambda: replace(PLAIN, index=(ArraySpec("key_min", (2, 3), "float32"),)),
        lambda: StateClass("kv", replace(PLAIN, reading=Reading(8, pages=2)), 4, 9, 4),
        lambda: StateClass("kv", replace(PLAIN, reading=Reading(4, pages=2)), 4, 9, 1, reservation="max"),
    ],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises(ValueError, match=r"must be|exactly one"):
        make()


def ledger_of(*, dense_prompts):
    reading = Reading(4, pages=2, dense_prompts=dense_prompts)
    state = StateClass("kv", replace(PLAIN, reading=reading, index=INDEX), 4, 40, 16)
    everything = StateClass("dense", LatentState(2, 1), 4, 40, 16)
    return Ledger([state, everything], 64, 8)


def run(ledger, name, ids, prompt_len, num_tokens):
    """A sequence that looks its prompt up and computes `num_tokens` in all; returns the tokens found."""
    hit = ledger.lookup(ids[:prompt_len], "", prompt_len)
    found = done = hit.length
    while done < num_tokens:
        count = min(8, num_tokens - done) if done >= prompt_len else min(8, prompt_len - done)
        begins = {"hit": hit, "lengths": Lengths(prompt_len, 64)} if done == found else {}
        assert ledger.reserve(name, count, **begins).ready
        plan = ledger.plan([name], 2, 8)
        ledger.commit(name, count, ids[max(prompt_len, done) : done + count])
        done += count
        ledger.check()
    return found, plan


@pytest.mark.parametrize("dense_prompts", [False, True])
def test_where_prompts_are_read_apart_answers_are_not_found(dense_prompts, tmp_path):
    ledger, ids = ledger_of(dense_prompts=dense_prompts), list(range(40))
    found, plan = run(ledger, "a", ids, 10, 22)
    assert found == 0
    lens = [mine.prompts if mine.prompts is None else mine.prompts.tolist() for mine in plan.classes]
    assert lens == ([[10, 0], None] if dense_prompts else [None, None])
    forked = plan.with_prompts(7).classes[0].prompts
    assert forked is None or forked.tolist() == [7, 7]
    ledger.fork("a", "b")
    ledger.reserve("b", 1)
    prompts = ledger.plan(["b"], 1, 1).classes[0].prompts
    assert prompts is None or prompts.tolist() == [10]
    found, _ = run(ledger, "c", ids, 30, 31)
    assert found == (8 if dense_prompts else 20)
    save_plans(tmp_path / "plans.npz", [plan])
    (loaded,) = load_plans(tmp_path / "plans.npz")
    for mine, read in zip(plan.classes, loaded.classes, strict=True):
        for left, right in zip(mine, read, strict=True):
            assert (left is None and right is None) or (np.asarray(left) == np.asarray(right)).all()
