"""Numbers with their units, as people read them; and the sizes that they are rounded up to."""


def human_bytes(count: int | float) -> str:
    """1536 as "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def power_of_two(least: int) -> int:
    """The least power of two that is not below `least`, and at least 1: what sizes are padded to, so that few shapes
    are compiled."""
    return 1 << max(0, least - 1).bit_length()
