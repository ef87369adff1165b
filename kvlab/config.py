"""The schema of every experiment: one frozen dataclass, built from Hydra's composition or from a plain mapping.

    config = Config.build(mapping)          # raises ConfigError before anything is compiled
    config.as_dict()                        # the same mapping back, every default spelled out
    config.run_id                           # ten hex digits of its SHA-256: the run's identity

Hydra composes; it is asked for nothing else. There is no `_target_`: names are looked up in registries.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from kvlab.compression import Budget
from kvlab.engine.config import EngineConfig
from kvlab.engine.sampling import Sampling
from kvlab.evaluation.measure import MeasureConfig
from kvlab.files import home_expanded
from kvlab.hardware import HardwareConfig
from kvlab.memory.budgets import Context, EqualBudget
from kvlab.memory.config import SEALED
from kvlab.memory.idle import idle_words
from kvlab.memory.layout import MemoryConfig
from kvlab.memory.naming import words_of
from kvlab.mixers import MIXERS
from kvlab.models.sharing import sources_of
from kvlab.models.transformer import LayerConfig, ModelConfig, parse_pattern
from kvlab.schema import (
    ConfigError,
    Schema,
    choice,
    flag,
    identity,
    integer,
    nearest,
    reals,
    text,
    to_plain,
    with_added,
)
from kvlab.sections import MixerConfig, TrainedOn, typed
from kvlab.tasks import TASKS, Task
from kvlab.training.config import TrainConfig
from kvlab.training.optimizer import OptimizerConfig
from kvlab.units import counted
from kvlab.weights.section import WeightsConfig, refuse_other, with_pretrained

SCHEMA_VERSION = 1
TOP = ("name", "experiment", "seed", "results_dir", "track")
"""Fields of a config that are in no section."""
NOT_IDENTITY = ("hardware", "results_dir", "equal_budget", "name", "track")
"""Sections that say where a run happens, or what it was asked for, not what it is."""
TRACKERS = ("tensorboard", "wandb", "trackio")
"""Where a run may be watched while it runs (kvlab/lab/trackers.py)."""
TRAINING = ("task", "mixer", "model", "optimizer", "train", "tune", "seed", "weights")
"""Sections that determine the trained parameters; the others choose how these are evaluated."""
_DEFAULTS: dict[str, Any] = MemoryConfig.defaults()
"""Of the fields of a memory, as an identity has those that change nothing."""


@dataclass(frozen=True)
class TuneConfig(Schema):
    """Learning rates to try; the best on the validation slices is kept. Empty: `optimizer.learning_rate` as it is."""

    learning_rate: tuple[float, ...] = reals((), 0.0, 10.0, open_low=True)

    def cross_check(self) -> None:
        if len(set(self.learning_rate)) < len(self.learning_rate):
            raise ConfigError("learning_rate", list(self.learning_rate), "must not name a rate twice")


def _spelled_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that say what a model is, where they are given, with every default. Raises ConfigError."""
    found: dict[str, Any] = {}
    if "mixer" in fields:
        found["mixer"] = MixerConfig.build(fields["mixer"]).as_dict()
    if "model" in fields:
        found["model"] = to_plain(ModelConfig.build(fields["model"], "model"))
    return found


SECTIONS: dict[str, type[Schema]] = {
    "weights": WeightsConfig,
    "model": ModelConfig,
    "memory": MemoryConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "measure": MeasureConfig,
    "hardware": HardwareConfig,
}
"""Sections with one schema each; `mixer` and `task` choose theirs by `type`."""


