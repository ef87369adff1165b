"""How many of a sequence's pages a step reads of a state: closed forms of token counts alone, so that bytes read are
known beforehand. Which pages they are is chosen on the device."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """A query reads `pages` pages of `page_size` slots, or a `fraction` of those that its sequence has. The `first` and
    the `last` ones are always among them, the query's own page as the last; so at least as many are read.

    `reads_keys` says that all keys are read in order to choose, as no index would need. With `dense_prompts` the
    queries of a prompt read every page, and only what comes behind it chooses.
    """

    page_size: int
    pages: int | None = None
    fraction: float | None = None
    first: int = 1
    last: int = 1
    reads_keys: bool = False
    dense_prompts: bool = False

    def __post_init__(self) -> None:
        if (self.pages is None) == (self.fraction is None):
            raise ValueError(f"pages = {self.pages}, fraction = {self.fraction}: exactly one must be given")
        for name, low in (("page_size", 1), ("first", 0), ("last", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {low}")
        if self.pages is not None and self.pages < self.first + self.last:
            raise ValueError(
                f"pages = {self.pages}: must be at least the {self.first + self.last} that are always read"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction = {self.fraction}: must be in (0, 1]")

    def num_read(self, num_pages: int) -> int:
        """Pages that a query reads of a sequence that has `num_pages`, its own page counted."""
        wanted = self.pages if self.pages is not None else math.floor((self.fraction or 0) * num_pages + 1e-9)
        return min(num_pages, max(wanted, self.first + self.last))

    def slots_read(self, n: int) -> int:
        """Slots before token n that computing it reads. Of the pages that it reads, only its own is not full."""
        num_read = self.num_read(n // self.page_size + 1)
        return (num_read - 1) * self.page_size + n % self.page_size
