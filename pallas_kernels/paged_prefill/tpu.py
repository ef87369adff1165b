"""Chunks on TPUs: the kernel of `paged_attention.tpu`, whose items hold up to 512 rows."""

from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.tpu import refusal
from pallas_kernels.paged_prefill.reference import by_positions

__all__ = ["paged_prefill", "refusal"]

paged_prefill = by_positions(tpu.paged_attention)
