"""The sizes that steps are padded to, so that few programs are compiled."""

from collections.abc import Sequence


def least_of(sizes: Sequence[int], count: int, otherwise: int) -> int:
    """The least of the sizes that holds as many; `otherwise` where none does."""
    return min((one for one in sizes if one >= count), default=otherwise)


def rows_for(num_rows: int, limit: int) -> int:
    """The least power of two, or one and a half of one, that holds as many rows: at most a third is padding."""
    power = 1 << (num_rows - 1).bit_length()
    return min(3 * power // 4 if num_rows <= 3 * power // 4 and power >= 4 else power, limit)


def width_for(num_tokens: int, limit: int) -> int:
    """The least power of two that holds as many tokens of a row."""
    return min(1 << (num_tokens - 1).bit_length(), limit)
