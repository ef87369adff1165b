"""How pages hold keys and values: as they are, or as numbers of 8 or 4 bits with scales (arXiv 2402.02750).

    pages = quantised(tokens, "int8", "token")      # from [..., page, D]
    pages.values()                                  # float32 [..., page, D] again

Two numbers of 4 bits share a byte: the low half of byte i is dim i, the high half dim i + D / 2. So a kernel that has
unpacked a tile holds its two halves and need not interleave them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.typing import Float, Shaped

type Scaling = Literal["token", "channel"]
"""What has a scale of its own in a page and head: each token, or each channel (each dim, over the page's tokens)."""

FORMATS: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.uint8}
"""What can be quantised to, and the type that stores it."""
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
"""The magnitude that a format's largest number stands for, before scales."""
INVERSE = {format: float(np.float32(1) / np.float32(largest)) for format, largest in LARGEST.items()}
"""One over it: compilers divide by constants in ways of their own, and scales are to be the same everywhere."""
FAINT = 2.0**-107
"""What is nowhere as large (6e-33) is stored as zeros. Some chips take float32 below 2 ** -126 for zero, others do not:
with a scale of 2 ** -107 over a format's largest number, what they differ in becomes zero in every format."""


@partial(jax.tree_util.register_dataclass, data_fields=["payload", "scales"], meta_fields=["per", "bytes_of"])
@dataclass(frozen=True)
class Quantised:
    """Pages [P, K, page, D] (or any tiles [..., page, D]) of a format of `FORMATS`. What a slot holds is payload *
    scale.

    `payload` is int8 or float8_e4m3fn [..., page, D], or uint8 [..., page, D / 2] for two numbers of 4 bits each;
    `scales` float32 [..., page], one for each token, or [..., D], one for each channel, as `per` says. With `bytes_of`
    the payload are the bytes of numbers in that format, in uint8: what XLA on a CPU writes to in place."""

    payload: Any
    scales: Any
    per: Scaling = "token"
    bytes_of: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is stored: [..., page, D]."""
        *leading, dim = self.payload.shape
        return (*leading, 2 * dim if self.format == "int4" else dim)

    @property
    def ndim(self) -> int:
        return self.payload.ndim

    @property
    def dtype(self) -> Any:
        """The payload's."""
        return self.payload.dtype

    @property
    def format(self) -> str:
        """A key of `FORMATS`. Raises ValueError for a payload of another type."""
        if self.bytes_of is not None:
            return self.bytes_of
        for name, dtype in FORMATS.items():
            if self.payload.dtype == dtype:
                return name
        legal = ", ".join(f"{jnp.dtype(dtype).name} ({name})" for name, dtype in FORMATS.items())
        raise ValueError(f"payload: type {self.payload.dtype.name} is of no format; legal: {legal}")

    def __len__(self) -> int:
        return len(self.payload)

    def each(self, do: Callable[[Array], Array]) -> "Quantised":
        """With both arrays replaced: for what concerns their leading axes, which they share."""
        return replace(self, payload=do(self.payload), scales=do(self.scales))

    def values(self) -> Float[Array, "*leading page D"]:
        """What is stored, in float32."""
        if self.format == "int4":
            numbers = unpacked(self.payload)
        else:
            numbers = jax.lax.bitcast_convert_type(self.payload, FORMATS[self.format]).astype(jnp.float32)
        return numbers * (self.scales[..., :, None] if self.per == "token" else self.scales[..., None, :])


type Stored = Array | Quantised
"""What holds keys or values: an array as it is, or a `Quantised` one."""
ROUND, ROUND_BITS = 1.5 * 2**23, 0x4B400000
"""Added to a float32 below 2 ** 22, it leaves the nearest whole number, half to even, in the bits above its own: what
kernels can do. Taken away as a float instead, some compilers see nothing done."""


def format_of(pages: Stored) -> str:
    """ "int8", "fp8", "int4", or the name of the type that pages are stored in as they are."""
    if isinstance(pages, Quantised):
        return pages.format
    return f"{pages.dtype.name} without scales" if pages.dtype.name in FORMATS else pages.dtype.name


