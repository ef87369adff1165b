"""The sizes that steps are padded to, so that few programs are compiled."""

from typing import NamedTuple

from kvlab.units import power_of_two


class Buckets(NamedTuple):
    """Sizes of rows and of widths to pad to. Where none of them is large enough, sizes grow by powers of two."""

    rows: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()

    def rows_for(self, num_rows: int, limit: int) -> int:
        """The least size that holds as many rows. Without one: the least power of two, or one and a half of one, so
        that at most a third is padding."""
        power = power_of_two(num_rows)
        size = 3 * power // 4 if num_rows <= 3 * power // 4 and power >= 4 else power
        return min((size for size in self.rows if size >= num_rows), default=min(size, limit))

    def width_for(self, num_tokens: int, limit: int) -> int:
        """The least size that holds as many tokens of a row. Without one: the least power of two. A single token has
        width 1, since that is what decoding runs all the time."""
        if num_tokens == 1:
            return 1
        power = power_of_two(num_tokens)
        return min(min((size for size in self.widths if size >= num_tokens), default=power), limit)
