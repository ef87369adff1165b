"""Which tokens each head still held at each position, from what the device said it kept."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvlab.engine.compactor import Compacted
from kvlab.memory.layout import MemoryLayout

NEVER = 2**30
"""A length that no sequence reaches: a token that is never dropped is gone there."""

type GoneAt = tuple[dict[str, npt.NDArray[np.int32]], ...]
"""For each layer, by the mixer's state: [B, K, T] the length at which a head dropped each token; of every state that
drops tokens, or selects among them."""


def trail(layout: MemoryLayout, compacted: Sequence[Compacted], num_rows: int, num_tokens: int) -> GoneAt:
    """The mask that compactions of the sequences 0 to num_rows - 1 imply. Raises AssertionError where the device kept
    other counts than the host planned, or slots that were not there."""
    gone_at: list[dict[str, npt.NDArray[np.int32]]] = []
    for layer, joined in enumerate(layout.joined):
        mine = dict[str, npt.NDArray[np.int32]]()
        selecting = [name for name, index in layout.states[layer].items() if layout.classes[index].spec.reading]
        for name in dict.fromkeys([*joined, *selecting]):
            index = layout.states[layer][name]
            num_heads = layout.classes[index].spec.arrays[0].shape[0]
            gone = np.full((num_rows, num_heads, num_tokens), NEVER, np.int32)
            held = SlotPositions(num_rows, num_heads)
            for each in compacted:
                if name in each.kept[layer]:
                    for sequence, length, dropped in held.follow(each, index, np.asarray(each.kept[layer][name])):
                        for head, positions in enumerate(dropped):
                            gone[sequence, head, positions] = length
            mine[name] = gone
        gone_at.append(mine)
    return tuple(gone_at)


class SlotPositions:
    """Which token lies in each slot of every sequence and head, of one state of one layer."""

    def __init__(self, num_rows: int, num_heads: int):
        self._held = [[np.zeros(0, np.int64)] * num_heads for _ in range(num_rows)]
        self._known = [0] * num_rows

    def at(self, sequence: int, head: int, length: int) -> npt.NDArray[np.int64]:
        """The positions of the tokens of a sequence in its slots, from the first on, once it has `length` tokens."""
        return np.concatenate([self._held[sequence][head], np.arange(self._known[sequence], length)])

    def follow(
        self, compacted: Compacted, index: int, kept: npt.NDArray[np.int32]
    ) -> Iterator[tuple[int, int, list[npt.NDArray[np.int64]]]]:
        """Takes a compaction of the class `index` in; for each of its sequences the length at which it was compacted,
        and the positions that each head dropped."""
        plan = compacted.plan.classes[index]
        for row, sequence in enumerate(compacted.sequences):
            if not plan.stored[row]:
                continue
            assert isinstance(sequence, int)
            length, keep, dropped = int(compacted.plan.lengths[row]), int(plan.keep[row]), []
            for head in range(len(self._held[sequence])):
                positions = self.at(sequence, head, length)
                assert len(positions) == plan.stored[row], f"{len(positions)} slots, the host knows {plan.stored[row]}"
                slots = kept[row, head][:keep]
                assert (np.diff(slots) > 0).all(), f"slots {slots} are not ascending"
                assert slots[-1] < len(positions), f"slots {slots} of {len(positions)}"
                assert (kept[row, head][keep:] >= len(positions)).all(), "more slots were kept than were planned"
                self._held[sequence][head] = positions[slots]
                dropped.append(np.delete(positions, slots))
            self._known[sequence] = length
            yield sequence, length, dropped
