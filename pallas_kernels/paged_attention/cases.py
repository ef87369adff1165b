"""The cases that every kernel of paged attention is proved on: named ones, and others drawn from the option space
(`proof.drawn`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pallas_kernels.formats import FORMATS
from pallas_kernels.paged_attention.dims_cases import DIMS
from pallas_kernels.paged_attention.kivi_cases import KIVI

PLATFORMS: dict[str, dict[str, Any]] = {
    "gpu": {
        "dtypes": ("bfloat16", "float16"),
        "page_sizes": (16, 64),
        "quantised_page_sizes": (32, 64),
        "dims": (64, 128, 256),
        "schemes": (("int4", "int4"), ("int2", "int2"), ("int4", "int2")),
    },
    "tpu": {
        "dtypes": ("bfloat16", "float32"),
        "page_sizes": (16, 64),
        "quantised_page_sizes": (32, 64),
        "dims": (256, 128),
        "schemes": (("int4", "int4"),),
    },
    "cpu": {
        "dtypes": ("bfloat16", "float32"),
        "page_sizes": (3, 16),
        "quantised_page_sizes": (8, 16),
        "dims": (16, 32),
    },
}
"""Options that a platform's kernels take."""

CASES: dict[str, dict[str, Any]] = {
    "lengths 0, 1, page, page + 1; an empty one first and last": {
        "lengths": [0, 1, 8, 0, 9, 0],
        "num_queries": 1,
        "group": 4,
    },
    "several blocks, odd head dims": {
        "lengths": [70, 3],
        "num_queries": 1,
        "group": 3,
        "dims": (80, 32),
        "kv_heads": 1,
    },
    "head dims that models have": {"lengths": [70], "num_queries": 1, "group": 4, "dims": (256, 128), "kv_heads": 1},
    "head dims of 192": {"lengths": [70], "num_queries": 1, "group": 2, "dims": (192, 64), "kv_heads": 1},
    "one-hot attention": {"lengths": [40, 9], "num_queries": 1, "group": 2, "magnitude": 1e3},
    "pages that several sequences list, and one lists twice": {
        "lengths": [40, 20, 70],
        "num_queries": 1,
        "group": 2,
        "page_size": 8,
        "is_shared": True,
    },
    "positions beyond 32 K": {
        "lengths": [40_000],
        "num_queries": 1,
        "group": 2,
        "kv_heads": 1,
        "window": 70,
        "page_size": 64,
        "with_mass": False,
    },
    "one head each": {"lengths": [41, 64], "num_queries": 1, "group": 1},
    "a chunk in two tiles, window, sinks, soft cap": {
        "lengths": [33, 9],
        "num_queries": 5,
        "group": 2,
        "window": 7,
        "sinks": 2,
        "cap": 5.0,
    },
    "its own chunk of 24 tokens, of two tiles, soft cap": {
        "lengths": [70, 24, 25, 0],
        "num_queries": 5,
        "group": 2,
        "chunk": 24,
        "cap": 5.0,
    },
    "its own chunk of 64 tokens, valid slots": {
        "lengths": [200, 65, 128],
        "num_queries": 1,
        "group": 4,
        "chunk": 64,
        "kept": 0.7,
        "page_size": 16,
    },
    "int8 by token, its own chunk, lists of each head": {
        "lengths": [100, 40],
        "num_queries": 3,
        "group": 2,
        "chunk": 48,
        "lists": "heads",
        "format": "int8",
        "page_size": 32,
        "dims": (32, 64),
    },
    "values are the first columns of the keys": {
        "lengths": [70, 9],
        "num_queries": 1,
        "group": 4,
        "kv_heads": 1,
        "dims": (128, 64),
        "is_latent": True,
    },
    "int8 by channel, values are the first columns of the keys": {
        "lengths": [70, 9],
        "num_queries": 2,
        "group": 2,
        "kv_heads": 1,
        "dims": (128, 64),
        "is_latent": True,
        "format": "int8",
        "per": "channel",
        "page_size": 32,
        "window": 40,
    },
    "large logits": {"lengths": [30], "num_queries": 2, "group": 2, "magnitude": 40.0},
    "every KV head keeps pages and slots of its own": {
        "lengths": [50, 7, 0],
        "num_queries": 2,
        "group": 2,
        "lists": "heads",
        "kept": 0.5,
    },
    "slots that are not valid, window, sinks": {
        "lengths": [45, 20],
        "num_queries": 1,
        "group": 2,
        "kept": 0.7,
        "window": 12,
        "sinks": 3,
        "page_size": 16,
    },
    "int8 by token, window, soft cap": {
        "lengths": [45, 0, 8],
        "num_queries": 2,
        "group": 2,
        "format": "int8",
        "window": 9,
        "cap": 5.0,
        "page_size": 32,
        "dims": (32, 64),
    },
    "fp8 by token, large logits": {
        "lengths": [70, 9],
        "num_queries": 1,
        "group": 4,
        "format": "fp8",
        "magnitude": 40.0,
        "page_size": 32,
        "dims": (32, 32),
    },
    "fp8 by token, tiny values": {
        "lengths": [40],
        "num_queries": 1,
        "group": 2,
        "format": "fp8",
        "of_values": 1e-6,
        "page_size": 32,
        "dims": (32, 32),
    },
    "int4 by token, lists of each head": {
        "lengths": [70, 9],
        "num_queries": 1,
        "group": 2,
        "format": "int4",
        "lists": "heads",
        "page_size": 32,
        "dims": (64, 32),
    },
    "int8 by channel, valid slots": {
        "lengths": [70, 9],
        "num_queries": 1,
        "group": 2,
        "format": "int8",
        "per": "channel",
        "kept": 0.6,
        "page_size": 32,
        "dims": (32, 32),
    },
    "fp8 by channel, large logits": {
        "lengths": [40, 9],
        "num_queries": 1,
        "group": 4,
        "format": "fp8",
        "per": "channel",
        "magnitude": 40.0,
        "page_size": 32,
        "dims": (32, 32),
    },
    "int8 by channel, sizes of queries and keys that make up for each other": {
        "lengths": [40],
        "num_queries": 1,
        "group": 2,
        "format": "int8",
        "per": "channel",
        "magnitude": tuple(0.5**channel for channel in range(32)),
        "of_keys": tuple(2.0**channel for channel in range(32)),
        "page_size": 32,
        "dims": (32, 32),
    },
    "int8 by channel, keys beyond float16": {
        "lengths": [40],
        "num_queries": 1,
        "group": 2,
        "format": "int8",
        "per": "channel",
        "magnitude": 1e-6,
        "of_keys": 1e6,
        "page_size": 32,
        "dims": (32, 32),
    },
    "int4 by channel, tiny keys, channels of many sizes": {
        "lengths": [40],
        "num_queries": 1,
        "group": 2,
        "format": "int4",
        "per": "channel",
        "magnitude": 1e7,
        "of_keys": tuple(1e-6 * 0.7**channel for channel in range(32)),
        "page_size": 32,
        "dims": (32, 32),
    },
    "int8 by channel, a page of which nothing is seen though slots behind its end are valid": {
        "lengths": [33],
        "num_queries": 1,
        "group": 2,
        "kv_heads": 1,
        "format": "int8",
        "per": "channel",
        "kept": 0.5,
        "seed": 1,
        "page_size": 32,
        "dims": (32, 32),
    },
    "int4 by channel": {
        "lengths": [40, 100],
        "num_queries": 1,
        "group": 2,
        "format": "int4",
        "per": "channel",
        "page_size": 32,
        "dims": (32, 32),
    },
} | DIMS


