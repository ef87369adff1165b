"""Whole pages, quantised at once into a pool: what they hold, and that the pool is not copied for it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats import Scheme, arrays_of, kivi, quantised
from pallas_kernels.pages import Pages
from pallas_kernels.sealing import allocated, seal_into, seal_pages, write_pages

SHAPE = (6, 2, 16, 32)
SCHEMES = [
    *kivi("int4", "int2"),
    *kivi("int2", "int4", group=8),
    Scheme("int8", "channel"),
    Scheme("fp8"),
    Scheme("int4", scale_dtype="bfloat16"),
]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def tiles_of(num_pages: int, dtype: str = "bfloat16", seed: int = 0) -> jax.Array:
    return jnp.asarray(3 + np.random.default_rng(seed).standard_normal((num_pages, *SHAPE[1:])), dtype)


def bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


@by_scheme
def test_pages_are_written_where_they_belong_and_nothing_else_is(scheme):
    """Every other bit stays; a page whose id is outside the pool is dropped, at both ends."""
    pool = allocated(SHAPE, scheme)
    pool = pool.each(lambda array: jnp.full_like(array, 7))
    sealed = seal_pages(tiles_of(4), scheme)
    after = jax.jit(write_pages)(pool, sealed, jnp.asarray([4, -1, 1, 6], jnp.int32))
    after.check("pool")
    assert after.scheme == scheme
    for old, new, page in zip(*map(arrays_of, (pool, after, sealed)), strict=True):
        np.testing.assert_array_equal(bits(new)[[0, 2, 3, 5]], bits(old)[[0, 2, 3, 5]])
        np.testing.assert_array_equal(bits(new)[[4, 1]], bits(page)[[0, 2]])
    np.testing.assert_array_equal(after.values()[4], quantised(tiles_of(4)[0], scheme).values())


@by_scheme
def test_every_page_has_ranges_of_its_own(scheme):
    tiles = tiles_of(3) * jnp.asarray([1, 128, 1 / 64], jnp.bfloat16)[:, None, None, None]
    sealed = seal_pages(tiles, scheme)
    for page, head in np.ndindex(3, 2):
        np.testing.assert_array_equal(sealed.values()[page, head], quantised(tiles[page, head], scheme).values())


def test_slots_that_do_not_count_may_hold_anything():
    scheme = kivi()[0]
    valid = np.arange(16)[None] < np.array([[16], [5], [0]])
    tiles = np.where(valid[:, None, :, None], np.asarray(tiles_of(3, "float32")), np.nan)
    sealed = seal_pages(jnp.asarray(tiles), scheme, jnp.asarray(valid))
    np.testing.assert_array_equal(sealed.values()[1, :, :5], quantised(jnp.asarray(tiles[1, :, :5]), scheme).values())
    assert np.isfinite(np.asarray(sealed.values())).all()


@by_scheme
def test_a_donated_pool_is_not_copied(scheme):
    """XLA's own analysis: the result takes the pool's memory, and what is used beside it does not grow with it."""
    pool = jax.eval_shape(lambda: allocated((4096, *SHAPE[1:]), scheme))
    sealed = jax.eval_shape(lambda: seal_pages(tiles_of(2), scheme))
    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    memory = jax.jit(write_pages, donate_argnums=0).lower(pool, sealed, ids).compile().memory_analysis()
    assert memory is not None
    num_bytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(pool))
    assert num_bytes == 4096 * 2 * scheme.tile_bytes(16, 32)
    assert memory.alias_size_in_bytes == num_bytes
    assert memory.temp_size_in_bytes < 16 * 1024 < num_bytes / 64


def test_full_pages_of_an_open_pool_are_sealed_in_one_program():
    """Both sides, each in its own scheme; padding is dropped, the open pool stays as it is, and no pool is copied."""
    open_pages = Pages(tiles_of(5), tiles_of(5, seed=1))
    of_keys, of_values = (allocated((512, *SHAPE[1:]), scheme) for scheme in kivi("int4", "int2"))
    pool = Pages(of_keys, of_values)
    sources, ids = jnp.asarray([3, 0, 4], jnp.int32), jnp.asarray([9, 512, 2], jnp.int32)
    compiled = jax.jit(seal_into, donate_argnums=0).lower(pool, open_pages, sources, ids).compile()
    memory, num_bytes = compiled.memory_analysis(), pool.num_bytes
    assert memory is not None
    assert memory.alias_size_in_bytes == num_bytes
    assert memory.temp_size_in_bytes < num_bytes / 4
    after = compiled(pool, open_pages, sources, ids)
    for made, given, scheme in zip(after.pools, (tiles_of(5), tiles_of(5, seed=1)), kivi("int4", "int2"), strict=True):
        np.testing.assert_array_equal(made.values()[jnp.asarray([9, 2])], quantised(given, scheme).values()[3:])
        assert not np.asarray(made.values())[[0, 1, 3, 511]].any()


def test_a_latent_pool_has_keys_alone():
    scheme = Scheme("int4", "token", 8, has_zeros=True, scale_dtype="bfloat16")
    pool = Pages(allocated(SHAPE, scheme), value_dim=16)
    after = seal_into(pool, Pages(tiles_of(2), value_dim=16), jnp.asarray([1], jnp.int32), jnp.asarray([5], jnp.int32))
    after.check()
    np.testing.assert_array_equal(after.keys.values()[5], quantised(tiles_of(2)[1], scheme).values())


def test_to_seal_no_pages_changes_nothing():
    scheme = kivi()[0]
    pool = allocated(SHAPE, scheme)
    after = write_pages(pool, seal_pages(tiles_of(0), scheme), jnp.zeros(0, jnp.int32))
    np.testing.assert_array_equal(after.values(), pool.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seal_pages(jnp.zeros((16, 32)), kivi()[0]), r"tiles = \(16, 32\): must be \[n, K, page, D\]"),
        (
            lambda: seal_pages(tiles_of(3), kivi()[0], jnp.ones((3, 2, 16), bool)),
            r"valid = \(3, 2, 16\): must be \(3, 16\), a flag for each slot",
        ),
        (lambda: seal_pages(tiles_of(3), kivi("int4", "int4", 5)[1]), "group = 5: must divide the head dim 32"),
        (
            lambda: write_pages(
                allocated(SHAPE, kivi()[0]), seal_pages(tiles_of(1), kivi()[1]), jnp.zeros(1, jnp.int32)
            ),
            "pages of int4 by token in groups of 32 with zeros, scales of bfloat16: must be of the pool's scheme, int4",
        ),
        (
            lambda: write_pages(
                allocated((6, 2, 8, 32), kivi()[0]), seal_pages(tiles_of(1), kivi()[0]), jnp.zeros(1, jnp.int32)
            ),
            r"pages = \(1, 2, 16, 32\): must be \[n, 2, 8, 32\]",
        ),
        (
            lambda: write_pages(
                allocated(SHAPE, kivi()[0]), seal_pages(tiles_of(1), kivi()[0]), jnp.zeros(2, jnp.int32)
            ),
            r"ids = int32\[2\]: must be int32 \[1\]",
        ),
        (
            lambda: seal_into(
                Pages(tiles_of(2), tiles_of(2)), Pages(tiles_of(2), tiles_of(2)), *[jnp.zeros(1, jnp.int32)] * 2
            ),
            "pool of bfloat16, open pages of bfloat16: only the pool is quantised",
        ),
        (lambda: allocated(SHAPE, replace(kivi()[0], format="int3")), "format = 'int3': must be one of"),
    ],
)
def test_what_does_not_fit_together_is_refused(call, message, monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        call()
