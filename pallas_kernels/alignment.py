"""Copies of GPU kernels that begin in shared memory where a TMA cannot: neither compilers nor simulators look."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

ALIGNMENT = 128
"""Bytes: where a copy through a tensor map begins in shared memory is a multiple."""


def misaligned(ref: Any) -> str | None:
    """Why a copy must not begin where a traced reference into shared memory does; None: it may. Of an index that is
    known only when the kernel runs, every value must do; a slice is taken to begin at a multiple of its own size. What
    is laid out in tiles is sliced by whole tiles, and passes."""
    transforms = getattr(ref, "transforms", ())
    if any(not hasattr(transform, "indices") for transform in transforms):
        return None
    whole = ref.ref if transforms else ref
    size, stride, dims = jnp.dtype(whole.dtype).itemsize, 1, []
    for length in reversed(whole.shape):
        dims.insert(0, stride)
        stride *= length
    offset = 0
    for transform in transforms:
        kept = []
        for index, step in zip(transform.indices, dims, strict=True):
            is_slice = hasattr(index, "start")
            start = index.start if is_slice else index
            if isinstance(start, int):
                offset += start * step
            elif (steps := step * size * (index.size if is_slice else 1)) % ALIGNMENT:
                return f"steps of {steps} bytes in {list(whole.shape)}: must be multiples of {ALIGNMENT}"
            if is_slice:
                kept.append(step)
        dims = kept
    if offset * size % ALIGNMENT:
        return f"{offset * size} bytes behind the beginning of {list(whole.shape)}: must be a multiple of {ALIGNMENT}"
    return None


@contextmanager
def aligned_copies() -> Iterator[None]:
    """While kernels are traced inside, a copy that begins where it must not raises ValueError."""
    real = {name: getattr(plgpu, name) for name in ("copy_gmem_to_smem", "copy_smem_to_gmem")}

    def checked(name: str, place: int) -> Any:
        def copy(*refs: Any, **options: Any) -> Any:
            if reason := misaligned(refs[place]):
                raise ValueError(f"{name}: {reason}")
            return real[name](*refs, **options)

        return copy

    plgpu.copy_gmem_to_smem, plgpu.copy_smem_to_gmem = checked("copy_gmem_to_smem", 1), checked("copy_smem_to_gmem", 0)
    try:
        yield
    finally:
        plgpu.copy_gmem_to_smem, plgpu.copy_smem_to_gmem = real.values()
