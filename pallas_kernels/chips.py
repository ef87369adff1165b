"""Chips that kernels are compiled for, and what one compilation is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from pallas_kernels.formats import FORMATS, SHARED, Quantised, Scheme, Stored

GPU_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
"""What XLA's compiler asks of a GPU, in the text form of its GpuTargetConfigProto."""


@dataclass(frozen=True)
class Target:
    """A chip. `bandwidth` is its data sheet's, in bytes a second; `description` is XLA's for GPUs, a topology's name
    for TPUs."""

    name: str
    backend: str
    bandwidth: float
    description: str
    architecture: str = ""
    """Of GPUs: chips of one architecture get the same machine code, of the same multiprocessors."""

    @property
    def options(self) -> dict[str, Any]:
        """What kernels are to be told of the chip, as they cannot ask it."""
        return {"chip": "blackwell" if self.name == "B200" else "hopper"} if self.backend == "gpu" else {}


def _gpu(name: str, full_name: str, bandwidth: float, memory: int, cores: int, major: int) -> Target:
    description = GPU_DESCRIPTION.format(name=full_name, bandwidth=bandwidth, memory=memory, cores=cores, major=major)
    return Target(name, "gpu", bandwidth, description, f"{major}, {cores} multiprocessors")


TARGETS = {
    target.name: target
    for target in (
        _gpu("H100", "NVIDIA H100 80GB HBM3", 3.35e12, 85_000_000_000, 132, 9),
        _gpu("H200", "NVIDIA H200 141GB HBM3e", 4.8e12, 151_397_597_184, 132, 9),
        _gpu("B200", "NVIDIA B200", 8.0e12, 192_000_000_000, 148, 10),
        Target("v4", "tpu", 1.228e12, "v4:2x2x1"),
        Target("v5e", "tpu", 0.819e12, "v5e:2x2"),
        Target("v5p", "tpu", 2.765e12, "v5p:2x2x1"),
        Target("v6e", "tpu", 1.638e12, "v6e:2x2"),
        Target("7x", "tpu", 7.38e12, "tpu7x:2x2x1"),
    )
}


@dataclass(frozen=True)
class Shape:
    """One compilation of an op, in the sizes that its `shapes` says. `format` is the pages', scaled `per` token or
    channel where it is quantised, or as `KIVI` has it; `num_queries` are the new tokens of each sequence; `extra` is
    what is asked for beside."""

    op: str
    format: str
    head_dim: int
    per: str = ""
    extra: str = ""
    num_queries: int = 1


class Call(NamedTuple):
    """A function of arrays, their shapes on an absent device, and which of them are given away."""

    run: Callable[..., Any]
    arrays: tuple[Any, ...]
    donated: tuple[int, ...] = ()


DIMS = (64, 128, 256)


KIVI = "kivi"
"""In place of what scales are of: keys by channel and values by token in groups, as `formats.kivi` has them."""


def formats_of(backend: str) -> list[tuple[str, str]]:
    """The formats of pages that a backend's kernels take, and what their scales are of: nothing, "token" or "channel".
    A TPU's registers are too wide for rows of 2 bits."""
    plain = {"gpu": ("bfloat16", "float16"), "tpu": ("bfloat16", "float32")}[backend]
    quantised = [format for format in FORMATS if backend == "gpu" or format != "int2"]
    return [(format, "") for format in plain] + [(format, per) for per in ("token", "channel") for format in quantised]


def stored_as(format: str, per: str, shape: tuple[int, ...], sharding: Any) -> Stored:
    """The shapes of a pool [P, K, page, D] on an absent device, with its scales if `format` has them."""
    if format not in FORMATS:
        return cast(Any, jax.ShapeDtypeStruct(shape, jnp.dtype(format), sharding=sharding))
    return stored_in(Scheme(format, "token" if per == "token" else "channel"), shape, sharding)


def stored_in(scheme: Scheme, shape: tuple[int, ...], sharding: Any) -> Quantised:
    """The shapes of a pool [P, K, page, D] in a scheme on an absent device."""

    def array(*dims: int, of: Any) -> Any:
        return jax.ShapeDtypeStruct(dims, of, sharding=sharding)

    *leading, dim = shape
    payload = array(*leading, dim // SHARED.get(scheme.format, 1), of=FORMATS[scheme.format])
    kept = (*leading[:2], *scheme.scales_shape(leading[2], dim))
    scales, zeros = (array(*kept, of=jnp.dtype(scheme.scale_dtype)) for _ in range(2))
    return Quantised(payload, scales, scheme.format, scheme.per, scheme.group, zeros if scheme.has_zeros else None)
