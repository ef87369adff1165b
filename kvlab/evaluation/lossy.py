"""What a lossy memory did to sequences: compactions and sealings that were dispatched."""

from collections.abc import Hashable
from typing import NamedTuple

from kvlab.ledger.plan import Compaction
from kvlab.ledger.sealing import Sealed
from kvlab.memory.compacting import Kept


class Compacted(NamedTuple):
    """Who was compacted, as the host planned it, and which slots stayed, still on the device. A row of the plan is a
    sequence."""

    sequences: tuple[Hashable, ...]
    plan: Compaction
    kept: Kept


class SealedTogether(NamedTuple):
    """Whose pages were sealed behind one step, and which."""

    sequences: tuple[Hashable, ...]
    sealed: list[list[Sealed]]
