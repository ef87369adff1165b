"""Pages of 8 and 4 bits: what they hold, and how far that is from what was to be stored."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels.formats import FAINT, Quantised, format_of, inverses, packed, quantised, scales_for, unpacked


@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize(("format", "bound"), [("int8", 0.5 / 127), ("int4", 0.5 / 7), ("fp8", 2.0**-4)])
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


def test_two_numbers_of_four_bits_share_a_byte():
    numbers = np.random.default_rng(0).integers(-8, 8, (7, 10))
    stored = packed(jnp.asarray(numbers, jnp.int32))
    assert (stored.dtype, stored.shape) == (jnp.uint8, (7, 5))
    np.testing.assert_array_equal(unpacked(stored), numbers)
    np.testing.assert_array_equal(stored & 15, numbers[:, :5] & 15)  # dim i in the low half, i + D / 2 in the high


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


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_what_some_chips_take_for_zero_is_zero(format):
    """With the smallest scale there is, a number below 2 ** -126 rounds to zero, so that it may be one or not."""
    faintest = jnp.full((1, 4), FAINT)
    assert scales_for(faintest, format, "token")[0] >= 2.0**-126
    assert (quantised(faintest * 0.99, format).scales == 0).all()
    subnormal = np.float64(inverses(scales_for(faintest, format, "token"))[0]) * 2.0**-126
    assert np.float32(subnormal).astype(jnp.float8_e4m3fn) == 0
    assert np.rint(subnormal) == 0


@pytest.mark.parametrize(
    ("format", "per", "dim", "message"),
    [
        ("int3", "token", 8, "format = 'int3': must be one of int8, fp8, int4"),
        ("int8", "page", 8, "per = 'page': must be token or channel"),
        ("int4", "token", 7, "head dim = 7: must be even"),
        ("int8", "token", 0, r"tokens = \(4, 0\): must be \[..., page, D\], with one at least of each"),
    ],
)
def test_what_is_no_format_is_refused(format, per, dim, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would see some of them first
    with pytest.raises(ValueError, match=message):
        quantised(jnp.zeros((4, dim)), format, per)


def test_a_payload_of_another_type_has_no_format():
    with pytest.raises(ValueError, match="type int16 is of no format; legal: int8"):
        _ = Quantised(jnp.zeros((4, 8), jnp.int16), jnp.zeros(4)).format
