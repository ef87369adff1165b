"""The `weights` section of a run: a published checkpoint in place of a model drawn from the seed."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from kvlab.files import home_expanded
from kvlab.models.model import Model
from kvlab.schema import ConfigError, Schema, added, choice, integer, shown, text, to_plain
from kvlab.tasks import TASKS, Text
from kvlab.tokenizers import ByteTokenizer
from kvlab.weights.checkpoint import abstract_model, load_checkpoint, peek_architecture
from kvlab.weights.families import Architecture
from kvlab.weights.files import WeightsError
from kvlab.weights.runs import TrainedRun, drawn_shapes, is_run, read_run

DETERMINED = ("mixer", "model")
"""Sections of a run that published weights determine."""
INSTEAD = "what can be laid over given weights is weights.window, weights.num_sinks and weights.dtype"


@dataclass(frozen=True)
class WeightsConfig(Schema):
    """Where the parameters come from: `path` is a folder in the layout of the Hugging Face hub, or that of a finished
    run (null: drawn from the seed). What it says takes the place of `mixer` and `model`, which must not be given beside
    it.

    Over given weights lie `dtype`, in which they are computed ("stored": the file's own), and with a `window` a mask:
    every layer of attention sees at most that many tokens, the current one included, and the first `num_sinks`. A
    layer's own window stays where it is narrower; `num_sinks` without `window` are of these alone."""

    path: str | None = text(None, legal="a folder with config.json and safetensors, or a finished run's", optional=True)
    dtype: str = choice("stored", ("stored", "float32", "bfloat16"))
    window: int | None = added(integer(None, 1, optional=True))
    num_sinks: int = added(integer(0, 0, 4096))

    def cross_check(self) -> None:
        if self.path is not None:
            return
        for name, nothing in (("dtype", "stored"), ("window", None), ("num_sinks", 0)):
            if (value := getattr(self, name)) != nothing:
                legal = "null" if nothing is None else nothing
                raise ConfigError(name, value, f"must be {legal} without weights.path: there are no given weights")

    @property
    def folder(self) -> Path:
        """The folder. Only where `path` is given."""
        assert self.path is not None
        return home_expanded(self.path)

    @property
    def compute_dtype(self) -> str | None:
        """`dtype` as `load_checkpoint` takes it."""
        return None if self.dtype == "stored" else self.dtype

    @property
    def run(self) -> TrainedRun | None:
        """The finished run that is the folder; None where it is a published checkpoint's. Raises WeightsError."""
        return read_run(self.folder) if is_run(self.folder) else None

    def abstract(self) -> Model:
        """The model with shapes in place of parameters. Raises ConfigError."""
        architecture = self.architecture()
        return drawn_shapes(architecture) if is_run(self.folder) else abstract_model(architecture)

    def architecture(self) -> Architecture:
        """The model that the folder holds, under the window. Raises ConfigError."""
        try:
            if (run := self.run) is not None:
                return run.architecture(self.compute_dtype, self.window, self.num_sinks)
            return peek_architecture(self.folder, self.compute_dtype, window=self.window, num_sinks=self.num_sinks)
        except WeightsError as error:
            raise ConfigError("weights.path", self.path, str(error)) from None
        except OSError as error:  # a name longer than a file's may be, a folder that others may not enter
            raise ConfigError("weights.path", self.path, f"must be a folder to read from: {error.strerror}") from None
        except ConfigError as error:
            raise error.under("weights") from None

    def load(self) -> Model:
        """The model with its parameters, of a published checkpoint. Raises WeightsError."""
        return load_checkpoint(self.folder, self.compute_dtype, window=self.window, num_sinks=self.num_sinks).model

    def fingerprint(self) -> str:
        """SHA-256 over the folder's config and tensors, or of a run's parameters: two that differ are two runs."""
        if (run := self.run) is not None:
            return run.params_sha256
        paths = [self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))]
        files = [path for path in paths if path.is_file()]  # a pipe is refused when the tensors are read
        stats = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        return _digest(stats)


