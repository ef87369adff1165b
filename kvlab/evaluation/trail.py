"""Which tokens each head still held at each position, from what the device said it kept, and from the windows of what
forgets by position."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvlab.evaluation.lossy import Compacted, SealedTogether
from kvlab.ledger.sealing import Sealed
from kvlab.ledger.states import State
from kvlab.memory.layout import MemoryLayout
from pallas_kernels.visible import NOWHERE

NEVER = 2**30
"""A length that no sequence reaches: a token that is never dropped is gone there."""

type GoneAt = tuple[Mapping[str, Any], ...]
"""For each layer, by the mixer's state: [B, K, T] the length at which a head dropped each token; of every state that
drops tokens, or selects among them."""


def trail(layout: MemoryLayout, compacted: Sequence[Compacted], num_rows: int, num_tokens: int) -> GoneAt:
    """The mask that a lossy memory implies of the sequences 0 to num_rows - 1. Raises AssertionError where the device
    kept other counts than the host planned, or slots that were not there."""
    gone_at: list[dict[str, npt.NDArray[np.int32]]] = []
    for layer, joined in enumerate(layout.joined):
        mine = dict[str, npt.NDArray[np.int32]]()
        for name, parts in joined.items():
            num_heads = parts.state.arrays[0].shape[0]
            gone = np.full((num_rows, num_heads, num_tokens), NEVER, np.int32)
            for part, heads in parts.heads:
                spec = layout.classes[layout.states[layer][dict(parts.names)[part]]].spec
                gone[:, list(heads)] = [forgotten_at(spec, position) for position in range(num_tokens)]
            held = [[np.zeros(0, np.int64)] * num_heads for _ in range(num_rows)]
            known = [0] * num_rows
            for each in compacted:
                if name in each.kept[layer]:
                    kept = np.asarray(each.kept[layer][name])
                    of_heads = layout.page_size if "dealt" in dict(parts.names) else None
                    follow(each, layout.states[layer][name], kept, gone, held, known, of_heads)
            mine[name] = gone
        for name, index in layout.states[layer].items():
            spec = layout.classes[index].spec
            if spec.reading is not None and name not in mine:  # nothing is dropped, and not everything read
                mine[name] = np.full((num_rows, spec.arrays[0].shape[0], num_tokens), NEVER, np.int32)
        gone_at.append(mine)
    return tuple(gone_at)


class SealedAt(NamedTuple):
    """Of one state: [B, K, S] the positions of sealed tokens, page by page, -1 past their end; and [B, K, T] the length
    at which each token was sealed."""

    order: npt.NDArray[np.int32]
    sealed_at: npt.NDArray[np.int32]


def sealed_trail(
    layout: MemoryLayout, gone_at: GoneAt, sealed: Sequence[SealedTogether]
) -> tuple[dict[str, SealedAt], ...]:
    """When tokens were sealed, by layer and the mixer's state: the first slots that a head stored, in their order,
    page by page."""
    found = []
    for layer, joined in enumerate(layout.joined):
        mine = dict[str, SealedAt]()
        for name, parts in joined.items():
            if "sealed" in dict(parts.names):
                mine[name] = _sealed_at(layout.states[layer][name], layout.page_size, gone_at[layer][name], sealed)
        found.append(mine)
    return tuple(found)


def _sealed_at(index: int, page_size: int, gone: npt.NDArray[np.int32], sealed: Sequence[SealedTogether]) -> SealedAt:
    num_rows, num_heads, num_tokens = gone.shape
    events: list[list[Sealed]] = [[] for _ in range(num_rows)]
    for each in sealed:
        for sequence, pages in zip(each.sequences, each.sealed, strict=True):
            assert isinstance(sequence, int)
            events[sequence] += [page for page in pages if page.state_class == index]
    most = max((sum(event.num_pages for event in mine) for mine in events), default=0) * page_size
    order = np.full((num_rows, num_heads, most), -1, np.int32)
    sealed_at = np.full((num_rows, num_heads, num_tokens), NEVER, np.int32)
    for row, mine in enumerate(events):
        for head in range(num_heads):
            stays, first = np.flatnonzero(gone[row, head] == NEVER), 0
            for event in mine:
                positions = stays[first : first + event.num_pages * page_size]
                order[row, head, first : first + len(positions)] = positions
                sealed_at[row, head, positions] = event.length
                first += len(positions)
    return SealedAt(order, sealed_at)


def forgotten_at(state: State, position: int) -> int:
    """The length at which a state forgets a token by itself."""
    length = state.forgotten_at(position)
    return NEVER if length is None else length


def follow(
    compacted: Compacted,
    index: int,
    kept: npt.NDArray[np.int32],
    gone: npt.NDArray[np.int32],
    held: list[list[npt.NDArray[np.int64]]],
    known: list[int],
    tile_len: int | None,
) -> None:
    """Takes one compaction of one class into the mask; with a `tile_len` each head keeps a number of slots of its own,
    in tiles of that many."""
    plan = compacted.plan.classes[index]
    for row, sequence in enumerate(compacted.sequences):
        if not plan.stored[row]:
            continue
        assert isinstance(sequence, int)
        length, keep = int(compacted.plan.lengths[row]), int(plan.keep[row])
        num_kept = (kept[row] < NOWHERE).sum(axis=1)
        if tile_len is None:
            assert (num_kept == keep).all(), f"{num_kept} slots were kept, {keep} were planned"
        else:
            num_tiles, planned = (-(-num_kept // tile_len)).sum(), len(num_kept) * keep // tile_len
            assert num_tiles == planned, f"{num_tiles} tiles were kept, {planned} were planned"
        for head, before in enumerate(held[sequence]):
            positions = np.concatenate([before, np.arange(known[sequence], length)])
            assert len(positions) == plan.stored[row], f"{len(positions)} slots, the host knows {plan.stored[row]}"
            slots = kept[row, head][: num_kept[head]]
            assert (np.diff(slots) > 0).all(), f"slots {slots} are not ascending"
            assert slots[-1] < len(positions), f"slots {slots} of {len(positions)}"
            held[sequence][head] = positions[slots]
            gone[sequence, head, np.delete(positions, slots)] = length
        known[sequence] = length
