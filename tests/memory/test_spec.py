"""Everything derived from live(n) against brute-force masks, for all small sizes."""

import itertools

import pytest

from kvlab.memory.spec import ArraySpec, RecurrentState, StateSpec, TokenState, max_pages_for_step, pages_for_step

SPECS = [TokenState(1, 1, 1)] + [
    TokenState(1, 1, 1, window=window, num_sinks=sinks) for window in (1, 2, 3, 5, 8) for sinks in (0, 1, 3)
]


def visible_by_mask(spec: TokenState, n: int) -> set[int]:
    """Positions that token n reads besides itself, straight from the definition of a window."""
    if spec.window is None:
        return set(range(n))
    return {p for p in range(n) if n - p < spec.window or p < spec.num_sinks}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_live_is_the_mask(spec):
    for n in range(40):
        ranges = spec.live(n)
        positions = [p for one in ranges for p in one]
        assert positions == sorted(visible_by_mask(spec, n))
        assert spec.live_len(n) == len(positions)
        assert spec.logical_bytes(n) == len(positions) * spec.unit_bytes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pages_for_step_are_those_with_a_needed_slot(spec):
    for start, new, page in itertools.product(range(20), range(1, 7), (1, 2, 4, 5)):
        needed = {p for n in range(start, start + new) for p in visible_by_mask(spec, n)} | set(
            range(start, start + new)
        )
        assert pages_for_step(spec, start, new, page) == tuple(sorted({p // page for p in needed}))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_max_pages_bounds_every_step_and_is_nearly_reached(spec):
    for max_len, chunk, page in itertools.product((1, 7, 24), (1, 3, 8), (1, 2, 4, 5)):
        chunk = min(chunk, max_len)
        held = [len(pages_for_step(spec, start, min(chunk, max_len - start), page)) for start in range(max_len)]
        bound = max_pages_for_step(spec, max_len, chunk, page)
        assert max(held) <= bound <= max(held) + 2


def test_published_bytes_per_token():
    """Llama-3-70B: 80 layers, 8 KV heads of 128, bf16 (FIGURES: 327,680 bytes a token; MHA 2,621,440; MQA 40,960)."""
    for heads, expected in ((8, 327_680), (64, 2_621_440), (1, 40_960)):
        assert 80 * TokenState(heads, 128, 128, "bfloat16").unit_bytes == expected
    assert 40 * TokenState(40, 128, 128, "float16").unit_bytes == 819_200  # OPT-13B


def test_recurrent_bytes_do_not_grow():
    spec = RecurrentState((ArraySpec("ssm", (2, 4, 8), "float32"), ArraySpec("history", (3, 5), "bfloat16")))
    assert spec.logical_bytes(1) == spec.logical_bytes(10_000) == 2 * 4 * 8 * 4 + 3 * 5 * 2


def test_a_spec_without_bytes_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        StateSpec()
