"""The `weights` section of a run: a published checkpoint in place of a model drawn from the seed."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from kvlab.files import home_expanded
from kvlab.schema import ConfigError, Schema, choice, text, to_plain
from kvlab.weights.checkpoint import peek_architecture
from kvlab.weights.files import WeightsError


@dataclass(frozen=True)
class WeightsConfig(Schema):
    """Where the parameters come from: `path` is a folder in the layout of the Hugging Face hub (null: drawn from the
    seed). Its config.json then takes the place of `mixer` and `model`. `dtype` "stored" computes in the file's own."""

    path: str | None = text(None, legal="a folder with config.json and safetensors", optional=True)
    dtype: str = choice("stored", ("stored", "float32", "bfloat16"))

    @property
    def folder(self) -> Path:
        """The folder. Only where `path` is given."""
        assert self.path is not None
        return home_expanded(self.path)

    @property
    def compute_dtype(self) -> str | None:
        """`dtype` as `load_checkpoint` takes it."""
        return None if self.dtype == "stored" else self.dtype

    def fingerprint(self) -> str:
        """SHA-256 over the folder's config and tensors: two folders that differ are two runs."""
        paths = [self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))]
        stats = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
        return _digest(stats)


def with_pretrained(fields: dict[str, Any], weights: WeightsConfig) -> dict[str, Any]:
    """The fields with the sections that a published checkpoint determines: mixer, model, and the task's tokenizer
    where it has one and none is named."""
    folder = weights.folder
    try:
        architecture = peek_architecture(folder, weights.compute_dtype)
    except WeightsError as error:
        raise ConfigError("weights.path", weights.path, str(error)) from None
    kinds = list(dict.fromkeys(architecture.layers))
    names = {layer: f"L{index}" for index, layer in enumerate(kinds)}
    mixer = {
        "name": re.sub(r"[^\w.\-]", "_", folder.resolve().name),
        "pattern": " ".join(names[layer] for layer in architecture.layers),
        **{names[layer]: {"type": layer.mixer, **to_plain(layer.config)} for layer in kinds},
    }
    task = dict(cast(Mapping[str, Any], fields.get("task", {})))
    if task.get("tokenizer", "") is None and (folder / "tokenizer.json").exists():
        task["tokenizer"] = str(folder / "tokenizer.json")
    return {**fields, "mixer": mixer, "model": to_plain(architecture.model), "task": task}


@lru_cache(maxsize=8)
def _digest(stats: tuple[tuple[str, int, int], ...]) -> str:
    """SHA-256 over files, read once a process unless they change."""
    digest = hashlib.sha256()
    for path, _, _ in stats:
        digest.update(Path(path).name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
