"""Numbers with their units, as people read and write them."""

import re


def human_bytes(count: int | float) -> str:
    """1536 as "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_bytes(text: str) -> int:
    """ "64KiB" or "1.5 MiB" or "65536" as bytes, rounded down. Raises ValueError for what is no size, or below one
    byte."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B|)\s*", text)
    size = int(float(match[1]) * UNITS[match[2] or "B"]) if match else 0
    if size < 1:
        raise ValueError("must be a size in bytes of at least 1, such as 65536, 64KiB or 1.5MiB")
    return size
