"""A GGUF becomes a folder in the layout of the Hugging Face hub, which everything here that takes `weights.path`
reads. The folder is there wholly or not at all, and a finished one is not made again."""

import hashlib
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvlab.files import LockHeld, locked, write_json
from kvlab.schema import ConfigError, shown
from kvlab.units import human_bytes
from kvlab.weights.files import NUMPY, SINGLE, WeightsError, read_json, write_streamed
from kvlab.weights.gguf import read_gguf
from kvlab.weights.gguf_llama import Llama, read_llama
from kvlab.weights.gguf_tokenizer import read_tokenizer

MANIFEST = "source.json"
REVISION = 1
"""Rises with every change of what a conversion writes."""
DTYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Origin:
    """What determines a converted folder. `sha256` is of the GGUF. Matrices are stored in `dtype`, norms and biases in
    float32."""

    sha256: str
    dtype: str = "float32"
    tokenizer: bool = True
    revision: int = REVISION

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError("dtype", self.dtype, f"must be one of {', '.join(DTYPES)}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_finished(folder: Path, origin: Origin) -> bool:
    """Whether a folder is what `convert` would make. False where there is none, or an empty one.

    Raises ConfigError for a folder that holds anything else: nothing of it is written over.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MANIFEST).is_file():
        raise ConfigError("--out", str(folder), "must be a new or empty folder, or one that was converted from a GGUF")
    manifest = read_json(folder / MANIFEST)
    held = {name: manifest.get(name) for name in asdict(origin)}
    wrong = {name: (value, held[name]) for name, value in asdict(origin).items() if held[name] != value}
    if wrong:
        words = ", ".join(
            f"{name} {shown(there)} where {shown(asked)} is asked" for name, (asked, there) in wrong.items()
        )
        raise ConfigError(
            "--out", str(folder), f"holds another conversion ({words}): remove it, or name another folder"
        )
    sizes = manifest.get("files")
    if not isinstance(sizes, dict):
        raise WeightsError(folder / MANIFEST, ["files: must be an object of names and bytes"])
    for name, size in sizes.items():
        path = folder / Path(name).name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            legal = f"is damaged ({name} has {found} bytes, {size} were written): remove it"
            raise ConfigError("--out", str(folder), legal)
    return True


def convert(path: Path, folder: Path, origin: Origin) -> bool:
    """Writes the model of a GGUF into a folder; False when it was there already.

    Written are config.json, model.safetensors, tokenizer.json and tokenizer_config.json where the file has a
    tokenizer, and source.json, which says what it was made from. One tensor is held at a time. Raises WeightsError and
    ConfigError for whatever cannot be converted, before anything is written.
    """
    if is_finished(folder, origin):
        return False
    llama = read_llama(read_gguf(path))
    texts = _texts(llama, origin)
    shapes = _shapes(llama, origin.dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _room(folder, shapes)
    partial = folder.parent / f".{folder.name}.partial"
    try:
        with locked(partial / "lock"):
            if is_finished(folder, origin):  # another process was faster
                shutil.rmtree(partial)
                return False
            for left in partial.iterdir():  # by a process that was killed
                if left.name != "lock":
                    left.unlink()
            _write(partial, llama, texts, shapes, path, origin)
            (partial / "lock").unlink()
            partial.rename(folder)
    except LockHeld as held:
        legal = f"is being made by another process (pid {held.owner}); wait for it"
        raise ConfigError("--out", str(folder), legal) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return True


def _texts(llama: Llama, origin: Origin) -> dict[str, dict[str, Any]]:
    """The JSON files, by name."""
    texts = {"config.json": llama.config | {"dtype": origin.dtype}}
    if origin.tokenizer and (found := read_tokenizer(llama.gguf, llama.config["vocab_size"])) is not None:
        texts["tokenizer.json"], texts["tokenizer_config.json"] = found
    return texts


def _shapes(llama: Llama, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """What the safetensors file holds: float32 first, so that every tensor is aligned."""
    shapes = {name: llama.shape(name) for name in llama.names}
    return dict(
        sorted(
            ((name, (shape, DTYPES[dtype] if len(shape) > 1 else "F32")) for name, shape in shapes.items()),
            key=lambda item: (item[1][1] != "F32", item[0]),
        )
    )


def _room(folder: Path, shapes: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Raises OSError where the disk has too little room."""
    needed = sum(math.prod(shape) * NUMPY[dtype].itemsize for shape, dtype in shapes.values())
    if needed > (free := shutil.disk_usage(folder.parent).free):
        raise OSError(f"{folder}: needs {human_bytes(needed)}, and {human_bytes(free)} are free there")


def _write(
    partial: Path,
    llama: Llama,
    texts: dict[str, dict[str, Any]],
    shapes: dict[str, tuple[tuple[int, ...], str]],
    path: Path,
    origin: Origin,
) -> None:
    """Every file, the manifest last."""
    write_streamed(partial / SINGLE, shapes, llama.read)
    for name, value in texts.items():
        indent = None if name == "tokenizer.json" else 2
        words = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
        (partial / name).write_text(words + "\n", encoding="utf-8")
    sizes = {name: (partial / name).stat().st_size for name in (SINGLE, *texts)}
    described = {"name": llama.gguf.metadata.get("general.name"), "license": llama.gguf.metadata.get("general.license")}
    write_json(partial / MANIFEST, {"source": path.name, **described, **asdict(origin), "files": sizes})
