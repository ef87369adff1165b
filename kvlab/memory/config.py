"""How a model's memory is chosen: its kind, the format of what is stored, which tokens stay, and which are read."""

from dataclasses import dataclass

from kvlab.compression import COMPRESSIONS, Compression
from kvlab.compression.budget import LEGAL, Budget
from kvlab.ledger.states import QUANTISED, ROTATED
from kvlab.registry import registered
from kvlab.schema import ConfigError, Schema, added, choice, flag, integer, plain
from kvlab.selection import SELECTIONS, Selection

SEALED = {"kivi4": 4, "kivi2": 2}
"""Formats that seal whole pages (KIVI, arXiv 2402.02750), and their bits."""
SCALE_BITS = 32
"""Of a channel in a page of keys: scale and zero point, of 16 bits each."""


@dataclass(frozen=True)
class MemoryConfig(Schema):
    """The memory a model is evaluated through, and the format in which it stores tokens: as the model computes
    them, or as numbers of 8, 4 or 2 bits with a scale for each token and head; "rotated8" and "rotated4" turn keys
    and values before. "kivi4" and "kivi2" seal whole pages, keys by channel and values by token, once `residual`
    newer tokens are stored; a prompt's pages at its end, or with `quantised_prefill` "chunks" behind each chunk of
    it. `compression` says which tokens stay, and `budget` how many: slots a head (256), a fraction of the prompt
    (0.25), or bytes a sequence ("64KiB"), which are solved for whole pages of slots, or for a knob of the mixer where
    nothing is compressed, and refused where less than 90% would be held, unless `allow_underfill`. `selection` says
    which of the pages that stay a step reads."""

    name: str = choice("paged", ("paged", "dense"))
    page_size: int = integer(16, 1, 4096)
    chunk_len: int = integer(16, 1, 65536)
    format: str = added(choice("model", ("model", *QUANTISED, *ROTATED, *SEALED)))
    residual: int = added(integer(32, 0, 1 << 20))
    quantised_prefill: str = added(choice("no", ("no", "chunks")))
    compression: Compression | None = added(registered(COMPRESSIONS, "a compression"))  # noqa: RUF009
    budget: int | float | str | None = added(plain(None, LEGAL))
    allow_underfill: bool = added(flag(False))
    selection: Selection | None = added(registered(SELECTIONS, "a selection", ("all", "none")))  # noqa: RUF009

    def cross_check(self) -> None:
        if self.budget is not None:
            Budget.of(self.budget)
        self._check_sealing()
        if self.selection is not None and self.name != "paged":
            raise ConfigError("selection", self.selection.name, f"needs memory.name = paged, not {self.name}")
        if self.compression is None:
            return
        if self.name != "paged":
            raise ConfigError("compression", self.compression.name, f"needs memory.name = paged, not {self.name}")
        if self.budget is None:
            raise ConfigError("budget", None, f"{LEGAL}, where memory.compression = {self.compression.name}")

    def _check_sealing(self) -> None:
        """What formats that seal pages ask of the rest."""
        if self.format not in SEALED:
            return
        least = SCALE_BITS // SEALED[self.format]
        if self.name != "paged":
            raise ConfigError("format", self.format, f"needs memory.name = paged, not {self.name}")
        if self.page_size < least:
            legal = (
                f"must be at least {least} for {self.format}: below, a channel's scales take more bits than its numbers"
            )
            raise ConfigError("page_size", self.page_size, legal)
        if self.selection is not None:
            legal = f"must be model or by token beside memory.selection = {self.selection.name}: it indexes open pages"
            raise ConfigError("format", self.format, legal)
        method = self.compression
        if method is None:
            return
        if method.at != "end" or method.every or method.weighs or method.heads != "uniform":
            legal = (
                f"{method.name} must compact once, at the prompt's end, before pages are sealed: at = end, every = 0"
            )
            raise ConfigError("format", self.format, f"{legal}, heads = uniform, and no weights of every step")
        if self.quantised_prefill != "no":
            legal = "must be no beside a compression: tokens are dropped first, and pages sealed then"
            raise ConfigError("quantised_prefill", self.quantised_prefill, legal)
