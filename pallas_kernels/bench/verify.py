"""Whether the kernels are right on the device at hand: every op's contract, in what a kernel there takes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax

from pallas_kernels.formats import FORMATS
from pallas_kernels.kv_write import kv_write
from pallas_kernels.kv_write import proof as write_proof
from pallas_kernels.paged_attention import paged_attention, proof
from pallas_kernels.paged_prefill import paged_prefill
from pallas_kernels.selection import recording

SPACES: dict[str, dict[str, Any]] = {
    "gpu": {"dtypes": ("bfloat16", "float16"), "page_sizes": (16, 64), "quantised_page_sizes": (32, 64), "dims": (64, 128, 256)},
    "tpu": {"dtypes": ("bfloat16", "float32"), "page_sizes": (16, 64), "quantised_page_sizes": (32, 64), "dims": (256, 128)},
    "cpu": {"dtypes": ("bfloat16", "float32"), "page_sizes": (3, 16), "quantised_page_sizes": (8, 16), "dims": (16, 32)},
}  # fmt: skip
"""Options that a platform's kernels take."""


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
}
"""More rows than decoding kernels take: of `paged_prefill` alone."""


def cases(platform: str, num_generated: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Op, name and arguments: the named cases of every op's contract in sizes that the platform's kernels take, then generated ones."""
    space, found = SPACES[platform], []

    def fitted(case: dict[str, Any]) -> dict[str, Any]:
        """In whole rows of the platform's tensor cores or registers."""
        is_int4, is_quantised = case.get("format") == "int4", bool(case.get("format"))
        case = {"dtype": "bfloat16", "page_size": 32 if is_quantised else 16, **case}
        if platform == "tpu":
            return case | {"page_size": 32, "dims": (256, 256) if is_int4 else (128, 128)}
        return {"dims": (64, 64), **case} if platform == "gpu" else case

    def written(case: dict[str, Any]) -> dict[str, Any]:
        """As `fitted`: numbers of 4 bits are written in rows of 64 dims."""
        return fitted(case) | ({"dims": (64, 64)} if platform == "gpu" and case.get("format") else {})

    def drawn(generated: Callable[..., dict[str, Any]], **more: Any) -> dict[str, dict[str, Any]]:
        cases = {f"generated {number}": generated(number, **space, **more) for number in range(num_generated)}
        is_wide = lambda case: platform == "tpu" and case["format"] == "int4"  # noqa: E731
        return {name: case | ({"dims": (256, 256)} if is_wide(case) else {}) for name, case in cases.items()}

    small = {"lengths": [130, 64, 1], "num_queries": 2, "group": 4}
    stored = {
        f"{one} by {per}": {**small, "format": one, "per": per} for one in FORMATS for per in ("token", "channel")
    }
    named = proof.CASES | stored
    attending = {name: fitted(case) for name, case in named.items()} | drawn(proof.generated, formats=tuple(FORMATS))
    writing = {name: written(case) for name, case in write_proof.CASES.items()} | drawn(write_proof.generated)
    for name, case in attending.items():
        found.append(("paged_attention", name, case))
        if case["num_queries"] > 1:
            found.append(("paged_prefill", name, case))
    found += [("paged_prefill", name, fitted(case)) for name, case in CHUNKS.items()]
    return found + [("kv_write", name, case) for name, case in writing.items()]


CHECKS: dict[str, Callable[..., None]] = {
    "paged_attention": partial(proof.check, paged_attention),
    "paged_prefill": partial(proof.check, paged_prefill, prefill=True),
    "kv_write": partial(write_proof.check, kv_write),
}


def check(op: str, name: str, num_generated: int) -> Iterator[dict[str, Any]]:
    """Runs one of `cases` on this process' first device, with what `None` chooses: before it, what is run, and after it, by which
    implementations it was answered (`by`), and what was wrong (`wrong`, empty where it is right). Raises ValueError for no such case."""
    platform = jax.devices()[0].platform
    found = {(op, name): case for op, name, case in cases(platform if platform in SPACES else "cpu", num_generated)}
    if (op, name) not in found:
        raise ValueError(f"case = {op}: {name}: is none of the {len(found)} of {platform}")
    answer = {"op": op, "by": [], "wrong": ""}
    yield answer
    with recording() as taken:
        try:
            CHECKS[op](**found[op, name])
        except Exception as error:  # wrong, or not to be run: both are failures
            answer["wrong"] = said(error)
    yield answer | {"by": sorted(taken.get(op, ()))}


def said(error: Exception) -> str:
    """Its type and first line."""
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0]}"[:200]
