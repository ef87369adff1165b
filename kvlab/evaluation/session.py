"""The host driver of a step, for evaluation: prefills in chunks and decodes, a fixed batch at a time."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from jax import Array

from kvlab.engine.step import MemoryStep, Pools
from kvlab.ledger.answers import Ready
from kvlab.typing import Params


class Session:
    """Sequences that live in one memory. The batch is `layout.max_sequences` rows; fewer leave rows padded."""

    def __init__(self, step: MemoryStep, params: Params, pools: Pools | None = None):
        self.step, self.params = step, params
        self.layout = step.layout
        self.ledger = self.layout.ledger()
        self.pools: Pools = self.layout.allocate() if pools is None else pools

    def advance(self, chunks: Mapping[Hashable, Sequence[int] | npt.NDArray[np.int32]], width: int) -> Array:
        """Feeds each sequence its next tokens (1 to `width` of them) in one step; returns logits [rows, width, V].

        Row i belongs to the i-th sequence of `chunks`. Raises MemoryError with the ledger's reason when they do not
        fit; no sequence has then changed.
        """
        names = list(chunks)
        tokens = np.zeros((self.layout.max_sequences, width), np.int32)
        for row, name in enumerate(names):
            answer = self.ledger.reserve(name, len(chunks[name]))
            if not isinstance(answer, Ready):
                for reserved in names[:row]:
                    self.ledger.cancel(reserved)
                raise MemoryError(f"sequence {name!r}: {answer.reason}")
            tokens[row, : len(chunks[name])] = chunks[name]
        plan = self.ledger.plan(names, self.layout.max_sequences, width)
        logits, self.pools = self.step.run(self.params, self.pools, plan, tokens)
        for name in names:
            self.ledger.commit(name, len(chunks[name]))
        return logits

    def release_all(self) -> None:
        """Ends every sequence; their pages are free, their contents stay until overwritten."""
        for name in self.ledger.sequences:
            self.ledger.release(name)
