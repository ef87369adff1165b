"""What `kv_write` is compiled for on absent chips: chunks of 32 sequences, or a token of each, for 8 KV heads."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import Call, Shape, Target, formats_of, stored_as
from pallas_kernels.formats import FORMATS
from pallas_kernels.kv_write.reference import KERNEL_FORMATS
from pallas_kernels.pages import Pages

BATCH, CONTEXT, KV_HEADS, CHUNK = 32, 4096, 8, 256


def shapes(backend: str, dims: Sequence[int]) -> list[Shape]:
    """Every format and head dim in chunks of 256 tokens; then one token of each sequence, and of "few": three."""
    return [
        *(
            Shape("kv_write", format, dim, per, num_queries=CHUNK)
            for format, per in formats_of(backend)
            if format not in FORMATS or format in KERNEL_FORMATS
            for dim in dims
        ),
        Shape("kv_write", "bfloat16", 128, extra="decode"),
        Shape("kv_write", "int8", 128, "token", extra="decode"),
        Shape("kv_write", "int4", 128, "channel", extra="few"),
    ]


def _batch(shape: Shape) -> int:
    return 3 if shape.extra == "few" else BATCH


def floor_bytes(shape: Shape) -> int:
    """The tokens in 16 bits, or 32, and what they become, with their scales."""
    bits = {"float32": 32, "int8": 8, "fp8": 8, "int4": 4}.get(shape.format, 16)
    a_token = 2 * shape.head_dim * bits // 8 + (2 * 4 if shape.per == "token" else 0)
    return _batch(shape) * shape.num_queries * KV_HEADS * (a_token + 2 * shape.head_dim * max(2, bits // 16))


def call(shape: Shape, target: Target, sharding: Any) -> Call:
    """The kernel of a target on arrays of a shape; pages are given away."""
    batch, page_size = _batch(shape), 64 if target.backend == "gpu" else 128
    num_pages = batch * CONTEXT // page_size + 1
    pool = stored_as(shape.format, shape.per, (num_pages, KV_HEADS, page_size, shape.head_dim), sharding)
    dtype = jnp.dtype(shape.format if shape.format not in FORMATS else "bfloat16")
    tokens = jax.ShapeDtypeStruct((batch, shape.num_queries, KV_HEADS, shape.head_dim), dtype, sharding=sharding)
    slots = jax.ShapeDtypeStruct((batch, shape.num_queries), jnp.int32, sharding=sharding)
    kernel = import_module(f"pallas_kernels.kv_write.{target.backend}").kv_write
    return Call(lambda *arrays: kernel(*arrays, **target.options), (Pages(pool, pool), tokens, tokens, slots), (0,))
