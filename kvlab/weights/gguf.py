"""GGUF files (versions 2 and 3, little endian; github.com/ggml-org/ggml, docs/gguf.md), read in numpy: the header
first, then one tensor at a time. Every count is checked against the file's length before anything of that size is
made."""

import math
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlab.schema import shown
from kvlab.units import counted
from kvlab.weights.files import WeightsError

type Bytes = npt.NDArray[np.uint8]
type Floats = npt.NDArray[np.float32]

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_DIMS = 4
CHUNK = 1 << 16
"""Blocks that are decoded at a time, so that what is made on the way stays in the cache."""


def _halves(blocks: Bytes, begin: int) -> Floats:
    """The float16 at that byte of every block, as a column."""
    return np.ascontiguousarray(blocks[:, begin : begin + 2]).view("<f2").astype(np.float32)


def _q8_0(blocks: Bytes) -> Floats:
    """scale * code: a float16 and 32 signed bytes."""
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _halves(blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    """scale * code + least: two float16 and 16 bytes, the low halves being the first 16 codes."""
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    codes *= _halves(blocks, 0)
    codes += _halves(blocks, 2)
    return codes


@dataclass(frozen=True)
class TensorType:
    """How a tensor stores its numbers: `block_len` of them in `block_bytes`; `decode` takes blocks [n, block_bytes] and
    gives numbers [n, block_len]."""

    name: str
    block_len: int
    block_bytes: int
    decode: Callable[[Bytes], Floats]


TYPES = {
    0: TensorType("F32", 1, 4, lambda blocks: blocks.view("<f4").astype(np.float32, copy=False)),
    1: TensorType("F16", 1, 2, lambda blocks: blocks.view("<f2").astype(np.float32)),
    3: TensorType("Q4_1", 32, 20, _q4_1),
    8: TensorType("Q8_0", 32, 34, _q8_0),
}
"""What can be read, by ggml's number."""

OTHERS = {
    2: "Q4_0", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""What cannot, to be refused by name."""


@dataclass(frozen=True)
class Tensor:
    """A tensor by its header: `shape` with the outermost axis first, bytes [begin, begin + num_bytes) of the file."""

    shape: tuple[int, ...]
    type: TensorType
    begin: int
    num_bytes: int


@dataclass(frozen=True)
class GGUF:
    """A file's header: typed metadata, and where each tensor lies."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def read(self, name: str) -> Floats:
        """A tensor in float32. It is mapped while it is decoded, and let go of afterwards. Raises WeightsError for
        numbers that are not finite."""
        tensor = self.tensors[name]
        stored = np.memmap(self.path, np.uint8, "r", tensor.begin, (tensor.num_bytes,))
        blocks = stored.reshape(-1, tensor.type.block_bytes)
        numbers = np.empty((len(blocks), tensor.type.block_len), np.float32)
        for begin in range(0, len(blocks), CHUNK):
            with np.errstate(invalid="ignore"):  # an infinite scale times zero
                part = tensor.type.decode(blocks[begin : begin + CHUNK])
            if not np.isfinite(part).all():
                raise WeightsError(self.path, [f"{name}: holds numbers that are not finite: the file is damaged"])
            numbers[begin : begin + CHUNK] = part
        return numbers.reshape(tensor.shape)


def read_gguf(path: Path) -> GGUF:
    """The header of a GGUF file. Raises WeightsError for a file that is missing, damaged, cut short, of another version
    or byte order, and for tensor types that are not read."""
    try:
        stored = np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        raise WeightsError(path, ["there is no such file"]) from None
    except (OSError, ValueError) as error:  # a folder; an empty file
        raise WeightsError(path, [f"not a GGUF file ({error})"]) from None
    try:
        return _Header(stored).read(path)
    except _DamagedError as error:
        raise WeightsError(path, [str(error)]) from None


class _DamagedError(Exception):
    """What is wrong with a file, in a sentence."""


STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d"}
"""Metadata types and their `struct` letters."""


@dataclass
class _Header:
    """A cursor over the bytes before the tensors."""

    stored: npt.NDArray[np.uint8]
    place: int = 0
    view: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.view = memoryview(self.stored)

    def read(self, path: Path) -> GGUF:
        if bytes(self.view[:4]) != MAGIC:
            raise _DamagedError(f"not a GGUF file: begins with {bytes(self.view[:4])!r}, must be {MAGIC!r}")
        self.place = 4
        version = self.number("I", "version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise _DamagedError(f"version = {version}: must be 2 or 3{', little endian' if swapped else ''}")
        num_tensors, num_pairs = self.number("Q", "tensor count"), self.number("Q", "metadata count")
        self.room(num_pairs, 13, "metadata count")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self.text("a metadata key")
            if key in metadata:
                raise _DamagedError(f"{key}: is there twice")
            metadata[key] = self.value(self.number("I", key), key)
        self.room(num_tensors, 24, "tensor count")
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self.text("a tensor's name")
            if name in entries:
                raise _DamagedError(f"{name}: is there twice")
            entries[name] = self.tensor(name)
        return GGUF(path, metadata, self.placed(entries, metadata.get("general.alignment", 32)))

    def room(self, count: int, size: int, what: str) -> None:
        """Raises where `count` things of at least `size` bytes each do not fit in what is left of the file."""
        if count * size > len(self.view) - self.place:
            left = counted(len(self.view) - self.place, "byte")
            raise _DamagedError(f"{what}: {count} at byte {self.place}, but only {left} are left: cut or damaged")

    def number(self, letter: str, what: str) -> Any:
        size = struct.calcsize(f"<{letter}")
        self.room(1, size, what)
        (value,) = struct.unpack_from(f"<{letter}", self.view, self.place)
        self.place += size
        return value

    def text(self, what: str) -> str:
        length = self.number("Q", what)
        self.room(length, 1, what)
        raw = bytes(self.view[self.place : self.place + length])
        self.place += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise _DamagedError(f"{what}: not UTF-8 at byte {self.place - length}") from None

    def value(self, kind: int, key: str) -> Any:
        """A metadata value. A float32 is the shortest decimal that rounds to it: 1e-05, not 9.99999974e-06."""
        if kind == STRING:
            return self.text(key)
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            raise _DamagedError(f"{key}: no metadata type {kind}")
        value = self.number(SCALARS[kind], key)
        if kind == BOOL:
            return self.truth([value], key)[0]
        return float(str(np.float32(value))) if SCALARS[kind] == "f" else value

    def array(self, key: str) -> list[Any]:
        kind, count = self.number("I", key), self.number("Q", key)
        if kind == STRING:
            self.room(count, 8, key)
            return [self.text(key) for _ in range(count)]
        if kind not in SCALARS:
            nested = "arrays in arrays are not read" if kind == ARRAY else f"no metadata type {kind}"
            raise _DamagedError(f"{key}: {nested}")
        size = struct.calcsize(f"<{SCALARS[kind]}")
        self.room(count, size, key)
        raw = self.view[self.place : self.place + count * size]
        self.place += count * size
        values = np.frombuffer(raw, np.dtype(f"<{SCALARS[kind]}")).tolist()
        return self.truth(values, key) if kind == BOOL else values

    def truth(self, values: list[int], key: str) -> list[bool]:
        if any(value > 1 for value in values):
            raise _DamagedError(f"{key}: a truth value must be 0 or 1")
        return list(map(bool, values))

    def tensor(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset."""
        num_dims = self.number("I", name)
        if not 1 <= num_dims <= MAX_DIMS:
            raise _DamagedError(f"{name}: {num_dims} dimensions: must be 1 to {MAX_DIMS}")
        dims = [self.number("Q", name) for _ in range(num_dims)]
        return tuple(reversed(dims)), self.number("I", name), self.number("Q", name)

    def placed(self, entries: dict[str, tuple[tuple[int, ...], int, int]], alignment: Any) -> dict[str, Tensor]:
        """The tensors with their bytes, each of which must lie in the file, aligned, and be no other tensor's."""
        if type(alignment) is not int or alignment < 8 or alignment % 8:
            raise _DamagedError(f"general.alignment = {shown(alignment)}: must be a multiple of 8")
        _check_types({name: kind for name, (_, kind, _) in entries.items()})
        data = -(-self.place // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        end, before = data, ""
        for name, (shape, kind, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
            held, begin = TYPES[kind], data + offset
            if math.prod(shape) == 0 or shape[-1] % held.block_len:
                raise _DamagedError(f"{name}: shape {list(shape)}: rows must be whole blocks of {held.block_len}")
            num_bytes = math.prod(shape) // held.block_len * held.block_bytes
            if offset % alignment:
                raise _DamagedError(f"{name}: offset {offset}: must be a multiple of {alignment}")
            if begin < end:
                raise _DamagedError(f"{name}: lies over {before}: damaged")
            end, before = begin + num_bytes, name
            if end > len(self.view):
                raise _DamagedError(f"{name}: ends at byte {end}, but the file has {len(self.view)}: cut or damaged")
            tensors[name] = Tensor(shape, held, begin, num_bytes)
        return {name: tensors[name] for name in entries}


def _check_types(kinds: dict[str, int]) -> None:
    """Refuses what is not read: each type once, with how many tensors have it."""
    counts = Counter(kind for kind in kinds.values() if kind not in TYPES)
    if counts:
        legal = ", ".join(held.name for held in TYPES.values())
        words = [f"{OTHERS.get(kind, f'type {kind}')} ({counted(count, 'tensor')})" for kind, count in counts.items()]
        first = next(name for name, kind in kinds.items() if kind not in TYPES)
        raise _DamagedError(f"{first}: tensors of {', '.join(words)} are not read: must be of {legal}")
