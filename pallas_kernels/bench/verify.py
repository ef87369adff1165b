"""Whether the kernels are right on the device at hand: every op's contract, in what a kernel there takes."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

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
QUANTISED = ("int8", "fp8", "int4")


def cases(platform: str, num_generated: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Op, name and arguments: the named cases of every op's contract in sizes that the platform's kernels take, then generated ones."""
    space, found = SPACES[platform], []
    least = {"gpu": 64, "tpu": 128, "cpu": 0}[platform]

    def fitted(case: dict[str, Any]) -> dict[str, Any]:
        case = {"dtype": "bfloat16", **case}
        if platform == "tpu":  # whole registers
            case["page_size"] = 32
        else:
            case.setdefault("page_size", 16)
        if least:
            dim = 256 if platform == "tpu" and case.get("format") == "int4" else least
            case["dims"] = (dim, dim)
        return case

    attending = {name: fitted(case) for name, case in proof.CASES.items()}
    drawn = [proof.generated(number, formats=QUANTISED, **space) for number in range(num_generated)]
    attending |= {f"generated {number}": case for number, case in enumerate(drawn)}
    for name, case in attending.items():
        if platform == "tpu" and case.get("format") == "int4":
            case = {**case, "dims": (256, 256)}
        found.append(("paged_attention", name, case))
        if case["num_queries"] > 1:
            found.append(("paged_prefill", name, case))
    writing = {name: fitted(case) for name, case in write_proof.CASES.items()}
    drawn = [write_proof.generated(number, **space) for number in range(num_generated)]
    writing |= {f"generated {number}": case for number, case in enumerate(drawn)}
    for name, case in writing.items():
        if platform == "tpu" and case.get("format") == "int4":
            case = {**case, "dims": (256, 256)}
        found.append(("kv_write", name, case))
    return found


CHECKS: dict[str, Callable[..., None]] = {
    "paged_attention": partial(proof.check, paged_attention),
    "paged_prefill": partial(proof.check, paged_prefill, prefill=True),
    "kv_write": partial(write_proof.check, kv_write),
}


def verify(num_generated: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Runs them with what `None` chooses: how many were answered by which implementation of each op, and what went wrong. Where there
    are kernels, an op that no case ran with its kernel is wrong as well."""
    platform = jax.devices()[0].platform
    done: Counter[tuple[str, str]] = Counter()
    wrong = []
    for op, name, case in cases(platform if platform in SPACES else "cpu", num_generated):
        with recording() as taken:
            try:
                CHECKS[op](**case)
            except Exception as error:  # wrong, or not to be run: both are failures
                said = str(error).strip().splitlines() or [type(error).__name__]
                wrong.append(f"{op}, {name}: {said[0]}")
        done.update((op, implementation) for implementation in taken.get(op, ()))
    if platform in ("gpu", "tpu"):
        wrong += [f"{op}: no case ran by mosaic_{platform}" for op in CHECKS if not done[op, f"mosaic_{platform}"]]
    return done, wrong
