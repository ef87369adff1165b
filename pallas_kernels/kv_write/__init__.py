"""Tokens into pages, in place: `kv_write`."""

from pallas_kernels.kv_write.api import kv_write

__all__ = ["kv_write"]
