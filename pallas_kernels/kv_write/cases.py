"""The cases that every implementation of `kv_write` is proved on: named ones, and others drawn from the option space
(`proof.check`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pallas_kernels.kv_write.reference import KERNEL_FORMATS
from pallas_kernels.paged_attention.cases import PLATFORMS, fitted

CASES: dict[str, dict[str, Any]] = {
    "one token each, some dropped": {"counts": [1, 0, 1, 1, 0, 1], "begins": [0, 3, 31, 5, 0, 32], "page_size": 32},
    "a chunk from the middle of a page, a whole page, an empty row": {
        "counts": [80, 64, 0],
        "begins": [5, 64, 0],
        "page_size": 64,
    },
    "pages of 8, odd head dims": {"counts": [30, 1], "begins": [3, 7], "page_size": 8, "dims": (80, 48)},
    "int8 by token": {"counts": [70, 3], "begins": [9, 32], "format": "int8"},
    "fp8 by token, one token each": {"counts": [1, 1, 1], "begins": [0, 33, 63], "format": "fp8", "page_size": 64},
    "int4 by token": {"counts": [40, 32], "begins": [31, 0], "format": "int4", "dims": (64, 128)},
    "int8 by channel": {"counts": [70, 3], "begins": [0, 37], "format": "int8", "per": "channel"},
    "int4 by channel, one token each": {
        "counts": [1, 1],
        "begins": [5, 32],
        "format": "int4",
        "per": "channel",
        "dims": (64, 64),
    },
    "int8 by token, one token each, 8 heads": {
        "counts": [1, 0, 1],
        "begins": [0, 3, 33],
        "format": "int8",
        "kv_heads": 8,
    },
    "int8 by token, values are columns of the keys": {
        "counts": [70, 3],
        "begins": [9, 32],
        "format": "int8",
        "is_latent": True,
    },
    "values are columns of the keys, one token each": {
        "counts": [1, 0, 1],
        "begins": [5, 3, 33],
        "is_latent": True,
    },
    "fp8 by token, sizes that some chips take for zero": {
        "counts": [9] * 4,
        "begins": [0] * 4,
        "format": "fp8",
        "sizes": (-128, -100),
    },
    "fp8 by channel, sizes that some chips take for zero, one token each": {
        "counts": [1] * 6,
        "begins": [0, 0, 0, 0, 5, 5],
        "format": "fp8",
        "per": "channel",
        "sizes": (-128, -100),
    },
}


SIMULATED: tuple[dict[str, Any], ...] = (
    CASES["one token each, some dropped"],
    CASES["int8 by token"],
)
"""What a simulator's verdict rests on."""


def generated(
    number: int, *, dtypes: Sequence[str], page_sizes: Sequence[int], dims: Sequence[int],
    quantised_page_sizes: Sequence[int] | None = None, quantised_dims: Sequence[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A case drawn from the option space, the same for the same number."""
    rng = np.random.default_rng(number)

    def one_of(options: Sequence[Any]) -> Any:
        return options[int(rng.integers(len(options)))]

    format = one_of((None, *KERNEL_FORMATS))
    page_size = one_of(quantised_page_sizes if format and quantised_page_sizes else page_sizes)
    dims = (quantised_dims if format else None) or dims
    longest = one_of((1, 1, page_size, 2 * page_size + 3))
    rows = int(rng.integers(1, 5))
    return {
        "counts": [int(rng.integers(longest + 1)) for _ in range(rows)],
        "begins": [one_of((0, 1, page_size - 1, page_size, int(rng.integers(60)))) for _ in range(rows)],
        "num_tokens": longest,
        "dims": (one_of(dims), one_of(dims)),
        "kv_heads": one_of((1, 2)),
        "dtype": one_of(dtypes),
        "page_size": page_size,
        "format": format,
        "per": one_of(("token", "channel")),
        "seed": number,
    }


def cases(platform: str, num_generated: int) -> dict[str, dict[str, Any]]:
    """By name, in sizes that the kernels of a platform take: the named cases, then generated ones."""
    found = {}
    for name, case in CASES.items():
        # On GPUs, numbers of 4 bits are written in rows of 64 dims.
        narrow = {"dims": (64, 64)} if platform == "gpu" and case.get("format") else {}
        found[name] = fitted(case, platform) | narrow
    for number in range(num_generated):
        case = generated(number, **{name: of for name, of in PLATFORMS[platform].items() if name != "schemes"})
        is_wide = platform == "tpu" and case["format"] == "int4"
        found[f"generated {number}"] = case | ({"dims": (256, 256)} if is_wide else {})
    return found
