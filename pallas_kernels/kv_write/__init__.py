"""Tokens into pages, in place: `kv_write`."""

from pallas_kernels.kv_write.api import implementations, kv_write

__all__ = ["implementations", "kv_write"]
