"""Where every byte is: one account for each state class, in integers that sum to the pool after every step.

pool = free + null + live + cached + tail + dead + duplicate + lookahead + reserved + scale + statistics + padding
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np

from kvlab.ledger.classes import StateClass
from kvlab.ledger.states import live_pages
from kvlab.ledger.store import Holding

SLOTS = ("live", "tail", "dead", "duplicate", "lookahead", "reserved", "padding", "cached", "shared", "live_pages")
PARTS = (
    *("free", "null", "live", "cached", "tail", "dead", "duplicate", "lookahead", "reserved", "scale", "statistics"),
    "padding",
)


@dataclass(frozen=True)
class Account:
    """Bytes of one class's pool, or of several added up; `PARTS` sum to `pool` exactly.

    live: tokens in live(n) of some sequence, counted once, less what compaction dropped; and recurrent states
    cached: pages held by the index or by hits alone
    tail: slots of held pages without a committed token
    dead: slots held outside every live(n)
    duplicate: sealed pages identical to an indexed one; none, since they are given up for it
    lookahead: speculative slots of steps in flight
    reserved: the part of a contiguous reservation that its sequence will still use
    scale: quantisation scales of held pages
    statistics: what is noted of held pages, to choose which are read
    padding: the part of a contiguous block that was not asked for

    Beside the sum: `live_scale` and `live_statistics`, the parts of `scale` and `statistics` that belong to what is
    live; `shared`, bytes that sharing saves (further holders of a page); and `stranded`, free bytes that no request can
    use because another class of the same ledger has none left.
    """

    name: str
    pool: int
    free: int
    null: int
    live: int
    cached: int
    tail: int
    dead: int
    duplicate: int
    lookahead: int
    reserved: int
    scale: int
    statistics: int
    padding: int
    live_scale: int
    live_statistics: int
    shared: int
    stranded: int

    @property
    def allocated(self) -> int:
        """Bytes of pages that some sequence holds."""
        return self.pool - self.free - self.null - self.cached

    @property
    def logical(self) -> int:
        """Bytes of what is live, its scales and statistics included: what `State.logical_bytes` states of each
        sequence."""
        return self.live + self.live_scale + self.live_statistics

    @property
    def balanced(self) -> bool:
        """Whether no part is negative and they sum to the pool."""
        parts = [getattr(self, name) for name in PARTS]
        return sum(parts) == self.pool and min(parts) >= 0

    def __add__(self, other: "Account") -> "Account":
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)[1:]}
        return Account(f"{self.name} + {other.name}", **sums)

    def as_dict(self) -> dict[str, int | str]:
        """One row of a table or frame."""
        return {**asdict(self), "allocated": self.allocated}

    def __str__(self) -> str:
        return as_table([self])


def as_table(accounts: Sequence[Account]) -> str:
    """Accounts as a table of bytes and percent of each pool, one column an account; parts that are zero in all are left
    out."""
    names = ["pool", *(name for name in PARTS if any(getattr(account, name) for account in accounts))]
    lines = ["  ".join(["bytes".ljust(9), *(f"{account.name[:24]:>24}" for account in accounts)])]
    for name in names:
        cells = [f"{getattr(account, name):>16,} {getattr(account, name) / account.pool:>6.1%}" for account in accounts]
        lines.append("  ".join([name.ljust(9), *(f"{cell:>24}" for cell in cells)]))
    return "\n".join(lines)


class Held(NamedTuple):
    """One sequence and what it holds of the class; `num_new` and `lookahead` tokens are its step in flight."""

    length: int
    num_new: int
    lookahead: int
    holding: Holding


def account(
    state: StateClass, num_free: int, sequences: Sequence[Held], indexed: Collection[int], stranded: int
) -> Account:
    """The account of one class; `indexed` are the pages that the prefix index holds."""
    slots = _blocks(state, sequences) if state.contiguous else _pages(state, sequences, indexed)
    scale = state.spec.scale_bytes * state.num_layers
    payload = state.spec.unit_bytes * state.num_layers - scale
    of_page = state.spec.index_bytes * state.num_layers
    page_scale = state.spec.per_page_bytes * state.num_layers - of_page
    live_pages = slots.pop("live_pages")
    num_held = sum(slots[name] for name in ("live", "tail", "dead", "duplicate", "lookahead", "reserved", "padding"))
    return Account(
        name=state.name,
        pool=state.pool_bytes,
        free=num_free * state.page_bytes,
        null=state.has_null_page * state.page_bytes,
        cached=slots.pop("cached") * state.page_bytes,
        live_scale=slots["live"] * scale + live_pages * page_scale,
        live_statistics=live_pages * of_page,
        shared=slots.pop("shared") * state.page_bytes,
        scale=num_held * scale + num_held // state.page_size * page_scale,
        statistics=num_held // state.page_size * of_page,
        stranded=stranded,
        **{name: count * payload for name, count in slots.items()},
    )


def _blocks(state: StateClass, sequences: Sequence[Held]) -> dict[str, int]:
    """Slots of contiguous blocks. What will be used later is reserved, what was asked for and will not be is tail."""
    slots: dict[str, int] = dict.fromkeys(SLOTS, 0)
    for length, _, lookahead, holding in sequences:
        size, asked = holding.block
        used, unwritten = holding.lengths.final_len if holding.lengths else asked, asked - length - lookahead
        slots["live"] += state.spec.live_len(length)
        slots["live_pages"] += sum(len(pages) for pages in live_pages(state.spec, length, state.page_size))
        slots["dead"] += length - state.spec.live_len(length)
        slots["lookahead"] += lookahead
        slots["reserved"] += (reserved := min(unwritten, max(0, used - length - lookahead)))
        slots["tail"] += unwritten - reserved
        slots["padding"] += size - asked
    return slots


def _pages(state: StateClass, sequences: Sequence[Held], indexed: Collection[int]) -> dict[str, int]:
    """Slots of pages; a slot that several sequences hold counts once, as live if it is live for one of them."""
    num_tables = np.zeros(state.num_pages, np.int64)
    live, written, speculative = np.zeros((3, state.num_pages, state.page_size), bool)
    copied: set[int] = set()
    offsets = np.arange(state.page_size)
    for length, num_new, lookahead, holding in sequences:
        physical = np.fromiter(holding.pages.values(), np.int64, len(holding.pages))
        num_tables[physical] += 1
        copied.update(source for _, source in holding.copies)
        if holding.writing is not None:
            num_tables[holding.writing] += 1
            speculative[holding.writing] = lookahead > 0
        if not state.paged or state.is_sealed:
            live[physical] = written[physical] = True
            continue
        logical = np.fromiter(holding.pages, np.int64, len(holding.pages))
        held_slots = logical[:, None] * state.page_size + offsets
        num_stored = length - holding.dropped
        for run in state.spec.live(num_stored):
            live[physical] |= (held_slots >= run.start) & (held_slots < run.stop)
        written[physical] |= held_slots < num_stored
        first = num_stored + num_new
        speculative[physical] |= (held_slots >= first) & (held_slots < first + lookahead)
    in_tables = set(np.flatnonzero(num_tables).tolist())
    alone = set(indexed) - in_tables
    counted = num_tables > 0
    num_live, num_written, num_speculative = (
        int(mask[counted].sum()) for mask in (live, written, speculative & ~written)
    )
    return dict.fromkeys(SLOTS, 0) | {
        "live": num_live,
        "dead": num_written - num_live + len(copied - in_tables - alone) * state.page_size,
        "lookahead": num_speculative,
        "tail": state.page_size * int(counted.sum()) - num_written - num_speculative,
        "cached": len(alone),
        "live_pages": int(live.any(axis=1)[counted].sum()),
        "shared": int(np.maximum(num_tables - 1, 0).sum()),
    }
