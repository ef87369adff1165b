"""Rounding that gives the same bits everywhere, in kernels too: whole numbers, inverses of scales, numbers of 16 bits,
several numbers in a byte."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.typing import Float, Shaped

ROUND, ROUND_BITS = 1.5 * 2**23, 0x4B400000
"""Added to a float32 below 2 ** 22, it leaves the nearest whole number, half to even, in the bits above its own: what
kernels can do. Taken away as a float instead, some compilers see nothing done."""


def whole(scaled: Float[Array, "*shape"], least: float, largest: float) -> Shaped[Array, "*shape"]:
    """The nearest whole numbers in [least, largest], half to even, in int32."""
    inside = jnp.minimum(jnp.maximum(scaled, least), largest)
    return jax.lax.bitcast_convert_type(inside + ROUND, jnp.int32) - ROUND_BITS


def rounded(exact: Float[Array, "*shape"], dtype: str, *, up: bool) -> Float[Array, "*shape"]:
    """The nearest numbers of a type of `SCALE_TYPES` that are not smaller, or not larger, still in float32. Bits alone:
    the same everywhere, in kernels too."""
    if dtype == "float32":
        return exact
    bits = jax.lax.bitcast_convert_type(exact, jnp.int32)
    away = bits >= 0 if up else bits < 0  # the lower half of the bits counts away from zero
    cut = jnp.where(away, bits + 0xFFFF, bits) & -0x10000
    return jnp.where(exact == exact, jax.lax.bitcast_convert_type(cut, jnp.float32), exact)


def inverses(
    scales: Float[Array, "*shape"], reciprocal: Callable[[Array], Array] = lambda scales: 1 / scales
) -> Float[Array, "*shape"]:
    """What to multiply with to quantise: the float32 nearest to one over each scale. It is zero for scales outside
    [2 ** -126, 1.5 * 2 ** 125], which no token asks for.

    `reciprocal` may be off by two steps of a float32, as it is on GPUs by one. A Newton step would not mend that: with
    fused products it leaves 3 to 39 of the 2 ** 23 mantissas wrong, and without them a million. So what is missing is
    counted in whole numbers, which nothing rounds and no compiler rewrites: the same bits everywhere."""
    is_legal = (scales >= 2.0**-126) & (scales <= 1.5 * 2.0**125)
    return jnp.where(is_legal, _nearest(scales, reciprocal(jnp.where(is_legal, scales, 1))), 0)


def _nearest(scales: Float[Array, "*shape"], near: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The float32 nearest to one over each scale, from one at most two steps away.

    As whole numbers of 24 bits, the mantissas m of a scale and n of what is nearest have m * n within m / 2 of 2 ** 46
    or 2 ** 47. Both are zero in 32 bits that wrap around: there, twice the product is twice its distance, in steps of
    m."""
    bits = jax.lax.bitcast_convert_type(near, jnp.int32)
    step = _mantissa(jax.lax.bitcast_convert_type(scales, jnp.int32))
    for _ in range(2):
        twice = 2 * (step * _mantissa(bits))
        bits = jnp.where(twice > step, bits - 1, jnp.where(twice + step < 0, bits + 1, bits))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _mantissa(bits: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Of a normal float32, with its leading one."""
    return (bits & 0x7FFFFF) | 0x800000


def in_bytes(*parts: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Whole numbers as the parts of a byte, the first in its lowest bits, still in int32: kernels have the parts, and
    convert in their own way."""
    bits = 8 // len(parts)
    kept = [part & (1 << bits) - 1 for part in parts]
    made = kept[0]
    for place, part in enumerate(kept[1:], 1):
        made = made | jnp.left_shift(part, bits * place)
    return made


def parts_of(whole: Shaped[Array, "*shape"], shared: int, *, is_signed: bool) -> list[Shaped[Array, "*shape"]]:
    """The whole numbers that share bytes (in int32), from the lowest bits on. Kernels use it as well."""
    bits = 8 // shared
    if is_signed:
        ends = [32 - bits * (place + 1) for place in range(shared)]
        return [jax.lax.shift_right_arithmetic(jax.lax.shift_left(whole, end), 32 - bits) for end in ends]
    return [jax.lax.shift_right_logical(whole, bits * place) & ((1 << bits) - 1) for place in range(shared)]


def part_of(
    raw: Shaped[Array, "*shape"], number: int, shared: int, dtype: Any, *, is_signed: bool
) -> Shaped[Array, "*shape"]:
    """One of the `shared` numbers in bytes (uint8), as `parts_of` has them, in a type of 16 bits. It is not moved in
    its byte, which Mosaic converts without the words' slow `I2F`: a power of two puts it in its place, exactly."""
    bits = 8 // shared
    place, is_last = bits * number, number == shared - 1
    kept, added = raw & (((1 << bits) - 1) << place), 0
    if is_signed != is_last:  # its first bit counts against the others, or it is that of a byte that does not
        bit = 1 << (place + bits - 1)
        kept, added = kept ^ bit, bit if is_last else -bit
    found = jax.lax.bitcast_convert_type(kept, jnp.int8).astype(dtype)
    found = found * 2.0**-place if place else found
    return found + added * 2.0**-place if added else found