CHUNKS: dict[str, dict[str, Any]] = {
    "a chunk of several tiles": {"lengths": [300, 70, 0], "num_queries": 100, "group": 2, "page_size": 64},
    "a chunk, window, sinks, soft cap": {
        "lengths": [200],
        "num_queries": 150,
        "group": 1,
        "window": 70,
        "sinks": 3,
        "cap": 20.0,
    },
    "a chunk by lists of each head": {
        "lengths": [150, 40],
        "num_queries": 80,
        "group": 2,
        "lists": "heads",
        "kept": 0.6,
    },
    "a chunk over int8 by channel": {
        "lengths": [150],
        "num_queries": 70,
        "group": 2,
        "format": "int8",
        "per": "channel",
    },
    "a chunk without page mass, each query in its own 48 tokens": {
        "lengths": [200, 90],
        "num_queries": 80,
        "group": 2,
        "chunk": 48,
        "with_mass": False,
    },
}
"""More rows than decoding kernels take."""

SIMULATED: tuple[dict[str, Any], ...] = (
    CASES["lengths 0, 1, page, page + 1; an empty one first and last"],
    CASES["int8 by token, window, soft cap"],
    CASES["its own chunk of 64 tokens, valid slots"],
    {"lengths": [70, 3], "num_queries": 40, "group": 2, "prefill": True},
)
"""What a simulator's verdict rests on."""


