"""Whether a head is the embedding. A file that stores both is believed, whatever its config.json says, and one that
stores either has both: as transformers 5 does it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import safe_open

from kvlab.weights.families import Architecture
from kvlab.weights.files import FLOATS, Stored
from kvlab.weights.tables import Entry, Table

HEAD = "lm_head.weight"
EMBEDDING = "embedding.embedding"
PIECE = 4096
"""Rows that are compared at a time."""


def as_stored(architecture: Architecture, table: Table, headers: Mapping[str, Stored]) -> Architecture:
    """The architecture with a head of its own where its file stores one that is not the embedding. Of a file that
    stores both, these two tensors are read, once a process."""
    (embedding,) = table[EMBEDDING].names
    if not architecture.model.tie_embeddings or not {HEAD, embedding} <= headers.keys():
        return architecture
    pair = tuple((headers[name].path, name, headers[name].path.stat().st_mtime_ns) for name in (embedding, HEAD))
    first, second = headers[embedding], headers[HEAD]
    are_alike = {first.dtype, second.dtype} <= {*FLOATS} and first.shape == second.shape and len(first.shape) == 2
    if are_alike and _are_equal(*pair):
        return architecture
    return replace(architecture, model=replace(architecture.model, tie_embeddings=False))


def with_embedding(table: Table, headers: Mapping[str, Stored]) -> Table:
    """The table of a tied model; its embedding is read from the head where that alone is stored."""
    (embedding,) = table[EMBEDDING].names
    if embedding in headers or HEAD not in headers:
        return table
    return table | {EMBEDDING: Entry((HEAD,))}


@lru_cache(maxsize=8)
def _are_equal(first: tuple[Path, str, int], second: tuple[Path, str, int]) -> bool:
    """Whether two matrices of files, of one shape, have the same numbers."""
    with safe_open(first[0], "np") as one, safe_open(second[0], "np") as other:
        left, right = one.get_slice(first[1]), other.get_slice(second[1])
        num_rows = left.get_shape()[0]
        pieces = [slice(row, min(row + PIECE, num_rows)) for row in range(0, num_rows, PIECE)]
        return all(np.array_equal(*(part[piece].astype(np.float32) for part in (left, right))) for piece in pieces)
