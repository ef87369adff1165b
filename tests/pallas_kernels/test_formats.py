"""Pages of 8 and 4 bits: what they hold, and how far that is from what was to be stored."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels.formats import Quantised, format_of, packed, quantised, unpacked


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