@dataclass(frozen=True)
class Config(Schema):
    """One run, completely. Sections are groups of `configs/`; see each section's own docstring."""

    mixer: MixerConfig
    task: Schema
    task_name: str
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    equal_budget: EqualBudget | None = None
    idle_fields: dict[str, str] = field(default_factory=dict, compare=False)
    """Fields of the memory that are given and change nothing, with the reason, once `kvlab.blueprint.resolved` has
    looked: they are no part of the identity."""
    trained_on: TrainedOn | None = None
    experiment: str = text("default")
    name: str | None = text(None, optional=True)
    seed: int = integer(0, 0)
    results_dir: str = text("results")
    track: str = choice("none", ("none", *TRACKERS))

    @classmethod
    def build(cls, values: object, path: str = "") -> "Config":
        """From the whole mapping. Raises ConfigError naming the first wrong field, its value and the legal range."""
        if not isinstance(values, Mapping):
            raise ConfigError(path or "config", values, "must be a mapping of sections")
        fields = dict(cast(Mapping[str, object], values))
        weights = WeightsConfig.build(fields.get("weights", {}), "weights")
        for name in ("mixer", "task") if weights.path is None else ("task",):
            if name not in fields:
                raise ConfigError(name, None, "is missing and has no default")
        if weights.path is not None:
            given, fields = fields, with_pretrained(fields, weights)
            refuse_other(_spelled_out(given), fields)
        mixer = MixerConfig.build(fields.pop("mixer"))
        task_name, task = typed(fields.pop("task"), "task", TASKS)
        if fields.get("equal_budget") is not None:
            fields["equal_budget"] = EqualBudget.build(fields["equal_budget"], "equal_budget")
        if fields.get("trained_on") is not None:
            measure = MeasureConfig.build(fields.get("measure", {}), "measure")
            scored, trained_on = TrainedOn(task_name, task, measure.batch_size), TrainedOn.build(fields["trained_on"])
            fields["trained_on"] = None if trained_on.training_half == scored.training_half else trained_on
        for name in fields:
            if name in ("equal_budget", "trained_on"):
                continue
            if name not in SECTIONS and name not in TOP:
                legal = ["mixer", "task", *SECTIONS, *TOP]
                raise ConfigError(str(name), fields[name], f"no such section; {nearest(str(name), legal)}")
        built = {name: kind.build(fields.pop(name), name) for name, kind in SECTIONS.items() if name in fields}
        return cls(mixer=mixer, task=task, task_name=task_name, **built, **cast(dict[str, Any], fields))

    def cross_check(self) -> None:
        for name, value in (("experiment", self.experiment), ("name", self.name)):
            if value is not None and not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", value):
                raise ConfigError(name, value, "must be a word of letters, digits, '_', '-' and '.'")
        try:
            self.layers()
        except ValueError as error:
            raise ConfigError("mixer.pattern", self.mixer.pattern, str(error)) from None
        names = parse_pattern(self.mixer.pattern, list(self.mixer.layers), self.model.num_layers)
        sources_of([self.mixer.layers[name].config for name in names], [f"mixer.{name}" for name in names])
        self._check_whole()
        if self.train.num_steps == 0 and self.tune.learning_rate:
            raise ConfigError(
                "tune.learning_rate", list(self.tune.learning_rate), "must be [] with train.num_steps = 0"
            )
        self._check_budget()
        if self.measure.decode_steps >= self.context_len:
            legal = f"must be below the measured context of {counted(self.context_len, 'token')}"
            raise ConfigError("measure.decode_steps", self.measure.decode_steps, legal)

    def _check_whole(self) -> None:
        """Raises ConfigError for a whole text of which a part was trained on."""
        if not self.train.num_steps or not getattr(self.task, "whole", False):
            return
        if self.trained_on is None:
            raise ConfigError("task.whole", True, "must be false to train: the whole text is what is evaluated")
        trained = self.trained_on.task
        if hasattr(trained, "path") and getattr(trained, "path", None) == getattr(self.task, "path", None):
            raise ConfigError("task.whole", True, "must be false: the model was trained on a part of this text")

    def _check_budget(self) -> None:
        """Raises ConfigError for a fraction that leaves less of some test prompt than is protected, with what would
        fit all of them."""
        method, budget = self.memory.compression, self.memory.budget
        if method is None or budget is None or (fraction := Budget.of(budget).fraction) is None:
            return
        slices = self.make_task().slices("test")
        lengths = {f"before the answers of {part.name}": part.compress_at or part.prompt_len for part in slices}
        if legal := method.too_short(fraction, lengths):
            raise ConfigError("memory.budget", budget, legal)

    @property
    def context_len(self) -> int:
        """Tokens at which memory is measured."""
        return self.measure.context_len or self.make_task().context_len

    @property
    def context(self) -> Context:
        """The sequence that is measured: its prompt, and behind that what is decoded."""
        return self.context_of(self.context_len)

    def context_of(self, context_len: int) -> Context:
        """One of `context_len` tokens. What prompts leave depends on how long they are: where they are compressed or
        sealed, the prompt is that of the test slice of this length, so that bytes and scores are of the same sequences.
        Elsewhere, and at a length that no slice has, all but the last `measure.decode_steps` tokens."""
        if self.memory.compression is not None or self.memory.format in SEALED:
            for part in self.make_task().slices("test"):
                if part.seq_len == context_len:
                    return Context(context_len, part.compress_at or part.prompt_len)
        return Context(context_len, max(1, context_len - self.measure.decode_steps))

    def layers(self) -> list[LayerConfig]:
        """Every layer's mixer, by tiling the pattern. Raises ValueError for a pattern that cannot."""
        names = parse_pattern(self.mixer.pattern, list(self.mixer.layers), self.model.num_layers)
        return [self.mixer.layers[name] for name in names]

    def make_task(self) -> Task:
        """The task; cheap, data are read when first needed."""
        build: Any = TASKS[self.task_name]
        return build(self.task)

    @property
    def vocab_size(self) -> int:
        """Token ids that the model embeds: those of the task that it is trained on."""
        return self._training_task.vocab_size

    @property
    def _training_task(self) -> Task:
        if self.trained_on is None:
            return self.make_task()
        build: Any = TASKS[self.trained_on.task_name]
        return build(self.trained_on.task)

    def check_vocabulary(self) -> None:
        """Raises ConfigError for a task whose tokens are not those of the task that the model was trained on."""
        given = self.weights.run if self.weights.path is not None else None
        if self.trained_on is None and given is None:
            return
        ours = self.make_task().vocabulary
        theirs = given.vocabulary if given is not None else self._training_task.vocabulary
        if ours != theirs:
            legal = f"has a vocabulary of {ours}, and the model was trained on one of {theirs}"
            raise ConfigError("task.type", self.task_name, legal)

    def as_dict(self, plain: Callable[[object], Any] = to_plain) -> dict[str, Any]:
        """Plain data with every default spelled out; `Config.build` takes it back. With `plain=identity` without what
        was added since and is at its default. Who watches the run (`track`) is no part of it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("task_name", "track", "idle_fields"):
            del fields[name]
        task = {"type": self.task_name, **plain(self.task)}
        optional = ("equal_budget", "name", "trained_on")
        sections = {name: plain(value) for name, value in fields.items() if name not in optional or value}
        if self.trained_on is not None:
            sections["trained_on"] = self.trained_on.as_dict(plain)
        return sections | {"mixer": self.mixer.as_dict(plain), "task": task}

    @property
    def run_id(self) -> str:
        """Ten hex digits of the SHA-256 of everything that determines the result: the config, and data from outside.

        Raises ConfigError when the task's data cannot be read or are too short.
        """
        memory = dataclasses.replace(self.memory, **{name: _DEFAULTS[name] for name in self.idle_fields})
        values = self.as_dict(identity) | {"memory": identity(memory)}
        if self.trained_on is not None and (data := self._training_task.fingerprint()):
            values["training_data"] = data
        return self._digest({name: each for name, each in values.items() if name not in NOT_IDENTITY}, self.make_task())

    @property
    def training_half(self) -> dict[str, Any]:
        """What determines the trained parameters, as plain data: runs that agree in it share one training.

        `validation_batch_size` is `measure.batch_size`: validation is summed in batches of that size.
        """
        half = {name: value for name, value in self.as_dict(identity).items() if name in TRAINING}
        own = TrainedOn(self.task_name, self.task, self.measure.batch_size)
        return {**half, **(self.trained_on or own).training_half}

    @property
    def training_id(self) -> str:
        """Ten hex digits of the SHA-256 of `training_half` and of data from outside. Raises as `run_id` does."""
        return self._digest(self.training_half, self._training_task)

    def _digest(self, determining: dict[str, Any], task: Task) -> str:
        if data := task.fingerprint():
            determining["data"] = data
        if self.weights.path is not None:
            determining["weights_sha256"] = self.weights.fingerprint()
        text = json.dumps({"schema": SCHEMA_VERSION, **determining}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def folder(self) -> str:
        """The folder of the sweep, and its title: its own name, else that of its experiment."""
        return self.name or self.experiment

    @property
    def run_dir(self) -> Path:
        """Where the run lives: results_dir / folder / run_id."""
        return home_expanded(self.results_dir) / self.folder / self.run_id

    @property
    def training_dir(self) -> Path:
        """Where the parameters are trained and kept: results_dir / folder / trained / training_id."""
        return home_expanded(self.results_dir) / self.folder / "trained" / self.training_id

    @property
    def idle(self) -> list[str]:
        """What is said of `idle_fields`."""
        return idle_words(self.memory, self.idle_fields)

    @property
    def label(self) -> str:
        """How people call this run: `label_of` it."""
        return label_of(self.as_dict())


def training_label_of(config: Mapping[str, Any]) -> str:
    """Variant, task and seed of a configuration, as plain data, as in "mha/text/seed0": how people call its training,
    which several runs may share."""
    return f"{config['mixer']['name']}/{config['task']['type']}/seed{config['seed']}"


def trained_words(config: Mapping[str, Any]) -> list[str]:
    """What of a configuration, as plain data, says that it is scored otherwise than in its training: on another task,
    on the same one with other fields, or where validation had another batch."""
    if not (trained_on := config.get("trained_on")):
        return []
    ours, theirs = config["task"], trained_on["task"]
    if ours["type"] != theirs["type"]:
        return [f"trained on {theirs['type']}"]
    names = {*ours, *theirs} - {*(TASKS[ours["type"]].evaluation_fields if ours["type"] in TASKS else ())}
    if any(ours.get(name) != theirs.get(name) for name in names):
        return [f"trained on another {theirs['type']}"]
    return [f"validated by {trained_on.get('validation_batch_size')}"]


def label_of(config: Mapping[str, Any]) -> str:
    """How people call the run of a configuration, as plain data: variant, task and seed, the task of its training where
    that is another, and what its memory drops, stores in fewer bits and reads in part. Beside other runs,
    `kvlab.lab.labels` says what else tells it apart."""
    return " ".join([training_label_of(config), *trained_words(config), *words_of(config.get("memory") or {})])


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration as it was once written, with the fields that were added since at their defaults: runs that
    are alike then read alike, whenever they were made. What is not known here stays as it is."""
    complete = dict(config)
    for name, section in config.items():
        if not isinstance(section, Mapping):
            continue
        if (kind := SECTIONS.get(name)) is not None:
            complete[name] = with_added(kind, section)
        if name == "task":
            complete[name] = _completed_choice(section, TASKS)
        if name == "trained_on" and "task" in section:
            complete[name] = {**section, "task": _completed_choice(section["task"], TASKS)}
        if name == "mixer":
            complete[name] = {layer: _completed_choice(value, MIXERS) for layer, value in section.items()}
    return complete


