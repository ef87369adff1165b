"""What there is: the device, the versions, and whether Mosaic compiles and runs at all."""

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "jax-cuda12-pjrt", "libtpu")
SIDE = 64, 128
"""Of the probe's array: a tile of a TPU, and rows of a warpgroup."""


def probe() -> Iterator[dict[str, Any]]:
    """The device, then what came of one small kernel: a copy into shared memory, exp2, and the way back. On a CPU there
    is none."""
    device = jax.devices()[0]
    found: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "versions": dict(_versions()),
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "cpus": os.cpu_count(),
        "tools": [name for name in ("ptxas", "nvcc", "ncu", "nsys", "compute-sanitizer") if shutil.which(name)],
        "mosaic": "",
    }
    yield found
    if device.platform in KERNELS:
        ones = jnp.ones(SIDE, jnp.float32)
        total = float(jax.jit(KERNELS[device.platform])(ones).sum())
        if total != 2 * ones.size:
            raise ValueError(f"mosaic: 2 ** 1 summed over {ones.size} elements gave {total}")
        yield found | {"mosaic": "compiles and runs"}


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def on_gpu(x: Array) -> Array:
    """2 ** x [64, 128], by Mosaic: needs TMA, a barrier, and libdevice for exp2."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def kernel(source: Any, target: Any, staged: Any, barrier: Any) -> None:
        plgpu.copy_gmem_to_smem(source, staged, barrier)
        plgpu.barrier_wait(barrier)
        staged[...] = jnp.exp2(plgpu.load(staged, layout=plgpu.Layout.WGMMA))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, target)
        plgpu.wait_smem_to_gmem(0)

    scratch = [plgpu.SMEM(SIDE, jnp.float32), plgpu.Barrier()]
    return plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct(SIDE, jnp.float32), scratch_types=scratch)(x)


def on_tpu(x: Array) -> Array:
    """2 ** x [64, 128], by Mosaic."""
    from jax.experimental import pallas as pl

    def kernel(source: Any, target: Any) -> None:
        target[...] = jnp.exp2(source[...])

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(SIDE, jnp.float32))(x)


KERNELS = {"gpu": on_gpu, "tpu": on_tpu}
