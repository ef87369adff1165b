"""Pages of 8 and 4 bits: what they hold, and how far that is from what was to be stored."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels.formats import (
    FAINT,
    Quantised,
    Scheme,
    column_parts,
    format_of,
    packed,
    quantised,
    scales_for,
    unpacked,
)
from pallas_kernels.rounding import inverses, part_of


@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize(("format", "bound"), [("int8", 0.5 / 127), ("int4", 0.5 / 7), ("int2", 0.5), ("fp8", 2.0**-4)])
def test_the_error_is_that_of_rounding(format, per, bound):
    """Of whole numbers half a step of the largest; of floats with three bits behind the point half a step of each."""
    tokens = np.random.default_rng(0).standard_normal((5, 3, 16, 32)).astype(np.float32)
    tokens[0, 0] = 0
    pages = quantised(jnp.asarray(tokens), format, per)
    assert pages.shape == tokens.shape
    assert pages.scales.shape == (5, 3, 16 if per == "token" else 32)
    assert format_of(pages) == format
    largest = np.abs(tokens).max(axis=-1 if per == "token" else -2, keepdims=True)
    error = np.abs(np.asarray(pages.values()) - tokens)
    assert (error <= bound * (largest if format != "fp8" else np.abs(tokens) + largest * 2**-6) * 1.0001).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shared", [2, 4])
@pytest.mark.parametrize("is_signed", [True, False])
def test_what_shares_a_byte_is_exact_in_16_bits(dtype, shared, is_signed):
    """Every byte there is, and every place in it, as kernels take them apart: by Python's own whole numbers."""
    bits = 8 // shared
    for number in range(shared):
        found = part_of(jnp.arange(256, dtype=jnp.uint8), number, shared, dtype, is_signed=is_signed)
        codes = [byte >> bits * number & 2**bits - 1 for byte in range(256)]
        assert found.dtype == dtype
        assert found.tolist() == [code - 2**bits * (is_signed and code >= 2 ** (bits - 1)) for code in codes]


def test_two_numbers_of_four_bits_share_a_byte():
    numbers = np.random.default_rng(0).integers(-8, 8, (7, 10))
    stored = packed(jnp.asarray(numbers, jnp.int32))
    assert (stored.dtype, stored.shape) == (jnp.uint8, (7, 5))
    np.testing.assert_array_equal(unpacked(stored), numbers)
    np.testing.assert_array_equal(stored & 15, numbers[:, :5] & 15)  # dim i in the low half, i + D / 2 in the high


def test_four_numbers_of_two_bits_share_a_byte():
    numbers = np.random.default_rng(0).integers(-2, 2, (7, 12))
    stored = packed(jnp.asarray(numbers, jnp.int32), 4)
    assert (stored.dtype, stored.shape) == (jnp.uint8, (7, 3))
    np.testing.assert_array_equal(unpacked(stored, 4), numbers)
    np.testing.assert_array_equal(unpacked(stored, 4, is_signed=False), numbers & 3)
    for part in range(4):  # dim i + part * D / 4
        np.testing.assert_array_equal(stored >> 2 * part & 3, numbers[:, 3 * part : 3 * part + 3] & 3)


