"""Everything derived from live(n) against brute-force masks, for all small sizes."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from kvlab.ledger import states
from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.states import (
    ArraySpec,
    LatentState,
    RecurrentState,
    RetrievalState,
    State,
    TokenState,
    live_pages,
    max_pages_for_step,
    page_forgotten_at,
)
from pallas_kernels import formats
from pallas_kernels.visible import Visible

SPECS = [
    TokenState(1, 1, 1),
    LatentState(4, 2),
    RetrievalState(1, 2, 2, index_dim=1, num_selected=3),
    *(TokenState(1, 1, 1, visible=Visible(window=w, num_sinks=s)) for w in (1, 2, 3, 5, 8) for s in (0, 1, 3, 4)),
    *(TokenState(1, 1, 1, visible=Visible(chunk=c)) for c in (1, 2, 3, 7, 8)),
]
PAGES = (1, 2, 3, 4, 5, 8)


def visible_by_mask(spec: State, n: int) -> set[int]:
    """Positions that token n reads besides itself, straight from each paper's mask."""
    assert spec.visible is not None
    window, num_sinks, chunk = spec.visible.window, spec.visible.num_sinks, spec.visible.chunk
    if window is not None:
        return {p for p in range(n) if n - p < window or p < num_sinks}
    if chunk is not None:
        return {p for p in range(n) if p // chunk == n // chunk}
    return set(range(n))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_live_is_the_mask(spec):
    for n in range(64):
        positions = [p for live_range in spec.live(n) for p in live_range]
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
        assert [p for page_range in ranges for p in page_range] == sorted({p // page for p in visible_by_mask(spec, n)})
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
    spec = TokenState(8, 128, 128, "bfloat16").stored("int8")
    assert (spec.unit_bytes, spec.scale_bytes) == (2 * 8 * 128 + 2 * 8 * 4, 2 * 8 * 4)
    halves = TokenState(8, 128, 128, "bfloat16", scale_dtype="float16").stored("int4")
    assert (halves.unit_bytes, halves.scale_bytes) == (8 * 128 + 2 * 8 * 2, 2 * 8 * 2)


STORED = {
    "tokens": TokenState(3, 4, 8, "bfloat16", visible=Visible(window=5, num_sinks=2)),
    "latents": LatentState(8, 4),
    "retrieval": RetrievalState(2, 4, 4, index_dim=3, num_selected=2),
}


@pytest.mark.parametrize("format", [format for format in states.FORMATS if format != "model"])
@pytest.mark.parametrize("spec", STORED.values(), ids=STORED)
def test_a_quantised_state_is_what_the_kernels_store(spec, format):
    """Names, bytes and which bytes are scales, against pages that `pallas_kernels.formats` really makes."""
    number, _, by = format.partition(".")
    stored, page = spec.stored(format), 7
    found = {array.name: array for array in stored.arrays}
    assert stored.visible == spec.visible
    assert stored.stored("model") == spec
    num_bytes = num_scale_bytes = 0
    for array in spec.arrays:
        if array.name == "index":
            assert found.pop("index") == array
            num_bytes += page * array.num_bytes
            continue
        heads, dim = array.shape
        tokens = jax.ShapeDtypeStruct((heads, page, dim), jnp.float32)
        pages = jax.eval_shape(lambda tokens: formats.quantised(tokens, number, by or "token"), tokens)
        scales = found.pop(f"{array.name}_scale")
        per_page = () if by else (page,)
        assert (*scales.shape[:1], *per_page, *scales.shape[1:]) == pages.scales.shape
        assert (scales.dtype, scales.is_scale, scales.per_page) == (pages.scales.dtype.name, True, bool(by))
        assert found.pop(array.name) == replace(array, dtype=pages.format)
        num_bytes += pages.payload.size * pages.payload.dtype.itemsize
        num_scale_bytes += pages.scales.size * pages.scales.dtype.itemsize
    assert not found
    assert stored.page_bytes(page) == num_bytes + num_scale_bytes
    assert page * stored.scale_bytes + stored.per_page_bytes == num_scale_bytes


def test_formats_are_those_of_the_kernels():
    assert set(states.QUANTISED) == set(formats.FORMATS)
    with pytest.raises(
        ValueError, match=r"format = 'int3': must be one of model, int8, fp8, int4, int2, int8\.channel"
    ):
        TokenState(1, 2, 2).stored("int3")
    with pytest.raises(ValueError, match="does not fill whole bytes"):
        TokenState(2, 3, 3).stored("int4").unit_bytes  # noqa: B018  stating the bytes raises


def test_scales_by_channel_are_counted_for_every_page_that_is_live():
    spec = TokenState(1, 4, 4, "bfloat16", visible=Visible(window=3)).stored("int8.channel")
    assert (spec.unit_bytes, spec.per_page_bytes) == (8, 2 * 4 * 4)
    assert spec.logical_bytes(9, page_size=4) == 2 * 8 + 2 * 32  # tokens 7 and 8, of pages 1 and 2
    with pytest.raises(ValueError, match="page_size = None: must be given"):
        spec.logical_bytes(9)
    state = StateClass("kv", spec, page_size=4, num_pages=9, table_len=9, num_layers=3)
    assert state.page_bytes == 3 * (4 * 8 + 32)
    ledger = Ledger([state], 30, 6)
    ledger.reserve("a", 5)
    ledger.commit("a", 5)
    (account,) = ledger.audit()
    assert account.balanced
    assert (account.scale, account.live, account.tail) == (2 * 3 * 32, 2 * 3 * 8, 3 * 3 * 8)


def test_a_recurrent_state_stays_in_the_models_type():
    spec = RecurrentState((ArraySpec("ssm", (3, 3), "float32"),))
    assert spec.stored("int8") == spec


def test_retrieval_reads_its_index_and_what_it_selects():
    spec = RetrievalState(1, 2, 2, index_dim=1, num_selected=3)
    assert spec.read_bytes(2) == 2 * 2 + 2 * 8
    assert spec.read_bytes(50) == 50 * 2 + 3 * 8


def test_retrieval_in_blocks_reads_no_more_of_its_own_block_than_there_is():
    spec = RetrievalState(1, 2, 2, index_dim=1, num_selected=6, index_block=2)
    read = {n: min(n, 4 + n % 2) for n in (0, 1, 3, 4, 5, 50, 51)}  # two whole blocks, and what its own has before it
    assert {n: spec.read_bytes(n) for n in read} == {n: n * 2 + slots * 8 for n, slots in read.items()}


@pytest.mark.parametrize("block", [6, 4, 7])
def test_blocks_of_a_retrieval_go_into_what_is_selected(block):
    with pytest.raises(ValueError, match=f"index_block = {block}: must be 0, or go into num_selected = 6 twice"):
        RetrievalState(1, 2, 2, index_dim=1, num_selected=6, index_block=block)


def test_a_latent_is_one_array_of_which_values_are_a_part():
    (keys,) = LatentState(512, 64).arrays
    assert (keys.name, keys.shape) == ("keys", (1, 576))


def test_recurrent_bytes_do_not_grow():
    spec = RecurrentState((ArraySpec("ssm", (2, 4, 8), "float32"), ArraySpec("history", (3, 5), "bfloat16")))
    assert spec.logical_bytes(1) == spec.logical_bytes(10_000) == 2 * 4 * 8 * 4 + 3 * 5 * 2
    assert live_pages(spec, 9, 4) == ()


def test_a_spec_without_bytes_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        State()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenState(0, 1, 1), "num_kv_heads = 0: must be at least 1"),
        (lambda: TokenState(1, 1, 1, visible=Visible(window=0)), "window = 0"),
        (lambda: TokenState(1, 1, 1, visible=Visible(num_sinks=2)), "num_sinks = 2: .* 0 without a window"),
        (lambda: TokenState(1, 1, 1, visible=Visible(window=3, chunk=2)), "chunk = 2: must be None beside window = 3"),
        (lambda: TokenState(1, 1, 1, dtype="float31").unit_bytes, "dtype = 'float31'"),
        (lambda: ArraySpec("x", (3,), "int4"), "does not fill whole bytes"),
        (lambda: ArraySpec("x", (0,), "int8"), "every axis must be at least 1"),
    ],
)
def test_impossible_states_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
