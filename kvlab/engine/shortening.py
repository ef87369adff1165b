"""What a memory does to sequences between steps: compactions and sealings, for all who run at once."""

from collections.abc import Callable, Hashable, Sequence

from kvlab.engine.entries import Before, Entry, Heard, Planned
from kvlab.ledger.answers import Wait
from kvlab.ledger.ledger import Ledger


def is_due(ledger: Ledger, running: Sequence[Entry]) -> bool:
    """Whether some running sequence is to be compacted, or pages of one to be sealed, before the next step."""
    if not ledger.stores.compresses:
        return False
    return bool(_due(ledger, running)) or any(ledger.seals(entry.name) for entry in running)


def shorten(
    ledger: Ledger,
    running: list[Entry],
    before: list[Before],
    make_room: Callable[[], None],
    listen: Callable[[Entry], Planned | Wait] | None = None,
) -> None:
    """Compacts whoever is due, then seals the pages that are: each in one program, behind all that is in `before`.
    Where pages are short `make_room` takes the last in order off the device. With a second pass, which `listen` plans,
    sequences are compacted one after the other, each behind its own. Raises RuntimeError where somebody alone finds no
    room."""
    if not ledger.stores.compresses:
        return
    if listen is not None:
        _compact_behind_passes(ledger, running, before, make_room, listen)
    while due := _due(ledger, running):
        compaction = ledger.compact(due, {entry.name: entry.seed for entry in running})
        if not isinstance(compaction, Wait):
            before.append(compaction)
            break
        _or_fail("compaction", compaction, running, make_room)
    while isinstance(done := ledger.seal([entry.name for entry in running]), Wait):
        _or_fail("sealing", done, running, make_room)
    if done is not None:
        before.append(done[0])


def _compact_behind_passes(
    ledger: Ledger,
    running: list[Entry],
    before: list[Before],
    make_room: Callable[[], None],
    listen: Callable[[Entry], Planned | Wait],
) -> None:
    while due := _due(ledger, running):
        entry = next(entry for entry in running if entry.name in due)
        heard = listen(entry)
        if isinstance(heard, Wait):
            _or_fail("second pass", heard, running, make_room)
            continue
        compaction = ledger.compact({entry.name: due[entry.name]}, {entry.name: entry.seed})
        if isinstance(compaction, Wait):
            _or_fail("compaction", compaction, running, make_room)
            continue
        before.append(Heard(heard, compaction))


def _due(ledger: Ledger, running: Sequence[Entry]) -> dict[Hashable, dict[str | int, int]]:
    return ledger.due([entry.name for entry in running])


def _or_fail(what: str, answer: Wait, running: Sequence[Entry], make_room: Callable[[], None]) -> None:
    if len(running) == 1:
        raise RuntimeError(f"{what}: {answer.reason}")
    make_room()
