"""The simulators' verdict on every op with kernels, with race detection, on a machine that has no such chip."""

import os
from functools import partial
from typing import Any

from pallas_kernels.compilers import Overheard
from pallas_kernels.ops import WITH_KERNELS, Op


def simulate(backend: str) -> dict[str, str]:
    """Runs a backend's kernels in their simulator on the cases that each op names; says of each op what came of it."""
    os.environ.setdefault("NPROC", "8")  # threads that XLA has: the simulator of GPUs wants one for every warpgroup
    modes = _modes(backend)
    return {name: _verdict(op, backend, modes) for name, op in WITH_KERNELS.items()}


def _modes(backend: str) -> list[Any]:
    """How kernels are interpreted: on TPUs with copies that arrive at the wait, and with those that arrive at once."""
    if backend == "gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return [plgpu.InterpretGPUParams(detect_races=True)]
    from jax.experimental.pallas import tpu as pltpu

    return [
        pltpu.InterpretParams(
            detect_races=True, dma_execution_mode=mode, uninitialized_memory="nan", out_of_bounds_reads="raise"
        )
        for mode in ("on_wait", "eager")
    ]


def _verdict(op: Op, backend: str, modes: list[Any]) -> str:
    run = op.kernel(backend)
    with Overheard() as heard:
        try:
            for mode in modes:
                for case in op.simulated:
                    case = {**case, "dtype": "bfloat16", "is_compiled": backend != "gpu"}
                    op.check(partial(run, interpret=mode), **case)
        except Exception as error:  # a race, a wrong answer, or a simulator that could not go on
            return f"FAILED: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if "RACE" in heard.text:  # which jax 0.11 prints and does not raise
        return "FAILED: a race"
    return f"{len(modes) * len(op.simulated)} cases right, no race"
