"""A folder of safetensors: headers first, then one tensor at a time, so that a model never lies in memory twice."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvlab.files import read_regular

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMPY: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),  # numpy learns it from there
}
FLOATS = tuple(NUMPY)
MAX_JSON_BYTES = 1 << 28
MAX_DEPTH = 32
"""Levels of a JSON file; published ones have three."""


MAX_LINE, MAX_MESSAGE = 400, 1400
"""Characters of a problem, and of all that are listed."""


class WeightsError(ValueError):
    """A checkpoint that cannot be loaded: says which files, names, shapes or options, as many at once as fit."""

    def __init__(self, where: Path, problems: Iterable[str]):
        lines = [line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..." for line in problems]
        ends = itertools.accumulate(len(line) + 3 for line in lines)
        listed = lines[: max(1, sum(end <= MAX_MESSAGE for end in ends))]
        more = f"\n  and {len(lines) - len(listed)} more" if len(lines) > len(listed) else ""
        super().__init__(f"{where}: " + "\n  ".join(["cannot be loaded:", *listed]) + more)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, by its header."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def refuse_gguf(path: Path) -> None:
    """Raises WeightsError where a GGUF is given in place of a folder."""
    if path.suffix == ".gguf" and not path.is_dir():
        raise WeightsError(path, [f"a GGUF is converted first: kvlab weights {path}; then give the folder it prints"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises WeightsError when it is missing or anything else."""
    try:
        value = json.loads(read_regular(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise WeightsError(path.parent, [f"{path.name} is missing"]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(path, [f"not JSON ({type(error).__name__}: {error})"]) from None
    if not isinstance(value, dict):
        raise WeightsError(path, [f"is a {type(value).__name__}, not an object"])
    if _is_deeper(value, MAX_DEPTH):
        raise WeightsError(path, [f"is nested more than {MAX_DEPTH} deep"])
    return value


def _is_deeper(value: Any, most: int) -> bool:
    """Whether objects and lists stand in each other more than `most` deep."""
    level: list[Any] = [value]
    for _ in range(most):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for part in inner for each in part]
    return any(isinstance(each, dict | list) for each in level)


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of a folder, from the headers alone. Raises WeightsError for missing, damaged or foreign files."""
    headers: dict[str, Stored] = {}
    problems = []
    shards = _shards(directory)
    for shard, promised in shards.items():
        path = directory / shard
        if path.exists() and not path.is_file():  # a pipe might never end
            problems.append(f"{shard}: is no regular file")
            continue
        try:
            with safe_open(path, "np") as file:
                names = set(file.keys())
                for name in sorted(names):
                    if promised and name not in promised and any(name in others for others in shards.values()):
                        continue  # the index says that another file's is meant
                    if name in headers:
                        problems.append(f"{shard}: {name} is in {headers[name].path.name} as well")
                    part = file.get_slice(name)
                    headers[name] = Stored(path, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            problems.append(f"{shard}: {error}")
            continue
        problems += [f"{shard}: lacks {name}, which the index says it holds" for name in sorted(promised - names)]
    if problems:
        raise WeightsError(directory, problems)
    return headers


def _shards(directory: Path) -> dict[str, set[str]]:
    """File names and the tensors that the index promises of each; a single file promises nothing."""
    if (directory / INDEX).exists():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise WeightsError(directory / INDEX, ["weight_map must be an object of tensor names and file names"])
        shards: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise WeightsError(directory / INDEX, [f"{shard!r}: must be a .safetensors file of this folder"])
            shards.setdefault(shard, set()).add(name)
        return shards
    if (directory / SINGLE).exists():
        return {SINGLE: set()}
    if pickled := sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*")):
        raise WeightsError(
            directory, [f"{pickled[0].name} is a pickle, which is never read; convert it to safetensors"]
        )
    raise WeightsError(directory, [f"holds neither {SINGLE} nor {INDEX}"])


def read_tensor(stored: Stored, name: str) -> npt.NDArray[Any]:
    """One tensor. The file is opened anew, so that what is mapped of it is let go of afterwards."""
    with safe_open(stored.path, "np") as file:
        return file.get_tensor(name)


def write_shards(directory: Path, tensors: Iterator[tuple[str, npt.NDArray[Any]]], max_shard_bytes: int) -> None:
    """Writes tensors as they come, a file each `max_shard_bytes`, and the index where there are several files."""
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, npt.NDArray[Any]] = {}
    total = 0

    def flush() -> None:
        path = directory / f".shard-{len(shards)}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        shards.append((path, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(kept.nbytes for kept in pending.values()) + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = np.ascontiguousarray(tensor)
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(shards[0][0], directory / SINGLE)
        return
    weight_map: Mapping[str, str] = {}
    for index, (path, names) in enumerate(shards, 1):
        final = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        os.replace(path, directory / final)
        weight_map |= dict.fromkeys(names, final)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (directory / INDEX).write_text(text + "\n")


def write_streamed(
    path: Path, shapes: Mapping[str, tuple[tuple[int, ...], str]], tensor: Callable[[str], npt.NDArray[Any]]
) -> None:
    """Writes one safetensors file from shapes and types ("F32", "F16", "BF16"); each tensor is made when its turn
    comes, so that no two are held at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in shapes.items():
        begin, end = end, end + math.prod(shape) * NUMPY[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)  # the tensors begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for name, (shape, dtype) in shapes.items():
            made = tensor(name).astype(NUMPY[dtype], copy=False)
            assert made.shape == shape, name
            file.write(np.ascontiguousarray(made).data.cast("B") if dtype == "F32" else made.tobytes())
        file.flush()
        os.fsync(file.fileno())
