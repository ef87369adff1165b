"""Contiguous reservations: the buddy allocator by its properties, and what each reservation wastes."""

import itertools
import random

import pytest

from kvlab.ledger.answers import Never, Ready, Wait
from kvlab.ledger.classes import Lengths, StateClass
from kvlab.ledger.contiguous import Buddy
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.states import TokenState
from pallas_kernels.visible import Visible

SPEC = TokenState(1, 1, 1, "float16")
WINDOWED = TokenState(1, 1, 1, "float16", visible=Visible(window=3))


def make(reservation, num_slots=48, max_len=16, spec=SPEC, page_size=1):
    return Ledger([StateClass("kv", spec, page_size, num_slots, 1, reservation=reservation)], max_len, max_len)


@pytest.mark.parametrize("num_pages", [1, 2, 7, 48, 64, 15_728])
def test_blocks_never_overlap_and_merge_back(num_pages):
    rng = random.Random(num_pages)
    buddy = Buddy(num_pages)
    start, held = buddy.blocks, {}
    assert sum(size for _, size in start) == num_pages
    for step in range(400):
        wanted = rng.randrange(1, 9)
        if rng.random() < 0.6 and buddy.fits(wanted):
            first, size = buddy.take(wanted)
            assert size >= wanted > size // 2
            assert first % size == 0
            held[step] = (first, size)
        elif held:
            buddy.give(*held.pop(rng.choice(list(held))))
        everything = sorted([*held.values(), *buddy.blocks])
        assert sum(size for _, size in everything) == num_pages
        assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(everything))
    if not buddy.fits(9):
        with pytest.raises(MemoryError, match="no block of 16 pages"):
            buddy.take(9)
    for block in held.values():
        buddy.give(*block)
    assert buddy.blocks == start


@pytest.mark.parametrize(
    ("reservation", "asked", "block"),
    [("max", 16, 16), ("pow2", 5 + 4, 16), ("oracle", 8, 8)],
    ids=["max", "pow2", "oracle"],
)
def test_reservations_and_their_waste(reservation, asked, block):
    """A prompt of 5 and an answer of 3: what is stored, what will be, what never will, and what the buddy rounds up."""
    ledger = make(reservation)
    assert ledger.reserve("a", 5, lengths=Lengths(5, 8)) == Ready()
    ledger.commit("a", 5)
    (account,) = ledger.audit()
    slot = SPEC.unit_bytes
    found = (account.live, account.reserved, account.tail, account.padding, account.free)
    assert found == (5 * slot, 3 * slot, (asked - 8) * slot, (block - asked) * slot, (48 - block) * slot)
    ledger.check()
    for _ in range(3):
        ledger.reserve("a", 1)
        ledger.commit("a", 1)
    (account,) = ledger.audit()
    assert (account.live, account.reserved) == (8 * slot, 0)
    if reservation == "oracle":
        assert ledger.reserve("a", 1) == Never("kv: tokens [0, 9) exceed the 8 slots reserved")
    ledger.release("a")
    ledger.check()
    assert ledger.audit()[0].free == 48 * slot


def test_external_fragmentation_makes_requests_wait():
    """Free slots that are not in one block are of no use; paging would have served them."""
    ledger = make("oracle", num_slots=16)
    for name in "abcd":
        ledger.reserve(name, 4, lengths=Lengths(4, 4))
        ledger.commit(name, 4)
    ledger.release("a")
    ledger.release("c")
    answer = ledger.reserve("e", 8, lengths=Lengths(8, 8))
    assert answer == Wait("kv: 8 adjacent pages needed, 8 free, not in one block")
    ledger.release("b")
    assert ledger.reserve("e", 8, lengths=Lengths(8, 8)) == Ready()
    assert make("max", num_slots=15).reserve("a", 1) == Never("kv: no block of 16 pages in a pool of 15")


def test_a_windowed_layer_in_a_contiguous_block_holds_the_dead():
    ledger = make("max", spec=WINDOWED)
    ledger.reserve("a", 10)
    ledger.commit("a", 10)
    (account,) = ledger.audit()
    assert (account.live, account.dead) == (2 * WINDOWED.unit_bytes, 8 * WINDOWED.unit_bytes)


def test_contiguous_sequences_are_neither_shared_nor_swapped_nor_found():
    ledger = make("max")
    hit = ledger.lookup(list(range(8)))
    ledger.reserve("a", 8, hit=hit)
    ledger.commit("a", 8)
    for call in (lambda: ledger.fork("a", "b"), lambda: ledger.swap_out("a")):
        with pytest.raises(ValueError, match="contiguous reservations are neither shared nor swapped"):
            call()
    ledger.release("a")
    assert ledger.lookup(list(range(8))).length == 0


@pytest.mark.parametrize("reservation", ["max", "pow2", "oracle"])
def test_random_traffic_keeps_every_invariant(reservation):
    rng = random.Random(0)
    ledger = make(reservation, num_slots=100, max_len=20, page_size=2)
    targets = {}
    for name in range(300):
        prompt = rng.randrange(1, 10)
        total = prompt + rng.randrange(1, 10)
        answer = ledger.reserve(name, prompt, lengths=Lengths(prompt, total))
        if isinstance(answer, Ready):
            plan = ledger.plan([name], 1, prompt)
            first = int(plan.classes[0].pages[0, 0])
            assert plan.classes[0].write_slots[0].tolist() == list(range(2 * first, 2 * first + prompt))
            ledger.commit(name, prompt)
            targets[name] = total
        ledger.check()
        for other in list(targets):
            if ledger.length(other) < targets[other]:
                assert ledger.reserve(other, 1) == Ready(), "what was reserved is there"
                ledger.commit(other, 1)
            else:
                ledger.release(other)
                del targets[other]
        ledger.check()
