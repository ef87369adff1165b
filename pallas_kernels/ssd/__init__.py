"""State-space duality (Mamba-2): `ssd` over a chunk of tokens, `ssd_step` for one."""

from pallas_kernels.ssd.api import ssd, ssd_step

__all__ = ["ssd", "ssd_step"]