def each_array(pages: Stored, do: Callable[[Array], Array]) -> Stored:
    """`do` with every array of pages: for what concerns the axes [P, K], which all of them begin with."""
    return pages.each(do) if isinstance(pages, Quantised) else do(pages)


def arrays_of(pages: Stored) -> list[Array]:
    """The arrays behind pages: the payload, then scales."""
    return [pages.payload, pages.scales] if isinstance(pages, Quantised) else [pages]


def tile_values(tiles: Stored) -> Array:
    """What tiles hold: float32 where they were quantised."""
    return tiles.values() if isinstance(tiles, Quantised) else tiles


def scales_for(tokens: Float[Array, "... page D"], format: str, per: Scaling) -> Float[Array, "... n"]:
    """The scales with which the largest magnitude just fits; what is zero throughout gets a scale of zero."""
    return scales_of(jnp.abs(tokens.astype(jnp.float32)).max(axis=-1 if per == "token" else -2), format)


def scales_of(largest: Float[Array, "*shape"], format: str) -> Float[Array, "*shape"]:
    """The scales for largest magnitudes; zero for those below `FAINT`. Kernels use it as well."""
    return jnp.where(largest < FAINT, 0, largest) * INVERSE[format]


def encoded(tokens: Float[Array, "... page D"], scales: Float[Array, "... n"], format: str, per: Scaling) -> Array:
    """The payload: tokens times one over their scales, rounded to nearest even, beyond the largest number cut off."""
    inverse = inverses(scales)
    made = numbers(
        tokens.astype(jnp.float32) * (inverse[..., :, None] if per == "token" else inverse[..., None, :]), format
    )
    return packed(made) if format == "int4" else made.astype(FORMATS[format])


def numbers(scaled: Float[Array, "*shape"], format: str) -> Shaped[Array, "*shape"]:
    """A format's numbers for what has been scaled: rounded to nearest even, beyond the largest cut off; whole ones in
    int32. It asks for nothing that a kernel cannot do."""
    largest = LARGEST[format]
    inside = jnp.minimum(jnp.maximum(scaled, -largest), largest)
    if format == "fp8":
        return inside.astype(FORMATS[format])
    return jax.lax.bitcast_convert_type(inside + ROUND, jnp.int32) - ROUND_BITS


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


def quantised(tokens: Float[Array, "... page D"], format: str, per: Scaling = "token") -> Quantised:
    """Tokens in a format, with the scales that they ask for. Raises ValueError for what is none, and for 4 bits of odd
    dims."""
    check_format(format, per, tokens.shape)
    scales = scales_for(tokens, format, per)
    return Quantised(encoded(tokens, scales, format, per), scales, per)


def check_format(format: str, per: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError for what is no format or no scaling, for an odd dim in 4 bits, and for tokens that are none."""
    if 0 in shape or len(shape) < 2:
        raise ValueError(f"tokens = {shape}: must be [..., page, D], with one at least of each")
    if format not in FORMATS:
        raise ValueError(f"format = {format!r}: must be one of {', '.join(FORMATS)}")
    if per not in ("token", "channel"):
        raise ValueError(f"per = {per!r}: must be token or channel")
    if format == "int4" and shape[-1] % 2:
        raise ValueError(f"head dim = {shape[-1]}: must be even, where a byte holds two numbers of 4 bits")


def packed(numbers: Shaped[Array, "... D"]) -> Shaped[Array, "... half"]:
    """Whole numbers in [-8, 7] (int32), two in a byte."""
    return in_bytes(*jnp.split(numbers, 2, axis=-1)).astype(jnp.uint8)


def in_bytes(low: Shaped[Array, "*shape"], high: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Two whole numbers in [-8, 7] as the two halves of a byte, still in int32: kernels have halves, and convert in
    their own way."""
    return (low & 15) | jnp.left_shift(high & 15, 4)


def unpacked(payload: Shaped[Array, "... half"]) -> Float[Array, "... D"]:
    """The numbers of 4 bits that bytes hold."""
    whole = payload.astype(jnp.int32)
    halves = [jnp.right_shift(jnp.left_shift(whole, place), 28) for place in (28, 24)]
    return jnp.concatenate(halves, axis=-1).astype(jnp.float32)
