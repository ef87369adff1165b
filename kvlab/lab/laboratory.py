"""What a config describes, built: the one place where task, model and memory meet."""

from dataclasses import dataclass, field
from functools import partial

import jax

from kvlab import blueprint
from kvlab.config import Config
from kvlab.lab.trained import trained_params
from kvlab.memory.layout import MemoryLayout
from kvlab.models.model import Model
from kvlab.models.transformer import split
from kvlab.placement import Placement
from kvlab.random import named_key
from kvlab.tasks import Task
from kvlab.training.optimizer import make_optimizer
from kvlab.training.step import TrainStep
from kvlab.weights.runs import in_types_of
from kvlab.weights.section import WeightsConfig


def given_model(weights: WeightsConfig) -> Model:
    """The model of given weights with its parameters: of a published checkpoint, or of a finished run. Raises
    WeightsError, FileNotFoundError and `CheckpointError`."""
    run = weights.run
    if run is None:
        return weights.load()
    shapes, params = weights.abstract(), trained_params(weights.folder, run.stored().params)
    return Model(shapes.structure, in_types_of(params, shapes.params))


@dataclass(frozen=True)
class Laboratory:
    """What a config describes, built: task, and a model with fresh parameters."""

    config: Config
    task: Task
    model: Model
    placement: Placement = field(default_factory=Placement)

    @classmethod
    def of(cls, config: Config, *, abstract: bool = False, placement: Placement | None = None) -> "Laboratory":
        """Builds the model; parameters depend on the seed alone, or are loaded from `weights.path`. `abstract` gives
        shapes in their place: nothing is held. On the mesh of a `placement` the parameters lie whole on every
        device."""
        task, placement = config.make_task(), placement or Placement()
        shapes = blueprint.abstract(config, config.vocab_size)  # refuses what cannot be held, before anything is loaded
        if abstract:
            return cls(config, task, shapes, placement)
        if config.weights.path is not None:
            model = given_model(config.weights)
            return cls(config, task, Model(model.structure, placement.put(model.params, "")), placement)
        key = named_key(config.seed, "init")
        draw = partial(blueprint.draw, config, config.vocab_size)
        params = jax.jit(lambda key: split(draw(key))[1])(key)  # one program instead of one an array
        return cls(config, task, Model(shapes.structure, placement.put(params, "")), placement)

    def train_step(self) -> TrainStep:
        """The compiled training call."""
        train_config = self.config.train
        optimizer = make_optimizer(self.config.optimizer, train_config.num_steps)
        sizes = train_config.batch_size, train_config.accumulation, train_config.num_steps
        return TrainStep(self.model.structure, self.task, optimizer, *sizes, self.placement)

    def layout(self, max_len: int, max_sequences: int, *, prompt_len: int | None = None) -> MemoryLayout:
        """The memory for `max_sequences` sequences of up to `max_len` tokens. With the tokens of their prompts, one
        that compresses has room for one whole prompt beside what is left of the others."""
        return MemoryLayout.of(
            self.model.states,
            self.config.memory,
            max_sequences=max_sequences,
            max_len=max_len,
            prompt_len=prompt_len,
        )
