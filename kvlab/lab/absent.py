"""Whole steps of the default variants, compiled for a Hopper GPU that is not here: that no kernel refuses them is not
enough.

    JAX_PLATFORMS=cpu .venv-kernels/bin/python -m kvlab.lab.absent [H100|H200] [mixer ...]

Prints a line for every step; returns 1 when one does not compile, or takes something else than a GPU's kernels for its
pages.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kvlab.compose import compose, configs_dir
from kvlab.engine.step import MemoryStep
from kvlab.lab.kernels import summary
from kvlab.lab.laboratory import Laboratory
from kvlab.models.config import dtype_for
from kvlab.units import counted
from pallas_kernels.chips import TARGETS
from pallas_kernels.ops import WITH_KERNELS
from pallas_kernels.selection import Device, as_if_on, recording


def step_for(lab: Laboratory, width: int, sharding: Any) -> Any:
    """A config's step of `width` tokens a sequence, traced and lowered for the GPU of a sharding."""

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding), tree)

    layout = lab.layout(lab.config.context_len, lab.config.measure.batch_size)
    step, rows = MemoryStep.of(lab.model.structure, layout), layout.max_sequences
    tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32, sharding=sharding)
    arrays = (
        placed(lab.model.params),
        placed(jax.eval_shape(layout.allocate)),
        placed(layout.ledger().plan([], rows, width)),
    )
    return type(step).next_logits.trace(step, *arrays, tokens).lower(lowering_platforms=("cuda",))


def main(arguments: list[str]) -> int:
    """All steps, one after the other."""
    name = next((argument for argument in arguments if argument in TARGETS), "H200")
    mixers = [argument for argument in arguments if argument not in TARGETS]
    mixers = mixers or sorted(path.stem for path in (configs_dir() / "mixer").glob("*.yaml"))
    if name not in ("H100", "H200"):
        raise SystemExit(f"target = {name!r}: must be H100 or H200")
    description = TARGETS[name].description
    topology = topologies.get_topology_desc(platform="cuda", topology="1 x 1 x 1", target_config=description)
    sharding, status = SingleDeviceSharding(topology.devices[0]), 0
    for mixer in mixers:
        lab = Laboratory.of(compose([f"mixer={mixer}", f"model.dtype={dtype_for('gpu')}"]), abstract=True)
        jax.clear_caches()  # what another mixer traced would be known already, and leave no names
        for width in (1, lab.config.memory.chunk_len):
            with as_if_on(Device("gpu", name, "9.0")), recording() as taken:
                try:
                    step_for(lab, width, sharding).compile()
                    said = "compiled"
                except Exception as error:  # whatever a compiler raises: the others are tried all the same
                    said = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
            found = {op: choice.taken for op, choice in summary(taken).items()}
            right = all(implementation == "mosaic_gpu" for op, implementation in found.items() if op in WITH_KERNELS)
            status |= not right or said != "compiled"
            print(f"{mixer}, {counted(width, 'token')} a sequence for {name}: {said}; {found}", flush=True)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