def _completed_choice(value: Any, registry: Mapping[str, Any]) -> Any:
    """A section that names its type; what names none is left as it is."""
    chosen = registry.get(value.get("type", "")) if isinstance(value, Mapping) else None
    return value if chosen is None else with_added(chosen.Config, value)


@dataclass(frozen=True)
class GenerateConfig(Schema):
    """How `kvlab generate` answers. `dtype` "stored" computes in the file's own; `draft` is the folder of a draft
    model; with `stop_at_end` answers end at the checkpoint's own end tokens, too."""

    sampling: Sampling = field(default_factory=Sampling)
    engine: EngineConfig = field(default_factory=EngineConfig)
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(chunk_len=256))
    dtype: str = choice("stored", ("stored", "float32", "bfloat16"))
    draft: str | None = text(None, legal="a folder", optional=True)
    stop_at_end: bool = flag(True)


def defaults() -> dict[str, Any]:
    """The defaults of every section that is not chosen by name: the base that Hydra composes upon. Here the model's
    type is "auto": it becomes the one that this machine's kernels read, and part of the run's identity."""
    top = {"name": None, "experiment": "default", "seed": 0, "results_dir": "results", "track": "none"}
    sections = {name: kind.defaults() for name, kind in SECTIONS.items()}
    return top | sections | {"model": {**sections["model"], "dtype": "auto"}}
