"""Everything derived from live(n) against brute-force masks, for all small sizes."""

import itertools

import pytest

from kvlab.ledger.states import (
    ArraySpec,
    LatentState,
    RecurrentState,
    RetrievalState,
    StateSpec,
    TokenState,
    live_pages,
    max_pages_for_step,
    page_forgotten_at,
)

SPECS = [
    TokenState(1, 1, 1),
    LatentState(4, 2),
    RetrievalState(1, 2, 2, index_dim=1, num_selected=3),
    *(TokenState(1, 1, 1, window=w, num_sinks=s) for w in (1, 2, 3, 5, 8) for s in (0, 1, 3, 4)),
    *(TokenState(1, 1, 1, chunk=c) for c in (1, 2, 3, 7, 8)),
]
PAGES = (1, 2, 3, 4, 5, 8)


def visible_by_mask(spec: StateSpec, n: int) -> set[int]:
    """Positions that token n reads besides itself, straight from each paper's mask."""
    if isinstance(spec, TokenState) and spec.window is not None:
        return {p for p in range(n) if n - p < spec.window or p < spec.num_sinks}
    if isinstance(spec, TokenState) and spec.chunk is not None:
        return {p for p in range(n) if p // spec.chunk == n // spec.chunk}
    return set(range(n))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_live_is_the_mask(spec):
    for n in range(64):
        positions = [p for one in spec.live(n) for p in one]
        assert positions == sorted(visible_by_mask(spec, n))
        assert spec.live_len(n) == len(positions)
        assert spec.logical_bytes(n) == len(positions) * spec.unit_bytes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_nothing_forgotten_is_recalled(spec):
    for position in range(40):
        seen = [n for n in range(position + 1, 64) if position in visible_by_mask(spec, n)]
        forgotten = spec.forgotten_at(position)
        assert seen == list(range(position + 1, min(64, 64 if forgotten is None else forgotten)))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pages_that_a_hit_needs_and_that_stay(spec):
    for n, page in itertools.product(range(64), PAGES):
        ranges = live_pages(spec, n, page)
        assert [p for one in ranges for p in one] == sorted({p // page for p in visible_by_mask(spec, n)})
        assert all(a.stop <= b.start for a, b in itertools.pairwise(ranges))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_page_is_free_when_its_last_slot_is_forgotten(spec):
    for number, page in itertools.product(range(6), PAGES):
        held = [
            n
            for n in range((number + 1) * page, 90)
            if any(p in visible_by_mask(spec, n) for p in range(number * page, (number + 1) * page))
        ]
        forgotten = page_forgotten_at(spec, number, page)
        first_free = next((n for n in range((number + 1) * page, 90) if n not in held), None)
        assert (90 if forgotten is None else max(forgotten, (number + 1) * page)) == (first_free or 90)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_max_pages_bounds_every_step_and_is_nearly_reached(spec):
    for max_len, chunk, page in itertools.product((1, 7, 24), (1, 3, 8), PAGES):
        chunk = min(chunk, max_len)
        held = []
        for start in range(max_len):
            new = range(start, min(start + chunk, max_len))
            held.append(len({p // page for n in new for p in {*visible_by_mask(spec, n), *new}}))
        bound = max_pages_for_step(spec, max_len, chunk, page)
        assert max(held) <= bound <= max(held) + 2


def test_published_bytes_per_token():
    """Llama-3-70B: 80 layers, 8 KV heads of 128, bf16 (FIGURES: 327,680 bytes a token; MHA 2,621,440; MQA 40,960)."""
    for heads, expected in ((8, 327_680), (64, 2_621_440), (1, 40_960)):
        assert 80 * TokenState(heads, 128, 128, "bfloat16").unit_bytes == expected
    assert 40 * TokenState(40, 128, 128, "float16").unit_bytes == 819_200  # OPT-13B
    assert 61 * LatentState(512, 64).unit_bytes == 70_272  # DeepSeek-V3


def test_scales_are_counted_apart():
    spec = TokenState(8, 128, 128, "int8", scale_dtype="float32")
    assert (spec.unit_bytes, spec.scale_bytes) == (2 * 8 * 128 + 2 * 8 * 4, 2 * 8 * 4)
    assert TokenState(8, 128, 128, "int4").unit_bytes == 8 * 128


def test_retrieval_reads_its_index_and_what_it_selects():
    spec = RetrievalState(1, 2, 2, index_dim=1, num_selected=3)
    assert spec.read_bytes(2) == 2 * 2 + 2 * 8
    assert spec.read_bytes(50) == 50 * 2 + 3 * 8


def test_recurrent_bytes_do_not_grow():
    spec = RecurrentState((ArraySpec("ssm", (2, 4, 8), "float32"), ArraySpec("history", (3, 5), "bfloat16")))
    assert spec.logical_bytes(1) == spec.logical_bytes(10_000) == 2 * 4 * 8 * 4 + 3 * 5 * 2
    assert live_pages(spec, 9, 4) == ()


def test_a_spec_without_bytes_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        StateSpec()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenState(0, 1, 1), "num_kv_heads = 0: must be at least 1"),
        (lambda: TokenState(1, 1, 1, window=0), "window = 0"),
        (lambda: TokenState(1, 1, 1, num_sinks=2), "num_sinks = 2: .* 0 without a window"),
        (lambda: TokenState(1, 1, 1, window=3, chunk=2), "chunk = 2: must be null beside window = 3"),
        (lambda: TokenState(1, 1, 1, dtype="float31").unit_bytes, "dtype = 'float31'"),
        (lambda: ArraySpec("x", (3,), "int4"), "does not fill whole bytes"),
        (lambda: ArraySpec("x", (0,), "int8"), "every axis must be at least 1"),
    ],
)
def test_impossible_states_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
