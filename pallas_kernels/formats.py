"""How pages hold keys and values: as they are, or as numbers of 8, 4 or 2 bits with scales (arXiv 2402.02750).

    pages = quantised(tokens, "int8")                      # from [..., page, D]: a scale for each token
    pages = quantised(tokens, Scheme("int2", "channel", has_zeros=True, scale_dtype="bfloat16"))
    pages.values()                                         # float32 [..., page, D] again

Several numbers of 4 or 2 bits share a byte: the lowest bits of byte i are dim i, the next ones dim i + D / 2 (of 2 bits
i + D / 4, and so on). So a kernel that has unpacked a tile holds its parts and need not interleave them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.rounding import in_bytes, inverses, parts_of, rounded, whole
from pallas_kernels.typing import Bool, Float, Shaped

type Scaling = Literal["token", "channel"]
"""What has a scale of its own in a page and head: each token, or each channel (each dim, over the page's tokens)."""

FORMATS: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.uint8, "int2": jnp.uint8}
"""What can be quantised to, and the type that stores it."""
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0, "int2": 1.0}
"""The magnitude that a format's largest number stands for, before scales."""
INVERSE = {format: float(np.float32(1) / np.float32(largest)) for format, largest in LARGEST.items()}
"""One over it: compilers divide by constants in ways of their own, and scales are to be the same everywhere."""
SHARED = {"int4": 2, "int2": 4}
"""How many numbers share a byte, of formats that do."""
STEPS = {"int4": 15.0, "int2": 3.0}
"""The largest code beside a zero point, of formats that can have them: codes are in [0, STEPS]."""
INVERSE_STEPS = {format: float(np.float32(1) / np.float32(steps)) for format, steps in STEPS.items()}
SCALE_TYPES = ("float32", "bfloat16")
"""Of scales and zero points."""
FAINT = 2.0**-107
"""What is nowhere as large (6e-33) is stored as zeros. Some chips take float32 below 2 ** -126 for zero, others do not:
with a scale of 2 ** -107 over a format's largest number, what they differ in becomes zero in every format."""
LOUD = 2.0**125
"""What is larger (4e37) is cut off here beside a zero point, so that no range overflows."""


