"""Linear recurrences with a matrix as their state: `linear_scan` over a chunk of tokens, `linear_scan_step` for one."""

from pallas_kernels.linear_scan.api import RULES, Rule, linear_scan, linear_scan_step

__all__ = ["RULES", "Rule", "linear_scan", "linear_scan_step"]
