"""Attention of a chunk of new tokens over pages: `paged_prefill`."""

from pallas_kernels.paged_prefill.api import implementations, paged_prefill

__all__ = ["implementations", "paged_prefill"]