@pytest.mark.parametrize("steps", [-2, -1, 0, 1, 2])
def test_inverses_are_the_nearest_whatever_a_chip_takes_for_one_over(steps):
    """Every mantissa, and an answer that is some steps of a float32 away; exponents to both ends."""

    def near(scales: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(1 / scales, jnp.int32) + steps
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    mantissas = np.arange(2**23, dtype=np.uint32)
    exponents = np.arange(1, 252, dtype=np.uint32)[:, None] << 23
    some = exponents | np.r_[mantissas[:9], mantissas[-9:], mantissas[:: 2**18 - 1]]
    scales = np.r_[mantissas | 127 << 23, some.flatten()].astype(np.uint32).view(np.float32)
    found = jax.jit(lambda scales: inverses(scales, near))(scales)
    np.testing.assert_array_equal(found, np.float32(1) / scales)


def test_scales_that_no_token_asks_for_have_no_inverse():
    """Zero, what some chips take for zero, what has an inverse that some chips take for zero, and what is no number."""
    tiny = np.uint32([0, 1, 0x7FFFFF]).view(np.float32)
    scales = np.r_[tiny, np.float32([2.0**126, np.inf, np.nan, -1])]
    np.testing.assert_array_equal(inverses(jnp.asarray(scales)), np.zeros(7))


@pytest.mark.parametrize("format", ["int8", "fp8", "int4", "int2"])
def test_what_some_chips_take_for_zero_is_zero(format):
    """With the smallest scale there is, a number below 2 ** -126 rounds to zero, so that it may be one or not."""
    faintest = jnp.full((1, 4), FAINT)
    assert scales_for(faintest, format, "token")[0] >= 2.0**-126
    assert (quantised(faintest * 0.99, format).scales == 0).all()
    subnormal = np.float64(inverses(scales_for(faintest, format, "token"))[0]) * 2.0**-126
    assert np.float32(subnormal).astype(jnp.float8_e4m3fn) == 0
    assert np.rint(subnormal) == 0


@pytest.mark.parametrize(
    ("scheme", "dim", "message"),
    [
        ({"format": "int3"}, 8, "format = 'int3': must be one of int8, fp8, int4, int2"),
        ({"format": "int8", "per": "page"}, 8, "per = 'page': must be token or channel"),
        ({"format": "int4"}, 7, "head dim = 7: must be even"),
        ({"format": "int2"}, 6, "head dim = 6: must be a multiple of 4"),
        ({"format": "int8"}, 0, r"tokens = \(4, 0\): must be \[..., page, D\], with one at least of each"),
        ({"format": "int8", "has_zeros": True}, 8, "has_zeros = True, format = 'int8': must be one of int4, int2"),
        ({"format": "int4", "group": 3}, 8, "group = 3: must divide the head dim 8"),
        ({"format": "int4", "group": 0}, 8, "group = 0: must divide the head dim 8"),
        ({"format": "int4", "per": "channel", "group": 4}, 8, "group = 4: must be None by channel"),
        ({"format": "int4", "scale_dtype": "float16"}, 8, "scale_dtype = 'float16': must be one of float32, bfloat16"),
    ],
)
def test_what_is_no_scheme_is_refused(scheme, dim, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would see some of them first
    with pytest.raises(ValueError, match=message):
        quantised(jnp.zeros((4, dim)), Scheme(**scheme))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"payload": jnp.zeros((4, 8), jnp.int16)}, "pages.payload of int16: must be int8 or uint8 for int8"),
        ({"scales": jnp.zeros(8)}, r"pages.scales = \(8,\): must be \(4,\), one for each token"),
        ({"scales": jnp.zeros(4, jnp.float16)}, "pages.scales of float16: must be float32 or bfloat16"),
        (
            {"format": "int4", "payload": jnp.zeros((4, 4), jnp.uint8), "group": 4},
            r"must be \(2, 4\), one for each 4 ch",
        ),
        ({"format": "int4", "payload": jnp.zeros((4, 4), jnp.int8)}, "pages.payload of int8: must be uint8 for int4"),
        (
            {"format": "int2", "payload": jnp.zeros((4, 2), jnp.uint8), "zeros": jnp.zeros(4, jnp.bfloat16)},
            "pages.zeros of bfloat16: must be of the scales' type",
        ),
        (
            {"format": "int2", "payload": jnp.zeros((4, 2), jnp.uint8), "zeros": jnp.zeros(8)},
            r"pages.zeros = \(8,\): must be \(4,\), one for each token",
        ),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(changes, message):
    arrays = {"payload": jnp.zeros((4, 8), jnp.int8), "scales": jnp.zeros(4), "format": "int8"}
    with pytest.raises(ValueError, match=message):
        Quantised(**arrays | changes).check("pages")


def test_every_code_of_fp8_is_its_number():
    codes = jnp.arange(256, dtype=jnp.uint8)
    numbers = np.asarray(codes.view(jnp.float8_e4m3fn)).astype(np.float32)
    assert np.isnan(numbers).sum() == 2
    tiles = Quantised(codes[None], jnp.full((1,), 2.0), "fp8")
    np.testing.assert_array_equal(np.asarray(column_parts(tiles)[0])[0], 2 * numbers)


@pytest.mark.parametrize(
    ("format", "has_zeros", "num_parts"),
    [("int8", False, 1), ("int4", False, 2), ("int4", True, 2), ("int2", False, 4), ("int2", True, 4)],
)
@pytest.mark.parametrize(("per", "group"), [("token", None), ("token", 4), ("channel", None)])
def test_parts_of_columns_are_the_values(format, has_zeros, num_parts, per, group):
    tokens = jax.random.normal(jax.random.key(0), (3, 4, 16))
    tiles = quantised(tokens, Scheme(format, per, group, has_zeros))
    parts = column_parts(tiles)
    assert len(parts) == num_parts
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=-1), tiles.values())