@dataclass(frozen=True)
class Scheme:
    """How a pool is quantised, all of it known before anything is compiled.

    Symmetric: a value is number * scale. With `has_zeros` it is code * scale + zero, of codes from 0 on, which waste
    nothing where values lie off zero. Scales, and zeros, are one for each token, or for each `group` channels of it
    that follow one another; or one for each channel of a page. They are of `scale_dtype`, which are bytes too: of
    bfloat16, scales are rounded up and zeros down, so that nothing lies outside."""

    format: str
    per: Scaling = "token"
    group: int | None = None
    has_zeros: bool = False
    scale_dtype: str = "float32"

    @property
    def is_plain(self) -> bool:
        """Whether format and `per` say all."""
        return self == Scheme(self.format, self.per)

    def scales_shape(self, page_size: int, dim: int) -> tuple[int, ...]:
        """Of scales, and of zeros, behind the leading axes: [page] or [D / group, page] by token, [D] by channel."""
        if self.per == "channel":
            return (dim,)
        return (page_size,) if self.group is None else (dim // self.group, page_size)

    def payload_bytes(self, page_size: int, dim: int) -> int:
        """Bytes of the numbers in a page of one head."""
        return page_size * dim * jnp.dtype(FORMATS[self.format]).itemsize // SHARED.get(self.format, 1)

    def tile_bytes(self, page_size: int, dim: int) -> int:
        """Bytes of a page of one head: numbers, scales and zeros."""
        num_scales = int(np.prod(self.scales_shape(page_size, dim))) * (1 + self.has_zeros)
        return self.payload_bytes(page_size, dim) + num_scales * jnp.dtype(self.scale_dtype).itemsize

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError for what is no scheme, or none for tiles [..., page, D] of this shape."""
        if 0 in shape or len(shape) < 2:
            raise ValueError(f"tokens = {shape}: must be [..., page, D], with one at least of each")
        if self.format not in FORMATS:
            raise ValueError(f"format = {self.format!r}: must be one of {', '.join(FORMATS)}")
        if self.per not in ("token", "channel"):
            raise ValueError(f"per = {self.per!r}: must be token or channel")
        if self.scale_dtype not in SCALE_TYPES:
            raise ValueError(f"scale_dtype = {self.scale_dtype!r}: must be one of {', '.join(SCALE_TYPES)}")
        dim, shared = shape[-1], SHARED.get(self.format, 1)
        if dim % shared:
            said = "even, where a byte holds two numbers of 4 bits"
            if shared == 4:
                said = "a multiple of 4, where a byte holds four numbers of 2 bits"
            raise ValueError(f"head dim = {dim}: must be {said}")
        if self.has_zeros and self.format not in STEPS:
            raise ValueError(f"has_zeros = True, format = {self.format!r}: must be one of {', '.join(STEPS)}")
        if self.group is not None and (self.per != "token" or self.group < 1 or dim % self.group):
            said = f"must divide the head dim {dim}" if self.per == "token" else "must be None by channel"
            raise ValueError(f"group = {self.group}: {said}")

    def __str__(self) -> str:
        grouped = "" if self.group is None else f" in groups of {self.group}"
        zeros = " with zeros" if self.has_zeros else ""
        return f"{self.format} by {self.per}{grouped}{zeros}, scales of {self.scale_dtype}"


def kivi(keys: str = "int4", values: str = "int4", group: int = 32) -> tuple[Scheme, Scheme]:
    """What KIVI makes of keys and of values (arXiv 2402.02750): keys by channel, in which their outliers lie, values by
    token in groups of channels, both with zeros and scales of bfloat16. A page of p tokens and D dims takes p D b / 8 +
    4 D bytes for the keys of a head, p D b / 8 + 4 p D / group for its values."""
    of_values = Scheme(values, "token", group, has_zeros=True, scale_dtype="bfloat16")
    return Scheme(keys, "channel", has_zeros=True, scale_dtype="bfloat16"), of_values


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["payload", "scales", "zeros"],
    meta_fields=["format", "per", "group"],
)
@dataclass(frozen=True)
class Quantised:
    """Pages [P, K, page, D] (or any tiles [..., page, D]) of a format of `FORMATS`. What a slot holds is payload *
    scale, plus its zero where there are `zeros`.

    `payload` is int8 or float8_e4m3fn [..., page, D], or uint8 [..., page, D / 2] or [..., page, D / 4] for numbers of
    4 or 2 bits; it may also be the same bytes in uint8, which XLA on a CPU writes to in place. `scales`, and `zeros` if
    any, are float32 or bfloat16: [..., page], one for each token; [..., D / group, page], one for each `group` channels
    of a token; or [..., D], one for each channel, as `per` says. Beside zeros, codes begin at 0."""

    payload: Any
    scales: Any
    format: str
    per: Scaling = "token"
    group: int | None = None
    zeros: Any = None

    @property
    def scheme(self) -> Scheme:
        """How it is quantised."""
        return Scheme(self.format, self.per, self.group, self.zeros is not None, self.scales.dtype.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is stored: [..., page, D]."""
        *leading, dim = self.payload.shape
        return (*leading, dim * SHARED.get(self.format, 1))

    @property
    def ndim(self) -> int:
        return self.payload.ndim

    @property
    def dtype(self) -> Any:
        """The payload's."""
        return self.payload.dtype

    def __len__(self) -> int:
        return len(self.payload)

    def each(self, do: Callable[[Array], Array]) -> "Quantised":
        """With all arrays replaced: for what concerns their leading axes, which they share."""
        zeros = None if self.zeros is None else do(self.zeros)
        return replace(self, payload=do(self.payload), scales=do(self.scales), zeros=zeros)

    def values(self) -> Float[Array, "*leading page D"]:
        """What is stored, in float32."""
        if self.format in SHARED:
            numbers = unpacked(self.payload, SHARED[self.format], is_signed=self.zeros is None)
        else:
            numbers = jax.lax.bitcast_convert_type(self.payload, FORMATS[self.format]).astype(jnp.float32)
        found = numbers * spread(self.scales, self.per, self.group)
        return found if self.zeros is None else found + spread(self.zeros, self.per, self.group)

    def check(self, name: str) -> None:
        """Raises ValueError for arrays that do not fit together."""
        legal = [jnp.dtype(dtype) for dtype in dict.fromkeys((FORMATS.get(self.format, jnp.uint8), jnp.uint8))]
        if self.payload.dtype not in legal:
            said = f"must be {' or '.join(dtype.name for dtype in legal)} for {self.format}"
            raise ValueError(f"{name}.payload of {self.payload.dtype.name}: {said}")
        wanted, what = (), "each channel"
        for part, array in (("scales", self.scales), ("zeros", self.zeros)):
            if array is None:
                continue
            if array.dtype.name not in SCALE_TYPES or array.dtype != self.scales.dtype:
                said = "of the scales' type" if part == "zeros" else " or ".join(SCALE_TYPES)
                raise ValueError(f"{name}.{part} of {array.dtype.name}: must be {said}")
            self.scheme.check(self.shape)
            wanted = (*self.shape[:-2], *self.scheme.scales_shape(*self.shape[-2:]))
            if self.per == "token":
                what = "each token" if self.group is None else f"each {self.group} channels of a token"
            if array.shape != wanted:
                raise ValueError(f"{name}.{part} = {array.shape}: must be {wanted}, one for {what}")


type Stored = Array | Quantised
"""What holds keys or values: an array as it is, or a `Quantised` one."""


def format_of(pages: Stored) -> str:
    """A key of `FORMATS`, or the name of the type that pages are stored in as they are."""
    if isinstance(pages, Quantised):
        return pages.format
    return f"{pages.dtype.name} without scales" if pages.dtype.name in FORMATS else pages.dtype.name


def each_array(pages: Stored, do: Callable[[Array], Array]) -> Stored:
    """`do` with every array of pages: for what concerns the axes [P, K], which all of them begin with."""
    return pages.each(do) if isinstance(pages, Quantised) else do(pages)


def arrays_of(pages: Stored) -> list[Array]:
    """The arrays behind pages: the payload, then scales, then zeros."""
    if not isinstance(pages, Quantised):
        return [pages]
    return [pages.payload, pages.scales, *([] if pages.zeros is None else [pages.zeros])]


def tile_values(tiles: Stored) -> Array:
    """What tiles hold: float32 where they were quantised."""
    return tiles.values() if isinstance(tiles, Quantised) else tiles


def column_parts(tiles: Stored) -> list[Array]:
    """What tiles [..., page, D] hold, in parts of their columns from the first on: one part, or as many as numbers
    share a byte. XLA on a CPU multiplies by each part at once; to join them first costs it more than the product."""
    if isinstance(tiles, Quantised) and tiles.format == "fp8":
        return [_fp8_by_bits(tiles.payload) * spread(tiles.scales, tiles.per, tiles.group)]
    if not isinstance(tiles, Quantised) or tiles.format not in SHARED:
        return [tile_values(tiles)]
    shared = SHARED[tiles.format]
    parts = parts_of(tiles.payload.astype(jnp.int32), shared, is_signed=tiles.zeros is None)
    scales = _by_part(spread(tiles.scales, tiles.per, tiles.group), shared)
    found = [part.astype(jnp.float32) * scale for part, scale in zip(parts, scales, strict=True)]
    if tiles.zeros is None:
        return found
    zeros = _by_part(spread(tiles.zeros, tiles.per, tiles.group), shared)
    return [part + zero for part, zero in zip(found, zeros, strict=True)]


def _fp8_by_bits(payload: Shaped[Array, "... D"]) -> Float[Array, "... D"]:
    """Numbers of float8_e4m3fn in float32, exactly: as those of float16 with the same bits, which are 2^-8 of them. XLA
    on a CPU takes longer over the type itself."""
    codes = jax.lax.bitcast_convert_type(payload, jnp.uint8)
    wide = codes.astype(jnp.uint16)
    halves = jax.lax.bitcast_convert_type((wide & 0x7F) << 7 | (wide & 0x80) << 8, jnp.float16)
    return jnp.where(codes & 0x7F == 0x7F, jnp.nan, halves.astype(jnp.float32) * 256)


def _by_part(spread_out: Array, shared: int) -> list[Array]:
    """Scales or zeros [..., D], by the parts of their columns; [..., 1] are those of every column."""
    return [spread_out] * shared if spread_out.shape[-1] == 1 else jnp.split(spread_out, shared, axis=-1)


def spread(scales: Shaped[Array, "..."], per: Scaling, group: int | None) -> Float[Array, "..."]:
    """Scales or zeros in float32, shaped to meet the tiles [..., page, D] that they belong to."""
    scales = scales.astype(jnp.float32)
    if per == "channel":
        return scales[..., None, :]
    if group is None:
        return scales[..., :, None]
    return jnp.repeat(scales.swapaxes(-1, -2), group, axis=-1)


def scales_for(tokens: Float[Array, "... page D"], format: str, per: Scaling) -> Float[Array, "... n"]:
    """The scales with which the largest magnitude just fits; what is zero throughout gets a scale of zero."""
    return ranges_of(tokens, Scheme(format, per))[0]


def scales_of(largest: Float[Array, "*shape"], format: str) -> Float[Array, "*shape"]:
    """The scales for largest magnitudes; zero for those below `FAINT`. Kernels use it as well."""
    return jnp.where(largest < FAINT, 0, largest) * INVERSE[format]


def ranges_of(
    tokens: Float[Array, "... page D"], scheme: Scheme, valid: Bool[Array, "... page"] | None = None
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """Scales, and zeros if the scheme has them, of its type's numbers but in float32; what is not `valid` has no part
    in them. A range below `FAINT` has a scale of zero."""
    tokens = tokens.astype(jnp.float32)

    def over(take: Callable[..., Array], tokens: Array, unused: float) -> Array:
        if valid is not None:
            tokens = jnp.where(valid[..., :, None], tokens, unused)
        if scheme.group is None:
            return take(tokens, axis=-1 if scheme.per == "token" else -2)
        return take(tokens.reshape(*tokens.shape[:-1], -1, scheme.group), axis=-1).swapaxes(-1, -2)

    if not scheme.has_zeros:
        largest = over(jnp.max, jnp.abs(tokens), 0.0)
        return _rounded_up(scales_of(largest, scheme.format), scheme.scale_dtype), None
    lowest, highest = (
        jnp.clip(over(take, tokens, unused), -LOUD, LOUD) for take, unused in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
    )
    is_there = ~(lowest > highest)
    lowest = jnp.where(is_there & ~(jnp.abs(lowest) < FAINT), lowest, 0)
    zeros = rounded(lowest, scheme.scale_dtype, up=False)
    width = jnp.where(is_there, highest, 0) - zeros
    scales = jnp.where(width < FAINT, 0, width) * INVERSE_STEPS[scheme.format]
    return _rounded_up(scales, scheme.scale_dtype), zeros


def _rounded_up(scales: Float[Array, "*shape"], dtype: str) -> Float[Array, "*shape"]:
    """To numbers of `dtype`. What a float32 made a little larger than such a number is that number."""
    return scales if dtype == "float32" else rounded(scales * (1 - 2.0**-21), dtype, up=True)


def encoded(
    tokens: Float[Array, "... page D"],
    scales: Float[Array, "..."],
    zeros: Float[Array, "..."] | None,
    scheme: Scheme,
) -> Array:
    """The payload: tokens, less their zeros, times one over their scales, rounded to nearest even, cut off at the
    largest number."""
    asked = tokens.astype(jnp.float32)
    if zeros is not None:
        asked = asked - spread(zeros, scheme.per, scheme.group)
    asked = asked * spread(inverses(scales), scheme.per, scheme.group)
    made = numbers(asked, scheme.format) if zeros is None else whole(asked, 0.0, STEPS[scheme.format])
    return packed(made, SHARED[scheme.format]) if scheme.format in SHARED else made.astype(FORMATS[scheme.format])


def numbers(scaled: Float[Array, "*shape"], format: str) -> Shaped[Array, "*shape"]:
    """A format's numbers for what has been scaled: rounded to nearest even, beyond the largest cut off; whole ones in
    int32. It asks for nothing that a kernel cannot do."""
    largest = LARGEST[format]
    if format == "fp8":
        return jnp.minimum(jnp.maximum(scaled, -largest), largest).astype(FORMATS[format])
    return whole(scaled, -largest, largest)


def quantised(
    tokens: Float[Array, "... page D"],
    scheme: str | Scheme,
    per: Scaling = "token",
    *,
    valid: Bool[Array, "... page"] | None = None,
) -> Quantised:
    """Tokens in a scheme, or in a format of `FORMATS` by token or channel, with the scales that they ask for.

    A value is off by at most half its scale, of fp8 by 2 ** -4 of itself, or by `FAINT`. Where all of a channel (token,
    group) are equal they come back as they were, if their type is that of the scales: the scale is zero then, and the
    zero point says it all. Slots that are not `valid` may hold anything, NaN too: no range knows them, and they are
    stored as codes of zero. A NaN that is valid makes all that shares its scale NaN. Raises ValueError for what is no
    scheme for such tokens."""
    scheme = Scheme(scheme, per) if isinstance(scheme, str) else scheme
    scheme.check(tokens.shape)
    if valid is not None and valid.shape != tokens.shape[:-1]:
        raise ValueError(f"valid = {valid.shape}: must be {tokens.shape[:-1]}, a flag for each token")
    scales, zeros = ranges_of(tokens, scheme, valid)
    payload = encoded(tokens, scales, zeros, scheme)
    if valid is not None:
        payload = jnp.where(valid[..., :, None], payload, jnp.zeros((), payload.dtype))
    dtype = jnp.dtype(scheme.scale_dtype)
    zeros = None if zeros is None else zeros.astype(dtype)
    return Quantised(payload, scales.astype(dtype), scheme.format, scheme.per, scheme.group, zeros)


def packed(numbers: Shaped[Array, "... D"], shared: int = 2) -> Shaped[Array, "... bytes"]:
    """Whole numbers of 4 bits (int32), two in a byte; or `shared` of 8 / shared bits each."""
    return in_bytes(*jnp.split(numbers, shared, axis=-1)).astype(jnp.uint8)


def unpacked(payload: Shaped[Array, "... bytes"], shared: int = 2, *, is_signed: bool = True) -> Float[Array, "... D"]:
    """The numbers that bytes hold, `shared` each."""
    parts = parts_of(payload.astype(jnp.int32), shared, is_signed=is_signed)
    return jnp.concatenate(parts, axis=-1).astype(jnp.float32)
