"""What decoding on GPUs is asked for and serves, in thread blocks, registers and shared memory."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats import FORMATS, Scheme, kivi, quantised
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention import Lists, Pages, gpu, gpu_decode
from pallas_kernels.paged_attention.gpu_decode_tiles import fit, parts_of_columns, producers_for, scratch_for
from pallas_kernels.paged_attention.gpu_tiles import SHARED_BYTES
from pallas_kernels.visible import Visible


def test_what_is_served():
    """Values of any dims from 64 on, whatever keys have; of fewer, no product has as many rows."""
    for value_dim in range(16, 257, 16):
        reason = gpu_decode.refusal((128, value_dim), None, 8, 64)
        assert reason == (
            None if value_dim >= 64 else f"head dim of values = {value_dim}: must be at least 64, the rows of a product"
        )
    for scheme in (Scheme("int8"), Scheme("fp8"), Scheme("int4")):
        assert all(gpu_decode.refusal((dim, dim), (scheme, scheme), 8, 64) is None for dim in (96, 160, 224))


OPTIONS = [
    (schemes, page_size, with_page_mass)
    for schemes, sizes in (
        (None, (8, 16, 32, 64)),
        *(((scheme, scheme), (32, 64)) for scheme in (Scheme("fp8"), Scheme("int4", "channel"))),
        (kivi("int4", "int4"), (64,)),
        (kivi("int4", "int4", 64), (64,)),
    )
    for page_size in sizes
    for with_page_mass in (False, True)
]


@pytest.mark.parametrize(("chip", "step"), [("hopper", 8), ("blackwell", 16)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_every_column_has_one_thread_block(dim, chip, step):
    """Whatever the pages are in: none is refused, none is left over, and no thread block has nothing but padding."""
    for (schemes, page_size, with_page_mass), asked in itertools.product(OPTIONS, range(8, 65, 8)):
        if schemes and any(dim % step_of(scheme) for scheme in schemes):
            continue
        reason = gpu_decode.refusal((dim, dim), schemes, asked, page_size, chip)
        how = {"with_page_mass": with_page_mass, "chip": chip}
        num_parts, mine = parts_of_columns(asked, (dim, dim), schemes, page_size, **how)
        assert reason is None, (schemes, page_size, asked)
        assert (num_parts - 1) * mine < asked <= num_parts * mine <= 64
        assert mine % (8 if schemes and schemes[1].group == 32 else step) == 0


def test_two_warpgroups_convert_where_registers_leave_room_for_a_second_thread_block():
    """By token at 8 columns: the problems of the bench. 16 bits have nothing to convert; scales by channel and 16
    columns at 128 dims take the registers of one thread block, so that a third warpgroup would cost the other."""
    ask = partial(producers_for, page_size=64, with_page_mass=False)
    for format in ("int8", "fp8", "int4"):
        by_token, by_channel = Scheme(format), Scheme(format, "channel")
        assert [ask(8, (dim, dim), (by_token, by_token)) for dim in (64, 128, 256)] == [2, 2, 2]
        assert ask(16, (128, 128), (by_token, by_token)) == ask(8, (128, 128), (by_channel, by_channel)) == 1
    assert ask(8, (128, 128), None) == 1


MOST_CARRIED = 80
"""Registers of a thread that carry numbers from one block of tokens to the next: a third of all, for products and
weights take as many again. Sums of zero points come on top."""


@pytest.mark.parametrize("dim", [64, 128])
def test_registers_hold_what_a_thread_carries(dim):
    """Of 64 query heads for a KV head, as the traced program has it, whatever the pages are in. What ptxas makes of it
    is in `make kernels-check`."""
    array = lambda *shape, of=jnp.int32: jax.ShapeDtypeStruct(shape, of)  # noqa: E731
    for schemes, page_size, with_page_mass in OPTIONS:
        if schemes is None and 8 < page_size < 64:
            continue
        pools = [jax.eval_shape(partial(_pool, of, page_size, dim)) for of in schemes or (None, None)]
        scoring = Scoring(0.1, 30.0, Visible(100, 4), with_page_mass)
        asked = array(2, 1, 64, dim, of=jnp.bfloat16), Pages(*pools)
        lists = Lists(array(2, 4), array(2, 4), array(2, 4, page_size, of=jnp.bool))
        traced = jax.make_jaxpr(lambda *given, scoring=scoring: gpu.paged_attention(*given, scoring, chip="hopper"))(
            *asked, lists, array(2, 1), array(2)
        )
        most = MOST_CARRIED + (32 if schemes and schemes[1].has_zeros else 0)
        assert 16 <= carried_by_thread(traced.jaxpr) <= most, (schemes, page_size, with_page_mass)


def carried_by_thread(jaxpr: Any) -> int:
    """Float32 numbers that come into a turn of the loop that carries most, in each of a warpgroup's 128 threads."""
    most = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("while", "scan"):
            found = [value.aval for value in equation.invars if isinstance(value.aval, jax.core.ShapedArray)]
            most = max(most, sum(array.size for array in found if array.dtype == jnp.float32) // 128)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                most = max(most, carried_by_thread(inner))
    return most


# Shared memory.


def said(schemes: tuple[Scheme, Scheme] | None) -> str:
    """As the name of a case."""
    return "16 bits" if schemes is None else " and ".join(f"{scheme.format} by {scheme.per}" for scheme in schemes)


PLAIN: list[tuple[Scheme, Scheme]] = [
    (scheme, scheme) for format in FORMATS for scheme in (Scheme(format), Scheme(format, "channel"))
]


@pytest.mark.parametrize("schemes", [None, *PLAIN, kivi("int4", "int2"), kivi("int2", "int4", 64)], ids=said)
@pytest.mark.parametrize("chip", ["hopper", "blackwell"])
def test_what_fits_is_what_the_scratch_takes(schemes, chip):
    """Of every shape that is not refused: in whole KiB, below the limit, and at most 32 barriers together."""
    seen = 0
    for dims in ((64, 64), (128, 128), (256, 256), (80, 128), (128, 80), (96, 96), (64, 160)):
        for asked in (8, 24, 64):
            for page_size in (8, 32, 64):
                least = 32 if schemes and schemes[1].group is None else 64
                if schemes and (
                    page_size < least or any(dim % step_of(of) for dim, of in zip(dims, schemes, strict=True))
                ):
                    continue
                if gpu_decode.refusal(dims, schemes, asked, page_size, chip):
                    continue
                how = {"with_page_mass": True, "chip": chip}
                _, columns = parts_of_columns(asked, dims, schemes, page_size, **how)
                pages = Pages(
                    *(_pool(scheme, page_size, dim) for scheme, dim in zip(schemes or (None,) * 2, dims, strict=True))
                )
                tiles = fit(dims, schemes, columns, page_size, **how)
                dtype = jnp.dtype(jnp.bfloat16)
                scratch = scratch_for(tiles, pages, dtype, dtype, columns, max(1, 64 // page_size), **how)
                sizes = [
                    -(-int(np.prod(ref.shape)) * jnp.dtype(ref.dtype).itemsize // 1024) * 1024
                    for name, ref in scratch.items()
                    if hasattr(ref, "dtype") and not name.startswith("product_")  # tensor memory
                ]
                assert sum(sizes) == tiles.num_bytes <= SHARED_BYTES
                barriers = [int(np.prod(ref.num_barriers)) for ref in scratch.values() if hasattr(ref, "num_barriers")]
                assert max(barriers) <= 32
                in_rows = [ref for name, ref in scratch.items() if name.endswith(("_scales", "_zeros", "pages_out"))]
                row_bytes = [ref.shape[-1] * jnp.dtype(ref.dtype).itemsize for ref in in_rows]
                assert all(size % 128 == 0 for size in row_bytes), "rows that are copied alone are aligned"
                seen += 1
    assert seen > 3


def step_of(scheme: Scheme) -> int:
    """What head dims are multiples of, in a scheme."""
    return 64 if scheme.format == "int2" else scheme.group or 32


def _pool(scheme: Scheme | None, page_size: int, dim: int) -> Any:
    tile = jnp.zeros((1, 1, page_size, dim), jnp.bfloat16)
    return tile if scheme is None else quantised(tile, scheme)
