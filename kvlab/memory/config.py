"""How a model's memory is chosen: its kind, the format of what is stored, which tokens stay, and which are read."""

from dataclasses import dataclass

from kvlab.compression import COMPRESSIONS, Compression
from kvlab.compression.budget import LEGAL, Budget
from kvlab.ledger.states import QUANTISED
from kvlab.schema import ConfigError, Schema, added, choice, integer, plain, registered
from kvlab.selection import SELECTIONS, Selection


@dataclass(frozen=True)
class MemoryConfig(Schema):
    """The memory a model is evaluated through, and the format in which it stores tokens: as the model computes them,
    or as numbers of 8 or 4 bits with a scale for each token and head. `compression` says which tokens stay, and
    `budget` how many: slots a head (256), a fraction of the prompt (0.25), or bytes a sequence ("64KiB"). `selection`
    says which of the pages that stay a step reads."""

    name: str = choice("paged", ("paged", "dense"))
    page_size: int = integer(16, 1, 4096)
    chunk_len: int = integer(16, 1, 65536)
    format: str = added(choice("model", ("model", *QUANTISED)))
    compression: Compression | None = added(registered(COMPRESSIONS, "a compression"))  # noqa: RUF009
    budget: int | float | str | None = added(plain(None, LEGAL))
    selection: Selection | None = added(registered(SELECTIONS, "a selection"))  # noqa: RUF009

    def cross_check(self) -> None:
        if self.budget is not None:
            Budget.of(self.budget)
        if self.selection is not None and self.name != "paged":
            raise ConfigError("selection", self.selection.name, f"needs memory.name = paged, not {self.name}")
        if self.compression is None:
            return
        if self.name != "paged":
            raise ConfigError("compression", self.compression.name, f"needs memory.name = paged, not {self.name}")
        if self.budget is None:
            raise ConfigError("budget", None, f"{LEGAL}, where memory.compression = {self.compression.name}")
