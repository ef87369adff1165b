"""Attention over pages: `paged_attention`, and `plan_attention` for what its layers share."""

from pallas_kernels.paged_attention.api import chunk_positions, paged_attention, takes_plan
from pallas_kernels.paged_attention.plan import Plan, plan_attention
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.visible import NOWHERE

__all__ = ["NOWHERE", "Lists", "Pages", "Plan", "chunk_positions", "paged_attention", "plan_attention", "takes_plan"]