def generated(
    number: int,
    *,
    dtypes: Sequence[str],
    page_sizes: Sequence[int],
    dims: Sequence[int],
    formats: Sequence[str] = (),
    quantised_page_sizes: Sequence[int] | None = None,
    schemes: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """A case drawn from the option space, the same for the same number: one in three in one of `formats`, if any, and
    one in four of the others in one of KIVI's `schemes`, if any."""
    rng = np.random.default_rng(number)

    def one_of(options: Sequence[Any]) -> Any:
        return options[int(rng.integers(len(options)))]

    format = one_of((None, None, *formats[:1])) and one_of(formats)
    kinds = [*[None] * 3 * len(schemes), *schemes] if not format and schemes else [None]
    scheme = kinds[int(np.random.default_rng((number, 2)).integers(len(kinds)))]
    sizes = quantised_page_sizes if (format or scheme) and quantised_page_sizes else page_sizes
    if scheme:  # kernels read groups of channels in pages of 64
        sizes = [size for size in sizes if size % 64 == 0] or sizes
    page_size, num_queries = one_of(sizes), one_of((1, 1, 2, 5))
    window = one_of((None, None, 1, page_size, 13))
    chunks = (None, 1, page_size, 13, 40)
    chunk = None if window is not None else chunks[int(np.random.default_rng((number, 1)).integers(len(chunks)))]
    edges = (0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size)
    return {
        "lengths": [one_of((*edges, int(rng.integers(0, 61)))) for _ in range(rng.integers(1, 4))],
        "num_queries": num_queries,
        "group": one_of((1, 2, 3, 4, 8, 16) if num_queries == 1 else (1, 2, 4)),
        "dims": (one_of(dims), one_of(dims)),
        "kv_heads": one_of((1, 2)),
        "window": window,
        "sinks": 0 if window is None else one_of((0, 0, 1, 4)),
        "chunk": chunk,
        "cap": one_of((None, None, 1.5, 30.0)),
        "dtype": one_of(dtypes),
        "page_size": page_size,
        "magnitude": one_of((1.0, 1.0, 40.0)),
        "of_values": one_of((1.0, 1.0, 1e-3, 1e3)),
        "lists": one_of(("sequences", "sequences", "heads")),
        "kept": one_of((1.0, 1.0, 0.6)),
        "format": format,
        "per": one_of(("token", "token", "channel")),
        "with_mass": one_of((False, False, True)),
        "seed": number,
    } | ({"schemes": scheme, "offset": (number % 3 - 1) * 4.0} if scheme else {})


def cases(platform: str, num_generated: int) -> dict[str, dict[str, Any]]:
    """By name, in sizes that the kernels of a platform ("gpu", "tpu", "cpu") take: the named cases, then generated
    ones. What has several queries is asked as a chunk as well."""
    small = {"lengths": [130, 64, 1], "num_queries": 2, "group": 4}
    kinds = [kind for kind in FORMATS if platform != "tpu" or kind != "int2"]  # whose registers are too wide for it
    formats = {
        f"{kind} by {per}": {**small, "format": kind, "per": per} for kind in kinds for per in ("token", "channel")
    }
    served = {name: case for name, case in KIVI.items() if platform != "tpu" or "int2" not in case["schemes"]}
    found = {name: fitted(case, platform) for name, case in (CASES | formats | served).items()}
    for number in range(num_generated):
        case = generated(number, formats=kinds, **PLATFORMS[platform])
        is_wide = platform == "tpu" and (case["format"] == "int4" or "schemes" in case)
        found[f"generated {number}"] = case | ({"dims": (256, 256)} if is_wide else {})
    chunks = {f"{name}, as a chunk": case for name, case in found.items() if case["num_queries"] > 1}
    chunks |= {name: fitted(case, platform) for name, case in CHUNKS.items()}
    return found | {name: case | {"prefill": True} for name, case in chunks.items()}


def fitted(case: dict[str, Any], platform: str) -> dict[str, Any]:
    """A case in whole rows of a platform's tensor cores or registers."""
    is_int4, is_quantised = case.get("format") == "int4" or "schemes" in case, bool(case.get("format"))
    case = {"dtype": "bfloat16", "page_size": 32 if is_quantised else 16, **case}
    if platform == "tpu":
        dims = (256, 256) if is_int4 else (256, 128) if case.get("is_latent") else (128, 128)
        return case | {"page_size": 32, "dims": dims}
    return {"dims": (64, 64), **case} if platform == "gpu" else case
