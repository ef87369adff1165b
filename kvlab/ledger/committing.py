"""How a step ends: its tokens count, full pages are published, and what the sequence does not need any more is free."""

from collections.abc import Hashable, Mapping, Sequence

from kvlab.ledger import compaction
from kvlab.ledger.compaction import Stored
from kvlab.ledger.publisher import Publisher
from kvlab.ledger.store import NEVER_WAKES
from kvlab.ledger.stores import Stores
from kvlab.ledger.tokens import ITEM, TokenIds, encode
from kvlab.ledger.tracked import Tracked


def commit(publisher: Publisher, held: Tracked, num_accepted: int, tokens: TokenIds, stored: Stored | None) -> None:
    """See `Ledger.commit`, for a step that does more than raise a count; `num_accepted` is a plain integer."""
    stores = publisher.stores
    _check(stores, held, num_accepted)
    length = held.length + num_accepted
    kept = compaction.kept_slots(stores.classes, held, length, stored) if stored else {}
    compaction.check_own(stores, held, kept)
    if held.ids is not None and len(tokens):
        held.learn(length, tokens)
    if kept:
        publisher.close(held)
        compaction.shorten(stores, held, length, kept)
    settle(publisher, held, num_accepted, ran=True)


def commit_each(
    publisher: Publisher, running: Mapping[Hashable, Tracked], sequences: Sequence[Hashable], tokens: TokenIds
) -> list[bool]:
    """See `Ledger.commit_each`."""
    data, done = encode(tokens), list[bool]()
    for place, name in enumerate(sequences):
        held = running[name]
        ids, end = held.ids, held.length + 1
        if plain := held.num_new == 1 and end < held.wake and (ids is None or len(ids) == held.length * ITEM):
            if ids is not None:
                ids += data[place * ITEM : (place + 1) * ITEM]
            held.length, held.num_new = end, 0
            if end >= held.full:
                held.full = NEVER_WAKES
                publisher.waiting.append(held)
        done.append(plain)
    return done


def settle(publisher: Publisher, held: Tracked, num_accepted: int, *, ran: bool) -> None:
    """Ends a step: the tokens count, full pages are published, and what live(n) does not need is let go."""
    stores = publisher.stores
    held.length += num_accepted
    held.num_new = held.lookahead = 0
    for store, holding in zip(stores.each, held.holdings, strict=True):
        store.settle(holding, held.length, num_accepted, ran=ran)
    if held.ids is not None:
        publisher.seal(held)
    for store, holding in zip(stores.each, held.holdings, strict=True):
        store.forget(holding, held.length)
    stores.refresh(held)


def _check(stores: Stores, held: Tracked, num_accepted: int) -> None:
    """Raises ValueError for counts of accepted tokens that cannot be."""
    reserved = held.num_new + held.lookahead
    if not 0 <= num_accepted <= reserved or not reserved:
        raise ValueError(f"num_accepted = {num_accepted}: must be in [0, {reserved}] reserved tokens")
    if num_accepted < reserved and stores.of_states and (num_accepted or (held.length and not held.lookahead)):
        legal = f"must be {'0 or ' * (held.lookahead > 0)}all {reserved} reserved tokens"
        name = stores.of_states[0].state.name
        raise ValueError(f"num_accepted = {num_accepted}: {legal}, since {name} cannot be rolled back further")
