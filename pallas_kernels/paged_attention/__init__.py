"""Attention over pages: `paged_attention`."""

from pallas_kernels.masking import NOWHERE
from pallas_kernels.paged_attention.api import implementations, paged_attention

__all__ = ["NOWHERE", "implementations", "paged_attention"]
