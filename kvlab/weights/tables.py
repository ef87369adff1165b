"""Which tensors of a file make each parameter, and how: names and transforms, read in both directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvlab.weights.files import FLOATS

type Tensor = npt.NDArray[Any]


@dataclass(frozen=True)
class Transform:
    """A parameter from tensors of a file, and the tensors from it. `unload` makes views; copies of vectors only."""

    load: Callable[[Sequence[Tensor]], Tensor]
    unload: Callable[[Tensor], list[Tensor]]


AS_IS = Transform(lambda parts: parts[0], lambda whole: [whole])
TRANSPOSED = Transform(lambda parts: parts[0].T, lambda whole: [whole.T])
"""A linear layer: [out, in] in the file, [in, out] here."""
SIDE_BY_SIDE = Transform(
    lambda parts: np.concatenate([part.T for part in parts], axis=1),
    lambda whole: [half.T for half in np.split(whole, 2, axis=1)],
)
"""Two linear layers as one product."""
END_TO_END = Transform(lambda parts: np.concatenate(parts), lambda whole: np.split(whole, 2))
"""Two vectors as one."""
CONVOLUTION = Transform(lambda parts: parts[0][:, 0, ::-1].T, lambda whole: [whole.T[:, None, ::-1]])
"""[channels, 1, width] with the oldest input first in the file, [width, channels] with the newest first here."""
FLAT = Transform(lambda parts: parts[0].reshape(-1), lambda whole: [whole.reshape(1, 1, -1, 1)])
"""A vector of heads that the file has as [1, 1, heads, 1]."""
LESS_ONE = Transform(lambda parts: 1 + parts[0].astype(np.float32), lambda whole: [whole - 1])
"""The scale of a norm that the file has as its distance from one. Rounded as transformers rounds it, to float32."""


def joined(parts: Transform, sizes: Sequence[int]) -> Transform:
    """Several tensors, each read by `parts`, as one along its last axis, of which they take `sizes`."""
    ends = np.cumsum(sizes)[:-1]
    return Transform(
        lambda tensors: np.concatenate([parts.load([tensor]) for tensor in tensors], axis=-1),
        lambda whole: [parts.unload(part)[0] for part in np.split(whole, ends, axis=-1)],
    )


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the file's tensors it is made of."""

    dtypes: ClassVar[tuple[str, ...]] = FLOATS
    """The types, as safetensors has them, that those tensors may have."""
    names: tuple[str, ...]
    transform: Transform = AS_IS
    order: tuple[int, ...] | None = None
    """Rows of each tensor of the file, as they come here; None: as they are."""
    num_rows: int | None = None
    """Rows that each of those tensors has, where `order` are some of them and other parameters have the rest."""

    def load(self, parts: Sequence[Tensor]) -> Tensor:
        """The parameter."""
        ordered = parts if self.order is None else [part[np.asarray(self.order)] for part in parts]
        return self.transform.load(ordered)

    def unload(self, whole: Tensor) -> list[Tensor]:
        """The file's tensors, or their rows `order` where others have the rest; copies where rows are in another order
        there."""
        parts = self.transform.unload(whole)
        if self.order is None or self.num_rows is not None:
            return parts
        return [part[np.argsort(self.order)] for part in parts]

    def shapes(self, ours: Sequence[int]) -> list[tuple[int, ...]]:
        """The file's shapes for a parameter of that shape; nothing of that size is allocated."""
        shapes = [part.shape for part in self.transform.unload(np.broadcast_to(np.float32(0), tuple(ours)))]
        return shapes if self.num_rows is None else [(self.num_rows, *shape[1:]) for shape in shapes]


type Table = dict[str, Entry]
"""By the dotted path of the parameter."""


def less_one(table: Table) -> Table:
    """The same with the scale of every norm as its distance from one."""
    return {
        name: replace(entry, transform=LESS_ONE) if name.endswith(".scale") else entry for name, entry in table.items()
    }


def linear(
    ours: str, theirs: str, *, bias: bool = False, order: tuple[int, ...] | None = None, num_rows: int | None = None
) -> Table:
    """A linear layer; `order` and `num_rows` as in `Entry`."""
    table: Table = {f"{ours}.kernel": Entry((f"{theirs}.weight",), TRANSPOSED, order, num_rows)}
    if bias:
        table[f"{ours}.bias"] = Entry((f"{theirs}.bias",), AS_IS, order, num_rows)
    return table


def rows_by_group(num_groups: int, sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Where the rows of several parameters lie in one tensor that has `num_groups` groups, each with `sizes` rows of
    them in turn."""
    end, found = 0, list[tuple[int, ...]]()
    for size in sizes:
        start, end = end, end + size
        found.append(tuple(group * sum(sizes) + row for group in range(num_groups) for row in range(start, end)))
    return found