def with_pretrained(fields: dict[str, Any], weights: WeightsConfig) -> dict[str, Any]:
    """The fields with the sections that a published checkpoint determines: mixer, model, and the tokenizer of a task
    that reads text where none is named. Raises ConfigError where there is none: bytes are no ids of its vocabulary."""
    folder, architecture = weights.folder, weights.architecture()
    if is_run(folder):
        return _with_run(fields, weights, read_run(folder))
    kinds = list(dict.fromkeys(architecture.layers))
    names = {layer: f"L{index}" for index, layer in enumerate(kinds)}
    mixer = {
        "name": re.sub(r"[^\w.\-]", "_", folder.resolve().name) + _laid_over(weights),
        "pattern": " ".join(names[layer] for layer in architecture.layers),
        **{names[layer]: layer.as_dict() for layer in kinds},
    }
    task = dict(cast(Mapping[str, Any], fields.get("task", {})))
    kind = TASKS.get(str(task.get("type")))
    has_bytes = architecture.vocab_size == ByteTokenizer.vocab_size
    if kind is Text and not has_bytes:
        legal = (
            f"is text by the byte, and the vocabulary of these weights has {architecture.vocab_size} tokens, not 256"
        )
        raise ConfigError("task.type", task["type"], f"{legal}; task=perplexity reads text with their tokenizer")
    if kind is not None and "tokenizer" in kind.Config.defaults() and task.get("tokenizer") is None:
        if (folder / "tokenizer.json").exists():
            task["tokenizer"] = str(folder / "tokenizer.json")
        elif not has_bytes:
            raise ConfigError("task.tokenizer", None, _no_tokenizer(folder, architecture.vocab_size))
    return {**fields, "mixer": mixer, "model": to_plain(architecture.model), "task": task}


def _with_run(fields: dict[str, Any], weights: WeightsConfig, run: TrainedRun) -> dict[str, Any]:
    """The fields with the variant and model of a run, and its tokenizer where a task reads text and names none. Raises
    ConfigError for a task whose tokens are not those of its training."""
    mixer = run.mixer_under(weights.window, weights.num_sinks)
    task = dict(cast(Mapping[str, Any], fields.get("task", {})))
    kind = TASKS.get(str(task.get("type")))
    if kind is not None and run.tokenizer and "tokenizer" in kind.Config.defaults() and not task.get("tokenizer"):
        task["tokenizer"] = run.tokenizer
    variant = {**mixer.as_dict(), "name": mixer.name + _laid_over(weights)}
    return {**fields, "mixer": variant, "model": to_plain(weights.architecture().model), "task": task}


def _no_tokenizer(folder: Path, vocab_size: int) -> str:
    """What to do where a folder has no tokenizer.json."""
    others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).exists()]
    why = f"{folder} has no tokenizer.json, and bytes are not the {vocab_size} tokens of its vocabulary"
    if others:
        return (
            f"must name a tokenizer.json: {why}; it has {others[0]}, of which transformers' save_pretrained makes one"
        )
    return f"must name a tokenizer.json: {why}"


def _laid_over(weights: WeightsConfig) -> str:
    """What a variant's name says of the mask."""
    window = "" if weights.window is None else f"-window{weights.window}"
    return window + (f"-sinks{weights.num_sinks}" if weights.num_sinks else "")


def without_determined(composed: Mapping[str, Any]) -> dict[str, Any]:
    """Composed values without the sections that published weights determine: there they say what the task's own model
    would be."""
    given = composed.get("weights")
    is_given = isinstance(given, Mapping) and given.get("path") is not None
    return {name: section for name, section in composed.items() if not (is_given and name in DETERMINED)}


def refuse_beside(words: Sequence[str], composed: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Raises ConfigError for words beside published weights that say something of `mixer` or `model`, and for sections
    that are not the `plain` ones of the task: an experiment says it."""
    for word in words:
        name, _, value = word.lstrip("+~").partition("=")
        raise ConfigError(name, value, f"weights.path says what the model is; {INSTEAD}")
    refuse_other(composed, plain, "an experiment chooses it, and weights.path says what the model is")


def refuse_other(given: Mapping[str, Any], own: Mapping[str, Any], why: str = "weights.path says {}") -> None:
    """Raises ConfigError for the first field of the sections that weights determine whose value is not their `own`."""
    for section in DETERMINED:
        if section in given and (found := difference(given[section], own[section], section)) is not None:
            name, value, expected = found
            raise ConfigError(name, value, f"{why.format(shown(expected))}; {INSTEAD}")


def difference(given: Any, own: Any, name: str) -> tuple[str, Any, Any] | None:
    """A field in which two sections differ: its name, and both values."""
    if isinstance(given, Mapping) and isinstance(own, Mapping):
        names = [*given, *(key for key in own if key not in given)]
        for key in sorted(names, key=lambda key: isinstance(given.get(key), Mapping)):  # what is short comes first
            if (found := difference(given.get(key), own.get(key), f"{name}.{key}")) is not None:
                return found
        return None
    return None if given == own else (name, given, own)


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
