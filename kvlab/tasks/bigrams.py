"""Labels that complete a bigram which their sequence has had before: the associative recall hits of Zoology (arXiv
2312.04927). Losses there tell mixers apart whose losses over all tokens are alike."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

type Tokens = npt.NDArray[np.integer]


def repeats(tokens: Tokens, positions: Tokens, labels: Tokens) -> npt.NDArray[np.bool_]:
    """Of labels [B, M] at positions [B, M] of tokens [B, T]: whether the token there and its label stand side by side
    earlier, at j and j + 1 with j + 1 <= position. Such bigrams may overlap: the third `a` of `aaa` is a repeat."""
    size = 1 + max(int(tokens.max()), int(labels.max()))
    row = np.arange(len(tokens), dtype=np.int64)[:, None] * size
    shown = (row + tokens[:, :-1]) * size + tokens[:, 1:]
    asked = (row + np.take_along_axis(tokens, positions, axis=1)) * size + labels
    known, first = np.unique(shown, return_index=True)  # rows are apart, so that the first place is the row's own
    if not len(known):
        return np.zeros(labels.shape, bool)
    found = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return (known[found] == asked) & (first[found] % shown.shape[1] + 1 <= positions)


@dataclass(frozen=True, eq=False)
class BigramCounts:
    """How often a text has each bigram: `codes`, ascending, are first * size + second."""

    size: int
    codes: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, text: Tokens, vocab_size: int) -> "BigramCounts":
        """The counts of a text [N], N at least 2."""
        codes, counts = np.unique(text[:-1].astype(np.int64) * vocab_size + text[1:], return_counts=True)
        return cls(vocab_size, codes, counts)

    def __call__(self, first: Tokens, second: Tokens) -> npt.NDArray[np.int64]:
        """How often each of some bigrams is there."""
        asked = first.astype(np.int64) * self.size + second
        found = np.minimum(np.searchsorted(self.codes, asked), len(self.codes) - 1)
        return np.where(self.codes[found] == asked, self.counts[found], 0)
