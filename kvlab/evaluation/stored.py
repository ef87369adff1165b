"""What a memory stored of each token, from what was read back of its pages."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvlab.evaluation.lossy import SealedTogether
from kvlab.evaluation.session import WrittenStep
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.reading_back import Given

type Stored = tuple[dict[str, dict[str, npt.NDArray[np.float32]]], ...]
"""By layer, the mixer's state and array: numbers as they are read, NaN where nothing was stored."""


def what_was_stored(layout: MemoryLayout, written: Sequence[WrittenStep], num_rows: int, num_tokens: int) -> Stored:
    """[B, T, K, D] of the sequences 0 to num_rows - 1, of every state that is held in a format token by token."""
    found: Stored = tuple({} for _ in layout.states)
    for step in written:
        for layer, (mine, given) in enumerate(zip(found, step.given, strict=True)):
            for name, state, part, heads in _places(layout, layer):
                for array, values in given.get(part, {}).items():
                    rows = np.asarray(values)
                    shape = (num_rows, num_tokens, state.arrays[0].shape[0], rows.shape[3])
                    whole = mine.setdefault(name, {}).setdefault(array, np.full(shape, np.nan, np.float32))
                    for row, sequence in enumerate(step.sequences):
                        assert isinstance(sequence, int)
                        start, count = int(step.starts[row]), int(step.counts[row])
                        whole[sequence][start : start + count, heads] = rows[row, :count]
    return found


def _places(layout: MemoryLayout, layer: int):
    """Of a layer: the mixer's state, what it is, the state that holds a part of it, and the heads of that part."""
    joined = layout.joined[layer]
    parts = {held for each in joined.values() for _, held in each.names}
    for name, index in layout.states[layer].items():
        if name not in parts:
            yield name, layout.classes[index].spec, name, slice(None)
    for name, each in joined.items():
        for part, heads in each.heads:
            yield name, each.state, dict(each.names)[part], list(heads)


def what_was_sealed(
    layout: MemoryLayout, sealed: Sequence[SealedTogether], given: Sequence[Given], num_rows: int
) -> Stored:
    """[B, K, S, D] of the sequences 0 to num_rows - 1, of every state whose pages are sealed: page by page, in the
    order in which a sequence sealed them."""
    pages: list[dict[str, dict[str, list[list[npt.NDArray[np.float32]]]]]] = [{} for _ in layout.states]
    for event, values in zip(sealed, given, strict=True):
        for layer, (mine, states) in enumerate(zip(pages, values, strict=True)):
            for name, arrays in states.items():
                for array, held in arrays.items():
                    rows = mine.setdefault(name, {}).setdefault(array, [[] for _ in range(num_rows)])
                    _take_in(event, layout.states[layer][name], np.asarray(held), rows)
    return tuple(
        {name: {array: _joined(rows) for array, rows in arrays.items()} for name, arrays in mine.items()}
        for mine in pages
    )


def _take_in(
    event: SealedTogether, index: int, pages: npt.NDArray[np.float32], rows: list[list[npt.NDArray[np.float32]]]
) -> None:
    """Gives each sequence its pages [n, K, page, D] of one sealing, which lie in the order of the sequences."""
    first = 0
    for sequence, said in zip(event.sequences, event.sealed, strict=True):
        assert isinstance(sequence, int)
        for each in said:
            if each.state_class == index:
                rows[sequence] += list(pages[first : first + each.num_pages])
                first += each.num_pages


def _joined(rows: list[list[npt.NDArray[np.float32]]]) -> npt.NDArray[np.float32]:
    """Pages [K, page, D] of each sequence behind one another: [B, K, S, D], NaN past the end of the shorter ones."""
    like = next(page for pages in rows for page in pages)
    num_heads, page_size, dim = like.shape
    whole = np.full((len(rows), num_heads, max(map(len, rows)) * page_size, dim), np.nan, np.float32)
    for row, pages in enumerate(rows):
        for number, page in enumerate(pages):
            whole[row, :, number * page_size : (number + 1) * page_size] = page
    return whole
