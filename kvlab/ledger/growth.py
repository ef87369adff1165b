"""What one sequence holds, known beforehand: in closed form once its prompt is complete, and step by step through an
empty ledger without a device, compacted and sealed where its classes say."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from kvlab.ledger.answers import Wait
from kvlab.ledger.classes import Lengths, StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.states import live_pages


def stored_at(classes: Sequence[StateClass], prompt_len: int, length: int) -> list[int]:
    """Slots by class that a sequence with such a prompt stores at `length` >= `prompt_len` tokens, whatever was due
    done; 1 for one state a sequence, or 0 where it has ended, and of a window the live tokens."""
    sealed = {state.sealed_name: number for number, state in enumerate(classes) if state.sealing}
    found = list[int]()
    for state in classes:
        source = classes[sealed[state.name]] if state.name in sealed else state
        if not state.spec.per_token:
            found.append(0 if has_ended(state, classes, prompt_len) else 1)
            continue
        slots = length if source.retention is None else source.retention.stored(prompt_len, length)
        if source.sealing is not None:
            num_sealed = max(0, slots - source.sealing.residual) // source.page_size * source.page_size
            slots = num_sealed if state.is_sealed else slots - num_sealed
        found.append(slots if state.spec.span is None else state.spec.live_len(length))
    return found


def has_ended(state: StateClass, classes: Sequence[StateClass], prompt_len: int) -> bool:
    """Whether a sequence whose prompt is complete holds nothing of a class any more: statistics are let go where the
    prompt is compacted, and none is that is shorter than what is kept."""
    rules = (other.retention for other in classes if other.retention is not None)
    return state.until_compacted and any(rule.stored(prompt_len, prompt_len) < prompt_len for rule in rules)


def pages_at(classes: Sequence[StateClass], prompt_len: int, length: int) -> list[int]:
    """Pages by class that it holds then."""
    found = list[int]()
    for state, slots in zip(classes, stored_at(classes, prompt_len, length), strict=True):
        if state.paged and state.spec.span is not None:
            found.append(sum(map(len, live_pages(state.spec, length, state.page_size))))
        else:
            found.append(-(-slots // state.page_size) if state.paged else min(slots, 1))
    return found


def bytes_at(classes: Sequence[StateClass], prompt_len: int, length: int) -> int:
    """Bytes of these pages."""
    pages = pages_at(classes, prompt_len, length)
    return sum(count * state.page_bytes for count, state in zip(pages, classes, strict=True))


class Growth(NamedTuple):
    """Pages by class: at the end, and the most between two steps once the prompt was complete, after whatever was
    due. `Ledger.counters` have the most of all."""

    at_end: list[int]
    at_rest: list[int]


def grow(ledger: Ledger, name: Hashable, lengths: Lengths) -> Growth | None:
    """One sequence up to its final length, in the steps in which it would be served; None when pages run out."""
    at_rest, done = [0] * len(ledger.classes), 0
    while done < lengths.final_len:
        count = min(ledger.chunk_len, lengths.final_len - done)
        count = ledger.clip(name, count) if done else ledger.clip_first(lengths.prompt_len, count)
        if not ledger.reserve(name, count, lengths=None if done else lengths).ready:
            return None
        ledger.commit(name, count)
        done += count
        if not shorten(ledger, name):
            return None
        if done >= lengths.prompt_len:
            at_rest = list(map(max, at_rest, _pages(ledger, name)))
    return Growth(_pages(ledger, name), at_rest)


def shorten(ledger: Ledger, name: Hashable) -> bool:
    """Compacts and seals what is due of a sequence; False when pages run out."""
    if not ledger.stores.compresses:
        return True
    while due := ledger.due([name]):
        if isinstance(ledger.compact(due), Wait):
            return False
    return not isinstance(ledger.seal([name]), Wait)


def _pages(ledger: Ledger, name: Hashable) -> list[int]:
    return [len(ledger.pages(name, number)) for number in range(len(ledger.classes))]
