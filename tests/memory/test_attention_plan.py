"""What layers share when they decode: made of the ledger's own plans, and right about them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvlab.ledger.states import ArraySpec, LatentState, RecurrentState, TokenState
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.views import view_of
from kvlab.memory.views.paged import attention_plan
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention import Lists, Pages, gpu, takes_plan
from pallas_kernels.paged_attention.proof import by_api
from pallas_kernels.selection import Asked, Device, as_if_on
from pallas_kernels.visible import Visible

PAGE = 16
FULL = TokenState(2, 64, 64, "bfloat16")
WINDOW = TokenState(2, 64, 64, "bfloat16", visible=Visible(20, 3))
LATENT = LatentState(512, 64)
LENGTHS = {"long": 150, "short": 5}


def decoding(spec, memory="paged"):
    """A class of one layer, and the ledger's plan of one more token for ragged sequences and a row that nobody has."""
    config = MemoryConfig(memory, page_size=PAGE, chunk_len=256)
    layout = MemoryLayout.of([{"kv": spec}], config, max_sequences=3, max_len=256)
    ledger = layout.ledger()
    for name, length in LENGTHS.items():
        for tokens in (length, 1):
            ledger.reserve(name, tokens)
            if tokens > 1:
                ledger.commit(name, tokens)
    plan = ledger.plan(list(LENGTHS), 3, 1)
    return layout.classes[0], plan


def planned(spec, is_taken=True):
    state, plan = decoding(spec)
    starts, counts = jnp.asarray(plan.starts), jnp.asarray(plan.counts)
    return state, plan, attention_plan(state, plan.classes[0], starts, counts, lambda asked: is_taken)


@pytest.mark.parametrize("spec", [FULL, WINDOW, LATENT])
def test_lists_the_pages_that_the_spec_says_are_live(spec):
    _, _, made = planned(spec)
    for row, length in enumerate(LENGTHS.values()):
        pages = {position // PAGE for live in spec.live(length) for position in live} | {length // PAGE}
        found = {int(start) // PAGE for start in made.starts[row, : made.counts[row]]}
        assert found == pages
    assert made.counts[2] == 0, "nobody's row"


@pytest.mark.parametrize("spec", [FULL, WINDOW, LATENT])
def test_the_gpu_kernel_answers_by_it_as_the_reference_does_without(spec):
    state, plan, made = planned(spec)
    keys = jax.random.split(jax.random.key(0), 3)
    num_kv_heads, dim = (1, 576) if spec is LATENT else (2, 64)
    shape = (state.num_pages, num_kv_heads, PAGE, dim)
    pools = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2]]
    pages = Pages(pools[0], value_dim=512) if spec is LATENT else Pages(*pools)
    queries = jax.random.normal(keys[2], (3, 1, 4, dim), jnp.bfloat16)
    lists = Lists(jnp.asarray(plan.classes[0].pages), jnp.asarray(plan.classes[0].page_starts))
    asked = jnp.asarray(plan.starts)[:, None], jnp.asarray(plan.starts + plan.counts)
    arrays = queries, pages, lists, *asked, Scoring(dim**-0.5, visible=spec.visible)
    how = plgpu.InterpretGPUParams(detect_races=True)
    found = gpu.paged_attention(*arrays, plan=made, interpret=how, chip="hopper")[0]
    reset_gpu_interpret_mode_state()
    wanted = by_api(implementation="reference")(*arrays)[0]
    np.testing.assert_allclose(np.float32(found[:2]), np.float32(wanted[:2]), atol=1e-2)


def test_is_made_only_where_it_is_of_use():
    assert planned(FULL, is_taken=False)[2] is None
    recurrent = RecurrentState((ArraySpec("ssm", (4, 4), "float32"),))
    for spec, memory in ((FULL, "dense"), (recurrent, "paged")):
        state, plan = decoding(spec, memory)
        starts, counts = jnp.asarray(plan.starts), jnp.asarray(plan.counts)
        assert view_of(spec, memory).share(state, plan.classes[0], starts, counts) is None
    state, plan = decoding(FULL)
    chunk = plan.classes[0]._replace(write_slots=np.zeros((3, 2), np.int32))
    assert attention_plan(state, chunk, starts, counts, lambda asked: True) is None


@pytest.mark.parametrize(
    ("page_size", "dtype", "taken"), [(64, "bfloat16", True), (96, "bfloat16", False), (64, "float32", False)]
)
def test_a_gpu_makes_one_only_of_pages_that_its_kernel_takes(page_size, dtype, taken):
    with as_if_on(Device("gpu", "NVIDIA H200", "9")):
        assert takes_plan(Asked(dtype, page_size, (64, 64), dtype=dtype)) == taken
        assert takes_plan(Asked(dtype, page_size, (576, 512), dtype=dtype, is_latent=True)) == taken
        assert not takes_plan(Asked(dtype, page_size, (576, 512), dtype=dtype))


def test_a_chunk_of_wide_latent_rows_has_no_kernel():
    """Decoding has, of up to 64 columns: queries times heads."""
    wide = Asked("bfloat16", 64, (576, 512), 16, is_latent=True)
    with as_if_on(Device("gpu", "NVIDIA H200", "9")):
        assert [takes_plan(replace(wide, num_queries=num)) for num in (1, 4, 5)] == [True, True, False]
