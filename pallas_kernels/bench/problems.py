"""What is measured: the goals of one H200 at their full sizes, and the same in tiny, which shows that the bench
works."""

from typing import Any

import numpy as np

from pallas_kernels.bench.goals import Goals
from pallas_kernels.bench.others import Mixed, Write
from pallas_kernels.bench.paged import Problem
from pallas_kernels.bench.recurrences import DeltaScan, DeltaStep, Scan, Step

TINY: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "dim": 16, "page_size": 16}


def _ragged(count: int, low: int, high: int) -> tuple[int, ...]:
    """Lengths spread evenly over the logarithm."""
    return tuple(int(length) for length in np.geomspace(low, high, count).round())


def _with_parts(name: str, chunk: Problem, decodes: Problem) -> tuple[Any, ...]:
    """Two problems, and both at once."""
    return (
        chunk,
        decodes,
        Mixed(name, chunk, decodes, Goals(over=(((chunk.name, decodes.name), (1 / 1.2,)),))),
    )


DECODE, SELECTED, SSD = "decode B32 S4096", "decode B32 S32K", "SSD forward of 16384 tokens, H128"
NUM_SCANNED = 4 * 4096

PROBLEMS: dict[str, tuple[Any, ...]] = {
    "full": (
        Problem(
            DECODE,
            (4096,) * 32,
            goals=Goals(
                (0.85, 0.92),
                faster_than=(("jax paged_attention", (1.5,)), ("reference", (3.0,)), ("cuDNN, paged", (1.0,))),
            ),
        ),
        Problem(f"{DECODE}, pages of 16", (4096,) * 32, page_size=16, goals=Goals((0.80,))),
        Problem("decode B1 S1024, 4 KV heads", (1024,), num_kv_heads=4, goals=Goals(most_us=(12.0, 8.0))),
        Problem("decode B64, 128 to 32K", _ragged(64, 128, 32768), goals=Goals((0.80, 0.88))),
        *(
            Problem(
                f"{DECODE}, {format}", (4096,) * 32, format=format, goals=Goals(least, over=(((DECODE,), (gain,)),))
            )
            for format, least, gain in (
                ("int8", (0.65, 0.80), 1.5),
                ("fp8", (0.65, 0.80), 1.5),
                ("int4", (0.45, 0.60), 2.0),
            )
        ),
        Problem(SELECTED, (32768,) * 32),
        Problem(
            f"{SELECTED}, 1/8 of the pages by head",
            (32768,) * 32,
            keep=0.125,
            goals=Goals((1 / 1.2,), spared_us=8.0, over=(((SELECTED,), (1.0, 6.5)),)),
        ),
        *_with_parts(
            "a chunk of 2048 at 8K with 64 decodes at 4K",
            Problem("a chunk of 2048 at 8K", (8192,), num_queries=2048),
            Problem("64 decodes at 4K", (4096,) * 64),
        ),
        Problem(
            "MLA decode B64 S8192, 16 heads",
            (8192,) * 64,
            num_heads=16,
            num_kv_heads=1,
            dim=576,
            latent_dim=512,
            goals=Goals((0.75, 0.88)),
        ),
        Problem(
            "flash forward 4 x 48 x 8192, causal",
            (8192,) * 4,
            num_heads=48,
            num_kv_heads=48,
            num_queries=8192,
            goals=Goals(faster_than=(("cuDNN, dense", (0.8, 0.95)),)),
        ),
        Write("write 8192 tokens, bfloat16", goals=Goals((0.75, 0.85), faster_than=(("reference", (3.0,)),))),
        *(Write(f"write 8192 tokens, {format}", format=format) for format in ("int8", "fp8", "int4")),
        Scan(
            SSD,
            batch=4,
            num_heads=128,
            value_dim=64,
            key_dim=128,
            num_tokens=4096,
            goals=Goals(most_us=(NUM_SCANNED * 35e-3, NUM_SCANNED * 22e-3), faster_than=(("reference", (3.0,)),)),
        ),
        Step("SSM decode step B64, H128", 64, 128, 64, 128, goals=Goals((0.85, 0.92))),
        DeltaScan("gated delta rule, 16384 tokens, H32", 4, 32, 128, 128, 4096),
        DeltaStep("gated delta rule, decode step B64, H32", 64, 32, 128, 128),
    ),
    "tiny": (
        Problem("decode B3", (40, 64, 9), **TINY, goals=Goals((0.85,), faster_than=(("reference", (3.0,)),))),
        Problem("decode B3, int8", (40, 64, 9), **TINY, format="int8", goals=Goals(over=((("decode B3",), (1.5,)),))),
        Problem(
            "decode B2, 1/2 of the pages by head", (64, 64), **TINY, keep=0.5, goals=Goals((1 / 1.2,), spared_us=8.0)
        ),
        *_with_parts(
            "a chunk of 8 at 64 with 2 decodes at 32",
            Problem("a chunk of 8 at 64", (64,), **TINY, num_queries=8),
            Problem("2 decodes at 32", (32, 32), **TINY),
        ),
        Problem("MLA decode B2", (40, 33), num_heads=4, num_kv_heads=1, dim=24, page_size=16, latent_dim=16),
        Problem(
            "flash forward", (32, 32), **TINY, num_queries=32, goals=Goals(faster_than=(("cuDNN, dense", (0.8,)),))
        ),
        *(
            Write(f"write 128 tokens, {format}", 128, 2, 16, 16, format)
            for format in ("bfloat16", "int8", "fp8", "int4")
        ),
        Scan("SSD forward of 128 tokens", 2, 4, 8, 16, 64),
        Step("SSM decode step B2", 2, 4, 8, 16),
        DeltaScan("gated delta rule, 128 tokens", 2, 4, 8, 16, 64),
        DeltaStep("gated delta rule, decode step B2", 2, 4, 8, 16),
    ),
}
HEADLINE = {"full": DECODE, "tiny": "decode B3"}
"""The problem that is measured first, beside every peer."""
EXPECTED_S: dict[str, float] = {
    DECODE: 35,
    "decode B1 S1024, 4 KV heads": 13,
    "decode B64, 128 to 32K": 17,
    f"{DECODE}, int8": 14,
    "write 8192 tokens, bfloat16": 12,
    f"{DECODE}, fp8": 15,
    f"{DECODE}, pages of 16": 15,
    SELECTED: 20,
    f"{SELECTED}, 1/8 of the pages by head": 20,
    f"{DECODE}, int4": 15,
    "a chunk of 2048 at 8K": 15,
    "64 decodes at 4K": 12,
    "a chunk of 2048 at 8K with 64 decodes at 4K": 15,
    "write 8192 tokens, int8": 12,
    "SSM decode step B64, H128": 12,
    "flash forward 4 x 48 x 8192, causal": 30,
    "MLA decode B64 S8192, 16 heads": 15,
    "SSD forward of 16384 tokens, H128": 15,
    "write 8192 tokens, fp8": 12,
    "write 8192 tokens, int4": 12,
    "gated delta rule, decode step B64, H32": 12,
    "gated delta rule, 16384 tokens, H32": 15,
}
"""Seconds that a full problem takes with the peers of its goals. Those of the first three and of int8 were read on an
H200, the others are guesses from them. Their order is that of value a second."""
SWEEPS = {"full": ((1, 8, 32, 128), (512, 2048, 8192, 32768)), "tiny": ((1, 2), (16, 64))}
"""Batches and contexts of decoding, over which the achieved bandwidth is drawn."""
MOST_BYTES = 12_000_000_000
"""Of the pools of one problem of the sweep."""
