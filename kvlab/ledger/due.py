"""When sequences are to be compacted: at token counts that follow from their prompts and their classes' retentions
alone, so that a sequence that is computed again is compacted at the same places."""

from kvlab.ledger.classes import StateClass
from kvlab.ledger.store import NEVER_WAKES
from kvlab.ledger.tracked import Tracked


def due(classes: tuple[StateClass, ...], held: Tracked) -> dict[str | int, int]:
    """Slots to keep, by class, of a sequence that is to be compacted before its next step; empty: it is not."""
    found = dict[str | int, int]()
    if held.compress_at is None or not held.length:
        return found
    for state, holding in zip(classes, held.holdings, strict=True):
        if state.retention is not None:
            keep = state.retention.due(held.compress_at, held.length, held.length - holding.dropped)
            if keep is not None:
                found[state.name] = keep
    return found


def next_due(classes: tuple[StateClass, ...], held: Tracked) -> int:
    """The next length, beyond its own, at which a sequence is to be compacted; `NEVER_WAKES`: nowhere."""
    if held.compress_at is None:
        return NEVER_WAKES
    lengths = (
        rule.next_due(held.compress_at, held.length, held.length - holding.dropped)
        for state, holding in zip(classes, held.holdings, strict=True)
        for rule in (state.retention, state.sealing)
        if rule is not None
    )
    return min((length for length in lengths if length is not None), default=NEVER_WAKES)


def first_due(classes: tuple[StateClass, ...], prompt_len: int) -> int:
    """The first length at which a sequence with such a prompt is compacted: it can share no longer prefix."""
    rules = (rule for state in classes for rule in (state.retention, state.sealing) if rule is not None)
    lengths = (rule.next_due(prompt_len, 0, 0) for rule in rules)
    return min((length for length in lengths if length is not None), default=NEVER_WAKES)


def clip(classes: tuple[StateClass, ...], held: Tracked, num_new: int) -> int:
    """`num_new`, shortened so that the next step of a sequence passes no place where it is to be compacted. Behind its
    prompt a sequence that will be compacted goes on token by token, as it did when it was computed first."""
    if held.compress_at is None:
        return num_new
    if held.length >= held.compress_at:
        return 1
    return min(num_new, held.compress_at - held.length, next_due(classes, held) - held.length)
