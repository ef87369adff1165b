"""Attention over pages: `paged_attention`."""

from pallas_kernels.masking import NOWHERE
from pallas_kernels.paged_attention.api import IMPLEMENTATIONS, paged_attention

__all__ = ["IMPLEMENTATIONS", "NOWHERE", "paged_attention"]
