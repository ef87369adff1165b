"""What paged attention is compiled for on absent chips: 32 sequences of 4,096 tokens, 32 query heads on 8 KV heads."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import KIVI, Call, Shape, Target, formats_of, stored_as, stored_in
from pallas_kernels.formats import FORMATS, kivi
from pallas_kernels.masking import Scoring
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.visible import Visible

BATCH, CONTEXT, HEADS, KV_HEADS, CHUNK = 32, 4096, 32, 8, 256
PAGE_SIZES = {"gpu": 64, "tpu": 128}

KIVIS = {"gpu": (("int4", KIVI), ("int2", KIVI)), "tpu": (("int4", KIVI),)}


def shapes(backend: str, dims: Sequence[int]) -> list[Shape]:
    """Every format and head dim, decoding and in chunks of 256 tokens. Then what may be asked for beside: "lists" of
    each KV head with valid slots, "valid" slots alone, page "mass", "options" (a window, sinks, a soft cap), a mask of
    "chunk"s of 1,024 tokens; and on GPUs "dims" that are no multiple of 64, and for "many" query heads of each KV head,
    64, all of that at once (in small pages where there may be some), where registers are scarcest."""

    def more(extra: str, format: str = "bfloat16", per: str = "", num_queries: int = 1) -> Shape:
        return Shape("paged_attention", format, 128, per, extra, num_queries)

    return [
        *(
            Shape("paged_attention", format, dim, per, num_queries=num_queries)
            for num_queries in (1, CHUNK)
            for format, per in (*formats_of(backend), *KIVIS[backend])
            for dim in dims
            if backend == "gpu" or per != KIVI or dim == 256  # rows of 4 bits that fill a TPU's registers
        ),
        *(more(extra) for extra in ("lists", "mass", "options", "chunk")),
        *(more(extra, "int8", per) for per in ("token", "channel") for extra in ("mass", "options")),
        *(more(extra, num_queries=CHUNK) for extra in ("lists", "valid", "mass", "options", "chunk")),
        *(
            Shape("paged_attention", format, dim, per, "dims")
            for format, per, dim in (
                *(("bfloat16", "", 80), ("bfloat16", "", 96)),
                *(("int8", "token", 96), ("int8", "channel", 96)),
            )
            if backend == "gpu"
        ),
        *(
            Shape("paged_attention", format, dim, per, "many")
            for dim in dims
            for format, per in (("bfloat16", ""), ("fp8", "token"), ("fp8", "channel"))
            if backend == "gpu" and dim <= 128
        ),
    ]


def floor_bytes(shape: Shape) -> int:
    """Keys and values that must move: live bytes once, with their scales."""
    dim, page_size = shape.head_dim, PAGE_SIZES["gpu"]
    if shape.per == KIVI:
        a_page = sum(scheme.tile_bytes(page_size, dim) for scheme in kivi(shape.format, shape.format))
        return BATCH * CONTEXT * KV_HEADS * a_page // page_size
    bits = {"float32": 32, "int8": 8, "fp8": 8, "int4": 4, "int2": 2}.get(shape.format, 16)
    a_token = 2 * dim * bits // 8 + (2 * 4 if shape.per == "token" else 0)
    return BATCH * CONTEXT * KV_HEADS * a_token


def call(shape: Shape, target: Target, sharding: Any) -> Call:
    """The kernel of a target on arrays of a shape."""
    is_many, page_size, num_heads = shape.extra == "many", PAGE_SIZES[target.backend], HEADS
    if is_many:
        page_size, num_heads = 32 if shape.format in FORMATS else 8, 64 * KV_HEADS
    table_len = CONTEXT // page_size

    def array(*dims: int, of: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(dims, of, sharding=sharding)

    tiles = (BATCH * table_len + 1, KV_HEADS, page_size, shape.head_dim)
    if shape.per == KIVI:
        of_keys, of_values = (stored_in(scheme, tiles, sharding) for scheme in kivi(shape.format, shape.format))
    else:
        of_keys = of_values = stored_as(shape.format, shape.per, tiles, sharding)
    visible = {"options": Visible(1024, 4), "many": Visible(1024, 4), "chunk": Visible(chunk=1024)}.get(
        shape.extra, Visible()
    )
    soft_cap = 30.0 if shape.extra in ("options", "many") else None
    scoring = Scoring(shape.head_dim**-0.5, soft_cap, visible, shape.extra in ("mass", "many"))
    lists = (BATCH, KV_HEADS, table_len) if shape.extra == "lists" else (BATCH, table_len)
    valid = array(*lists, page_size, of=jnp.bool) if shape.extra in ("lists", "valid", "many") else None
    dtype = jnp.dtype(shape.format if shape.format not in FORMATS else "bfloat16")
    arrays = (
        array(BATCH, shape.num_queries, num_heads, shape.head_dim, of=dtype),
        Pages(of_keys, of_values),
        Lists(array(*lists), array(*lists), valid),
        array(BATCH, shape.num_queries),
        array(BATCH),
    )
    kernel = import_module(f"pallas_kernels.paged_attention.{target.backend}").paged_attention
    return Call(lambda *arrays: kernel(*arrays, scoring, **target.options), arrays)
