"""Decoding on GPUs with the factors swapped, in the simulator with race detection."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import gpu, gpu_decode
from pallas_kernels.tensor_cores import Chip

HOW = plgpu.InterpretGPUParams(detect_races=True)
SMALL = {"num_pieces": 3, "max_stages": 2}
"""So that short sequences are cut, and the ring turns."""


def simulated(*arrays: Any, chip: Chip = "hopper", **options: Any) -> Any:
    """`gpu.paged_attention`, which must not fall back."""
    queries, pages, *_ = arrays
    columns = gpu_decode.columns_for(queries.shape[1], queries.shape[2] // pages.num_kv_heads)
    asked = pages.head_dims, pages.schemes, columns, pages.page_size
    assert gpu_decode.refusal(*asked, chip, pages.is_latent) is None
    return gpu.paged_attention(*arrays, interpret=HOW, chip=chip, **SMALL, **options)
