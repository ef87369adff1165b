"""Which tokens each query read, from what the device said of the pages that it chose."""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from kvlab.evaluation.lossy import Compacted
from kvlab.evaluation.session import ReadStep
from kvlab.evaluation.trail import NEVER, follow
from kvlab.ledger.reading import Reading
from kvlab.memory.layout import MemoryLayout

type ReadMasks = tuple[dict[str, tuple[npt.NDArray[np.bool_], ...]], ...]
"""For each layer, by the state that selects, of each layer that reads it: [B, K, T, T] which tokens each query of each
head read."""


class _Held:
    """Which token lies in each slot of every sequence and head, of one state of one layer."""

    def __init__(self, num_rows: int, num_heads: int, num_tokens: int):
        self._held = [[np.zeros(0, np.int64)] * num_heads for _ in range(num_rows)]
        self._known = [0] * num_rows
        self._gone = np.full((num_rows, num_heads, num_tokens), NEVER, np.int32)

    def at(self, sequence: int, head: int, length: int) -> npt.NDArray[np.int64]:
        """The positions of the tokens of a sequence in its slots, from the first on, once it has `length` tokens."""
        return np.concatenate([self._held[sequence][head], np.arange(self._known[sequence], length)])

    def follow(self, compacted: Compacted, index: int, kept: npt.NDArray[np.int32]) -> None:
        """Takes a compaction of the class `index` in."""
        follow(compacted, index, kept, self._gone, self._held, self._known, None)


def what_was_read(
    layout: MemoryLayout, steps: Sequence[ReadStep], compacted: Sequence[Compacted], num_rows: int, num_tokens: int
) -> ReadMasks:
    """The masks of the sequences 0 to num_rows - 1; a query that no step computed reads nothing. Raises AssertionError
    where a head read other counts of pages than are stated, or not the pages that are always read."""
    masks = list[dict[str, tuple[npt.NDArray[np.bool_], ...]]]()
    for layer, states in enumerate(layout.states):
        mine = dict[str, tuple[npt.NDArray[np.bool_], ...]]()
        for name, index in states.items():
            state = layout.classes[index].spec
            if state.reading is None:
                continue
            num_heads = state.arrays[0].shape[0]
            each_mask = np.zeros((state.num_readers, num_rows, num_heads, num_tokens, num_tokens), bool)
            held, waiting = (
                _Held(num_rows, num_heads, num_tokens),
                [each for each in compacted if name in each.kept[layer]],
            )
            for step in steps:
                starts: dict[Hashable, int] = dict(zip(step.sequences, step.plan.starts.tolist(), strict=False))
                while waiting and _came_before(waiting[0], starts):
                    done = waiting.pop(0)
                    held.follow(done, index, np.asarray(done.kept[layer][name]))
                for is_read, mask in zip(step.is_read[layer][name], each_mask, strict=True):
                    _take_in(step, index, np.asarray(is_read), state.reading, held, mask)
            mine[name] = tuple(each_mask)
        masks.append(mine)
    return tuple(masks)


def _came_before(compacted: Compacted, starts: dict[Hashable, int]) -> bool:
    """Whether a compaction was done before the step that began at these lengths."""
    lengths = zip(compacted.sequences, compacted.plan.lengths.tolist(), strict=True)
    return any(length <= starts.get(sequence, -1) for sequence, length in lengths)


def _take_in(
    step: ReadStep,
    index: int,
    is_read: npt.NDArray[np.bool_],
    reading: Reading,
    held: _Held,
    mask: npt.NDArray[np.bool_],
) -> None:
    """Takes one step of one state, which said `is_read` [B, T, K, N], into its mask."""
    plan, size = step.plan.classes[index], reading.page_size
    for row, sequence in enumerate(step.sequences):
        assert isinstance(sequence, int)
        length, count, begin = (int(each[row]) for each in (step.plan.starts, step.plan.counts, plan.starts))
        prompt_len = 0 if plan.prompts is None else int(plan.prompts[row])
        numbers = plan.page_starts[row] // size
        for head in range(mask.shape[1]):
            positions = held.at(sequence, head, length + count)
            for place in range(count):
                own, query = (begin + place) // size, length + place
                pages = numbers[is_read[row, place, head]]
                wanted = own + 1 if query < prompt_len else reading.num_read(own + 1)
                assert len(pages) == wanted, f"a head read {len(pages)} pages of {own + 1}, {wanted} are stated"
                always = [*range(min(reading.first, own + 1)), *range(max(0, own + 1 - reading.last), own + 1)]
                assert set(always) <= set(pages.tolist()), f"read pages {pages}, {always} are always read"
                assert pages.max() <= own, f"read page {pages.max()}, its own is {own}"
                slots = (pages[:, None] * size + np.arange(size)).ravel()
                mask[sequence, head, query, positions[slots[slots < len(positions)]]] = True
