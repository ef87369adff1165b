"""Where copies begin in shared memory: what a chip refuses, and neither a compiler nor a simulator sees."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.alignment import aligned_copies
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention import Lists, Pages, gpu


def trace(row: int, *, is_dynamic: bool):
    """A kernel that copies one row of four out of shared memory, `row` numbers wide."""

    def kernel(which, out, rows):
        place = which[0] if is_dynamic else 1
        plgpu.copy_smem_to_gmem(rows.at[place, plgpu_slice(8)], out)

    plgpu_slice = lambda size: slice(0, size)  # noqa: E731
    made = plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((8,), jnp.float32), scratch_types=[plgpu.SMEM((4, row), jnp.float32)]
    )
    with aligned_copies():
        jax.make_jaxpr(made)(jax.ShapeDtypeStruct((1,), jnp.int32))


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_a_copy_that_begins_between_multiples_of_128_bytes_is_refused(is_dynamic):
    trace(32, is_dynamic=is_dynamic)
    with pytest.raises(ValueError, match=r"copy_smem_to_gmem: .*32 bytes .*multiple"):
        trace(8, is_dynamic=is_dynamic)


@pytest.mark.parametrize("group", [1, 4, 24])
@pytest.mark.parametrize("page_size", [8, 32])
def test_page_sums_of_several_pages_a_block_leave_aligned(group, page_size):
    array = lambda *shape, of=jnp.int32: jax.ShapeDtypeStruct(shape, of)  # noqa: E731
    pool, asked = array(9, 2, page_size, 64, of=jnp.bfloat16), (array(3, 1), array(3))
    memory = Pages(pool, pool), Lists(array(3, 4), array(3, 4))

    def run(*arrays):
        return gpu.paged_attention(*arrays, Scoring(0.1, with_page_mass=True), chip="hopper")

    with aligned_copies():
        jax.make_jaxpr(run)(array(3, 1, 2 * group, 64, of=jnp.bfloat16), *memory, *asked)
