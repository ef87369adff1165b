"""From a call and an absent chip to machine code, and what the compilers say of it."""

import contextlib
import math
import os
import re
import sys
import tempfile
from typing import Any

from pallas_kernels.chips import Call, Target


def sharding_of(target: Target) -> Any:
    """One absent device of a target, as arrays are placed on it."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    if target.backend == "gpu":
        how = {"platform": "cuda", "topology": "1 x 1 x 1", "target_config": target.description}
    else:
        how = {"platform": "tpu", "topology_name": target.description}
    return SingleDeviceSharding(topologies.get_topology_desc(**how).devices[0])


def context_of(target: Target) -> Any:
    """What a program is to be traced under: for TPUs an abstract mesh of the absent device."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh

    if target.backend == "gpu":
        return contextlib.nullcontext()
    (device,) = sharding_of(target).device_set
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract))


def platforms_of(target: Target) -> dict[str, Any]:
    """What lowering is to be told: for a GPU, that programs are for CUDA."""
    return {"lowering_platforms": ("cuda",)} if target.backend == "gpu" else {}


def lowered_for(target: Target, call: Call) -> tuple[Any, int]:
    """A call as the program that a target's compiler gets, and the bytes that it keeps on chip."""
    import jax

    def in_context(*arrays: Any) -> Any:
        with context_of(target):
            return call.run(*arrays)

    traced = jax.jit(in_context, donate_argnums=call.donated).trace(*call.arrays)
    return traced.lower(**platforms_of(target)), on_chip_bytes(traced.jaxpr.jaxpr)


def on_chip_bytes(jaxpr: Any) -> int:
    """The shared memory, or VMEM, that the kernels in a program keep at once: the most of any."""
    most = 0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, equation.params.get("jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        mine = 0
        if name in ("pallas_call", "run_scoped") and inner is not None:
            for variable in inner.invars:
                space, shape = (
                    str(getattr(variable.aval, "memory_space", "")),
                    list(getattr(variable.aval, "shape", ())),
                )
                dtype: Any = getattr(variable.aval, "dtype", None)
                if getattr(dtype, "itemsize", None) is None or "barrier" in str(dtype) or "sem" in str(dtype):
                    continue
                if space in ("vmem", "default") and len(shape) >= 2:  # whole registers of 8 x 128 words
                    rows = 32 // dtype.itemsize
                    shape[-2:] = [-(-shape[-2] // rows) * rows, -(-shape[-1] // 128) * 128]
                copies = {"smem": int(name == "run_scoped"), "vmem": 1, "default": 2}.get(space, 0)
                mine += copies * math.prod(shape) * dtype.itemsize
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, tuple | list) else (parameter,):
                value = getattr(value, "jaxpr", value)
                if hasattr(value, "eqns"):
                    mine = max(mine, on_chip_bytes(value))
        most = max(most, mine)
    return most


def estimate_us(compiled: Any) -> float | None:
    """What XLA's cost model says of a program, where it says how long."""
    costs = compiled.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    seconds = (costs or {}).get("optimal_seconds")
    return seconds * 1e6 if seconds and seconds > 0 else None


def resources(remarks: str) -> dict[str, int]:
    """Registers and spills as ptxas reports them."""
    registers = max(map(int, re.findall(r"[Uu]sed (\d+) registers", remarks)))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", remarks)))
    return {"registers": registers, "spilled_bytes": spilled}


class Overheard:
    """What C++ writes to this process's standard output and error meanwhile."""

    def __enter__(self) -> "Overheard":
        self._file = tempfile.TemporaryFile()
        sys.stdout.flush()
        self._kept = [os.dup(1), os.dup(2)]
        for descriptor in (1, 2):
            os.dup2(self._file.fileno(), descriptor)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.stdout.flush()
        for descriptor, kept in zip((1, 2), self._kept, strict=True):
            os.dup2(kept, descriptor)
            os.close(kept)
        self._file.seek(0)
        self.text = self._file.read().decode(errors="replace")
