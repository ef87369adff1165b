"""The arrays of one step: what every class says of the sequences in it."""

from collections.abc import Hashable, Sequence

import numpy as np

from kvlab.ledger.plan import Plan
from kvlab.ledger.stores import Stores
from kvlab.ledger.tracked import Tracked
from kvlab.units import counted


def plan(
    stores: Stores, sequences: Sequence[Hashable], steps: Sequence[Tracked], batch_size: int, num_tokens: int
) -> Plan:
    """See `Ledger.plan`; `steps` are what is known of the sequences."""
    if len(set(sequences)) < len(sequences):
        raise ValueError(f"sequences = {list(sequences)}: each may be in a step once")
    starts, counts = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
    new = [held.num_new for held in steps]
    if not all(new):
        raise ValueError(f"sequence {sequences[new.index(0)]!r}: no step is reserved")
    sizes = [held.num_new + held.lookahead for held in steps]
    if len(steps) > batch_size or max(sizes, default=0) > num_tokens:
        shape = f"{counted(len(steps), 'step')} of {counted(max(sizes, default=0), 'token')}"
        raise ValueError(f"{shape}: must fit in [{batch_size}, {num_tokens}]")
    starts[: len(steps)], counts[: len(steps)] = [held.length for held in steps], sizes
    by_class = ((store, [held.holdings[store.number] for held in steps]) for store in stores.each)
    return Plan(starts, counts, tuple(store.plan(mine, starts, counts, num_tokens) for store, mine in by_class))
