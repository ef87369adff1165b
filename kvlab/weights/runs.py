"""A finished run of kvlab as given weights: what its record says of its model, and of its parameters."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from kvlab.models.model import Model
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer, parse_pattern
from kvlab.schema import ConfigError
from kvlab.sections import MixerConfig, typed
from kvlab.tasks import TASKS
from kvlab.weights.families import Architecture
from kvlab.weights.files import WeightsError, read_json
from kvlab.weights.windows import windowed

FAMILY = "kvlab"
"""The family of a run's model, which no published checkpoint has."""


@dataclass(frozen=True)
class TrainedRun:
    """What a finished run says: its variant and model, what the tokens of its training are, and the digest of its
    parameters."""

    mixer: MixerConfig
    model: ModelConfig
    vocab_size: int
    vocabulary: str
    tokenizer: str | None
    params_sha256: str

    def mixer_under(self, window: int | None, num_sinks: int) -> MixerConfig:
        """Its variant under a window. Raises ConfigError as `windowed` does."""
        layers = tuple(self.mixer.layers.values())
        narrowed = windowed(Architecture(FAMILY, layers, self.model, self.vocab_size), window, num_sinks).layers
        return replace(self.mixer, layers=dict(zip(self.mixer.layers, narrowed, strict=True)))

    def architecture(self, dtype: str | None, window: int | None, num_sinks: int) -> Architecture:
        """Its model, computed in another type where one is named, and under a window."""
        mixer = self.mixer_under(window, num_sinks)
        model = self.model if dtype is None else replace(self.model, dtype=dtype)
        return Architecture(FAMILY, layers_of(mixer, model), model, self.vocab_size)

    def stored(self) -> Model:
        """Its model with shapes and dtypes in place of parameters, as they are stored."""
        return drawn_shapes(self.architecture(None, None, 0))


def drawn_shapes(architecture: Architecture) -> Model:
    """A model with shapes and dtypes in place of parameters, as they are drawn and trained."""
    layers, model, vocab_size = architecture.layers, architecture.model, architecture.vocab_size
    return Model.of(nnx.eval_shape(lambda: Transformer(layers, model, vocab_size, rngs=nnx.Rngs(0))))


def layers_of(mixer: MixerConfig, model: ModelConfig) -> tuple[LayerConfig, ...]:
    """Every layer of a variant, by tiling its pattern."""
    return tuple(mixer.layers[name] for name in parse_pattern(mixer.pattern, list(mixer.layers), model.num_layers))


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, finished or not."""
    return (folder / "config.yaml").exists() and not (folder / "config.json").exists()


def read_run(folder: Path) -> TrainedRun:
    """The finished run of a folder. Raises WeightsError for one that has not finished, or whose record is damaged."""
    path = folder / "record.json"
    if not path.exists():
        raise WeightsError(folder, ["this run has not finished: it has no record.json"])
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16)
def _read(path: Path, *_: int) -> TrainedRun:
    record = read_json(path)
    if record.get("status") != "done":
        raise WeightsError(path, [f"this run has not finished: it is {record.get('status')!r:.40}"])
    try:
        return _of(record["config"], record["training"]["params_sha256"])
    except ConfigError as error:
        raise WeightsError(path, [str(error)]) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(path, [f"is damaged: {type(error).__name__} at {error!s:.80}"]) from None


def _of(config: dict[str, Any], params_sha256: str) -> TrainedRun:
    trained_on = config.get("trained_on") or {}
    name, task_config = typed(trained_on.get("task", config["task"]), "task", TASKS)
    build: Any = TASKS[name]
    task = build(task_config)
    given = (config.get("weights") or {}).get("path")
    if given is not None:
        legal = f"was itself given its weights, from {given}: name that folder, or a run that drew its own"
        raise ConfigError("weights.path", given, legal)
    return TrainedRun(
        mixer=MixerConfig.build(config["mixer"]),
        model=ModelConfig.build(config["model"], "model"),
        vocab_size=task.vocab_size,
        vocabulary=task.vocabulary,
        tokenizer=getattr(task_config, "tokenizer", None),
        params_sha256=params_sha256,
    )


def in_types_of(params: Any, like: Any) -> Any:
    """Parameters in the types of others of their shapes."""
    return jax.tree.map(lambda value, other: value.astype(other.dtype), params, like)
