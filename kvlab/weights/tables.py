"""Which tensors of a file make each parameter, and how: names and transforms, read in both directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

type Tensor = npt.NDArray[Any]


@dataclass(frozen=True)
class Transform:
    """A parameter from tensors of a file, and the tensors from it. `unload` makes views, never copies."""

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
CONVOLUTION = Transform(lambda parts: parts[0][:, 0, ::-1].T, lambda whole: [whole.T[:, None, ::-1]])
"""[channels, 1, width] with the oldest input first in the file, [width, channels] with the newest first here."""


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the file's tensors it is made of."""

    names: tuple[str, ...]
    transform: Transform = AS_IS
    order: tuple[int, ...] | None = None
    """Rows of each tensor of the file, as they come here; None: as they are."""

    def load(self, parts: Sequence[Tensor]) -> Tensor:
        """The parameter."""
        ordered = parts if self.order is None else [part[np.asarray(self.order)] for part in parts]
        return self.transform.load(ordered)

    def unload(self, whole: Tensor) -> list[Tensor]:
        """The file's tensors; copies where rows are in another order there."""
        parts = self.transform.unload(whole)
        return parts if self.order is None else [part[np.argsort(self.order)] for part in parts]

    def shapes(self, ours: Sequence[int]) -> list[tuple[int, ...]]:
        """The file's shapes for a parameter of that shape; nothing of that size is allocated."""
        return [part.shape for part in self.transform.unload(np.broadcast_to(np.float32(0), tuple(ours)))]


type Table = dict[str, Entry]
"""By the dotted path of the parameter."""


def linear(ours: str, theirs: str, *, bias: bool = False, order: tuple[int, ...] | None = None) -> Table:
    """A linear layer, its rows in another order where one is given."""
    table: Table = {f"{ours}.kernel": Entry((f"{theirs}.weight",), TRANSPOSED, order)}
    if bias:
        table[f"{ours}.bias"] = Entry((f"{theirs}.bias",))
    return table
