"""Sections of a run that choose by name: the variant of a model, as a pattern over named layers, and the task of its
training where it is scored on another."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from kvlab.mixers import MIXERS
from kvlab.models.config import LayerConfig, OwnMLP
from kvlab.models.experts import ExpertsConfig
from kvlab.models.sharing import readers_of
from kvlab.schema import ConfigError, Schema, identity, nearest, to_plain
from kvlab.tasks import TASKS


def typed(values: object, path: str, registry: Mapping[str, Any]) -> tuple[str, Any]:
    """A section {type: name, ...} as the registered name and its config."""
    if not isinstance(values, Mapping):
        raise ConfigError(path, values, "must be a mapping with a `type`")
    fields = dict(cast(Mapping[str, object], values))
    name = fields.pop("type", None)
    if not isinstance(name, str) or name not in registry:
        raise ConfigError(f"{path}.type", name, nearest(str(name), registry))
    try:
        kind = registry[name]
    except ConfigError as error:
        raise error.under(path) from None
    return name, kind.Config.build(fields, path)


def layer_of(values: object, path: str) -> LayerConfig:
    """A section {type: attention, ...} as a layer; it may have an MLP of its own (`OwnMLP`), and under `mlp` experts in
    the MLP's place."""
    if not isinstance(values, Mapping):
        return LayerConfig(*typed(values, path, MIXERS))
    fields = dict(cast(Mapping[str, object], values))
    experts = fields.pop("mlp", None)
    own = OwnMLP.build({name: fields.pop(name) for name in OwnMLP.defaults() if name in fields}, path)
    mlp = None if experts is None else ExpertsConfig.build(experts, f"{path}.mlp")
    mixer = typed(fields, path, MIXERS)
    try:
        return LayerConfig(*mixer, own.mlp_dim, own.mlp_sparsity, mlp)
    except ConfigError as error:
        raise error.under(path) from None


@dataclass(frozen=True)
class MixerConfig:
    """A named variant: a pattern over named layers, such as pattern "M A" with layers M and A. `knob`, such as
    "M.state_dim", says what a budget of bytes is solved for where several layers have a knob."""

    name: str
    pattern: str
    layers: dict[str, LayerConfig]
    knob: str | None = None

    @classmethod
    def build(cls, values: object) -> "MixerConfig":
        """From {name, pattern, A: {type: attention, ...}, M: {...}}, and knob where it is named."""
        if not isinstance(values, Mapping):
            raise ConfigError("mixer", values, "must be a mapping with name, pattern and layers")
        fields = dict(cast(Mapping[str, object], values))
        name, pattern = fields.pop("name", None), fields.pop("pattern", None)
        knob = fields.pop("knob", None)
        if not isinstance(name, str) or not re.fullmatch(r"[\w.\-]+", name):
            raise ConfigError("mixer.name", name, "must be a word of letters, digits, '_', '-' and '.'")
        if not isinstance(pattern, str):
            raise ConfigError("mixer.pattern", pattern, "must be layer names separated by spaces")
        layers = {layer: layer_of(value, f"mixer.{layer}") for layer, value in fields.items()}
        if knob is not None and not (isinstance(knob, str) and knob.partition(".")[0] in layers):
            legal = f"must be null, or a layer's field such as {next(iter(layers), 'A')}.window"
            raise ConfigError("mixer.knob", knob, legal)
        return cls(name, pattern, layers, knob)

    def as_dict(self, plain: Callable[[object], Any] = to_plain) -> dict[str, Any]:
        """The mapping that `build` takes; `plain` makes it of each section. The knob is no part of an identity."""
        layers = {name: layer.as_dict(plain) for name, layer in self.layers.items()}
        knob = {"knob": self.knob} if self.knob is not None and plain is not identity else {}
        return {"name": self.name, "pattern": self.pattern, **knob, **layers}

    def with_knob(self, place: str, value: int) -> "MixerConfig":
        """The same variant with another value of a field of a layer, and of those that read its keys and values. Raises
        ConfigError for one that it cannot have."""
        name, _, field = place.partition(".")
        changed = dict(self.layers)
        for each in (name, *readers_of(name, {key: value.config for key, value in changed.items()}, self.pattern)):
            config = dataclasses.replace(changed[each].config, **{field: value})
            changed[each] = dataclasses.replace(changed[each], config=config)
        return dataclasses.replace(self, layers=changed)


@dataclass(frozen=True)
class TrainedOn:
    """What the parameters of a run were trained on, where the run is scored on something else: the task, and the batch
    in which validation was summed. Such a run trains nothing: its training is there already."""

    task_name: str
    task: Schema
    validation_batch_size: int

    @classmethod
    def build(cls, values: object) -> "TrainedOn":
        """From {task: {type: mqar, ...}, validation_batch_size: 32}. Raises ConfigError."""
        names = ("task", "validation_batch_size")
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise ConfigError("trained_on", values, f"must be null, or a mapping with {' and '.join(names)}")
        name, task = typed(values["task"], "trained_on.task", TASKS)
        size = values["validation_batch_size"]
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError("trained_on.validation_batch_size", size, "must be an integer of at least 1")
        return cls(name, task, size)

    def as_dict(self, plain: Callable[[object], Any] = to_plain) -> dict[str, Any]:
        """The mapping that `build` takes; `plain` makes it of the task."""
        task = {"type": self.task_name, **plain(self.task)}
        return {"task": task, "validation_batch_size": self.validation_batch_size}

    @property
    def training_half(self) -> dict[str, Any]:
        """What of it determines the parameters, as plain data: fields that only evaluate are left out."""
        evaluated_only = TASKS[self.task_name].evaluation_fields
        task = self.as_dict(identity)["task"]
        kept = {name: value for name, value in task.items() if name not in evaluated_only}
        return {"task": kept, "validation_batch_size": self.validation_batch_size}
