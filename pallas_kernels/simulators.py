"""The simulators' verdict on every op, with race detection, on a machine that has no such chip."""

import functools
import importlib
import os
from typing import Any

from pallas_kernels.chips import OPS
from pallas_kernels.compilers import Overheard


def simulate(backend: str) -> dict[str, str]:
    """Runs a backend's kernels in their simulator on cases of each op's `proof`; says of each op what came of it."""
    os.environ.setdefault("NPROC", "8")  # threads that XLA has: the simulator of GPUs wants one for every warpgroup
    from pallas_kernels.kv_write import proof as write_proof
    from pallas_kernels.paged_attention import proof

    if backend == "gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        modes: list[Any] = [plgpu.InterpretGPUParams(detect_races=True)]
    else:
        from jax.experimental.pallas import tpu as pltpu

        modes = [
            pltpu.InterpretParams(
                detect_races=True, dma_execution_mode=mode, uninitialized_memory="nan", out_of_bounds_reads="raise"
            )
            for mode in ("on_wait", "eager")
        ]
    chunk = {"lengths": [70, 3], "num_queries": 40, "group": 2, "prefill": True}
    cases = {
        "paged_attention": [
            proof.CASES["lengths 0, 1, page, page + 1; an empty one first and last"],
            proof.CASES["int8 by token, window, soft cap"],
        ],
        "paged_prefill": [chunk],
        "kv_write": [write_proof.CASES["one token each, some dropped"], write_proof.CASES["int8 by token"]],
    }

    def verdict(op: str) -> str:
        check = write_proof.check if op == "kv_write" else proof.check
        run = getattr(importlib.import_module(f"pallas_kernels.{op}.{backend}"), op)
        with Overheard() as heard:
            try:
                for mode in modes:
                    for case in cases[op]:
                        check(
                            functools.partial(run, interpret=mode),
                            **case,
                            dtype="bfloat16",
                            is_compiled=backend != "gpu",
                        )
            except Exception as error:  # a race, a wrong answer, or a simulator that could not go on
                return f"FAILED: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        if "RACE" in heard.text:  # which jax 0.11 prints and does not raise
            return "FAILED: a race"
        return f"{len(modes) * len(cases[op])} cases right, no race"

    return {op: verdict(op) for op in OPS}
