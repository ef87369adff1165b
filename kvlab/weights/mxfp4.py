"""Experts that a file stores in MXFP4 (OCP Microscaling Formats 1.0, 2023), as gpt-oss is published: 32 numbers of four
bits to one exponent of eight, 4.25 bits each. They become floats as they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np

from kvlab.weights.files import Stored
from kvlab.weights.tables import Entry, Table, Tensor

BLOCK = 32
"""Numbers of a row that share an exponent."""
SCALES = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan)).astype(np.float32)
"""The numbers of e8m0, by their byte; the last is NaN."""
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
"""The numbers of e2m1, by their four bits."""
PAIRS = np.stack([CODES[np.arange(256) & 15], CODES[np.arange(256) >> 4]], axis=-1)
"""The two numbers of every byte, [256, 2]: the low half is the first."""


@dataclass(frozen=True)
class Mxfp4(Entry):
    """Matrices [experts, inputs, outputs] from codes [experts, outputs, inputs / 32, 16] and exponents [experts,
    outputs, inputs / 32], both in bytes."""

    dtypes: ClassVar[tuple[str, ...]] = ("U8",)

    def load(self, parts: Sequence[Tensor]) -> Tensor:
        """In bfloat16, which has all of these numbers up to 2^128; an expert at a time."""
        codes, exponents = parts
        num_experts, num_outputs, num_blocks, _ = codes.shape
        whole = np.empty((num_experts, num_blocks * BLOCK, num_outputs), ml_dtypes.bfloat16)
        with np.errstate(over="ignore"):  # beyond 2^128 there is infinity
            for expert in range(num_experts):
                numbers = PAIRS[codes[expert]] * SCALES[exponents[expert]][:, :, None, None]
                whole[expert] = numbers.reshape(num_outputs, -1).T
        return whole

    def unload(self, whole: Tensor) -> list[Tensor]:
        raise AssertionError("a table that is written has none")

    def shapes(self, ours: Sequence[int]) -> list[tuple[int, ...]]:
        """The file's; raises ValueError where rows are no whole number of blocks."""
        num_experts, num_inputs, num_outputs = ours
        if num_inputs % BLOCK:
            raise ValueError(f"holds rows of {num_inputs}: must be a multiple of {BLOCK}, which share an exponent")
        blocks = (num_experts, num_outputs, num_inputs // BLOCK)
        return [(*blocks, BLOCK // 2), blocks]


def with_blocks(table: Table, headers: Mapping[str, Stored]) -> Table:
    """The table in which matrices of experts are read from NAME_blocks and NAME_scales where the folder has these in
    NAME's place."""
    found = dict(table)
    for ours, entry in table.items():
        (name, *others) = entry.names
        halves = (f"{name}_blocks", f"{name}_scales")
        if ".experts." in name and not others and name not in headers and halves[0] in headers:
            found[ours] = Mxfp4(halves)
    return found
