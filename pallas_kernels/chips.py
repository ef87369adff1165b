"""Chips that kernels are compiled for, and what is compiled for each of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from pallas_kernels.formats import FORMATS

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
    """A chip. `bandwidth` is its data sheet's, in bytes a second; `description` is XLA's for GPUs, a topology's name for TPUs."""

    name: str
    backend: str
    bandwidth: float
    description: str


def _gpu(name: str, full_name: str, bandwidth: float, memory: int, cores: int, major: int) -> Target:
    description = GPU_DESCRIPTION.format(name=full_name, bandwidth=bandwidth, memory=memory, cores=cores, major=major)
    return Target(name, "gpu", bandwidth, description)


TARGETS = {
    one.name: one
    for one in (
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
    """One compilation of an op: 32 sequences of 4,096 tokens, 32 query heads on 8 KV heads; a chunk is of 256 tokens each. `format`
    is the pages', scaled `per` token or channel where it is quantised."""

    op: str
    format: str
    head_dim: int
    per: str = ""
    extra: str = ""
    """What is asked for beside: "lists" of each KV head with valid slots, page "mass", "options" (a window, sinks, a soft cap); to write, "decode" of one token each, and "few" of three sequences."""

    @property
    def num_queries(self) -> int:
        """New tokens of each sequence."""
        return 1 if self.op == "paged_attention" or self.extra in ("decode", "few") else 256

    @property
    def batch(self) -> int:
        """Sequences."""
        return 3 if self.extra == "few" else 32

    @property
    def page_bytes(self) -> int:
        """Keys and values that must move: live bytes once, with their scales; to write, the tokens in 16 bits and what they become."""
        bits = {"float32": 32, "int8": 8, "fp8": 8, "int4": 4}.get(self.format, 16)
        a_token = 2 * self.head_dim * bits // 8 + (2 * 4 if self.per == "token" else 0)
        if self.op == "kv_write":
            return self.batch * self.num_queries * 8 * (a_token + 2 * self.head_dim * max(2, bits // 16))
        return self.batch * 4096 * 8 * a_token


OPS = ("paged_attention", "paged_prefill", "kv_write")
DIMS = (64, 128, 256)


def shapes(backend: str, dims: Sequence[int] = DIMS) -> list[Shape]:
    """What is compiled for a backend: every op, format and head dim, and what may be asked for beside."""
    plain = {"gpu": ("bfloat16", "float16"), "tpu": ("bfloat16", "float32")}[backend]
    formats = [(one, "") for one in plain] + [(one, per) for per in ("token", "channel") for one in FORMATS]
    found = [Shape(op, format, dim, per) for op in OPS for format, per in formats for dim in dims]
    return [
        *found,
        Shape("paged_attention", "bfloat16", 128, extra="lists"),
        Shape("paged_attention", "bfloat16", 128, extra="mass"),
        Shape("paged_attention", "int8", 128, "token", extra="mass"),
        Shape("paged_attention", "int8", 128, "channel", extra="mass"),
        Shape("paged_attention", "bfloat16", 128, extra="options"),
        Shape("paged_attention", "int8", 128, "token", extra="options"),
        Shape("paged_attention", "int8", 128, "channel", extra="options"),
        Shape("paged_prefill", "bfloat16", 128, extra="options"),
        Shape("paged_prefill", "bfloat16", 128, extra="lists"),
        Shape("paged_prefill", "bfloat16", 128, extra="mass"),
        Shape("kv_write", "bfloat16", 128, extra="decode"),
        Shape("kv_write", "int8", 128, "token", extra="decode"),
        Shape("kv_write", "int4", 128, "channel", extra="few"),
    ]
