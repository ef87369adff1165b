"""What a config describes, built: the one place where task, model and memory meet."""

from dataclasses import dataclass, field

import jax
from flax import nnx
from jax import Array

from kvlab.config import Config
from kvlab.memory.layout import MemoryLayout, stored_states
from kvlab.models.model import Model
from kvlab.models.transformer import Transformer, split
from kvlab.placement import Placement
from kvlab.random import named_key
from kvlab.schema import ConfigError
from kvlab.tasks import Task
from kvlab.training.optimizer import make_optimizer
from kvlab.training.step import TrainStep
from kvlab.weights import load_checkpoint
from kvlab.weights.checkpoint import abstract_model, peek_architecture


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
        if config.weights.path is not None:
            return cls._pretrained(config, task, placement, abstract=abstract)

        def build(key: Array) -> Transformer:
            return Transformer(config.layers(), config.model, task.vocab_size, rngs=nnx.Rngs(key))

        key = named_key(config.seed, "init")
        shapes = Model.of(nnx.eval_shape(build, key))
        stored_states(shapes.states, config.memory)  # refuses what cannot be held, before anything is compiled
        init = jax.jit(lambda key: split(build(key))[1])  # one program instead of one an array
        model = shapes if abstract else Model(shapes.structure, placement.put(init(key), ""))
        return cls(config, task, model, placement)

    @classmethod
    def _pretrained(cls, config: Config, task: Task, placement: Placement, *, abstract: bool) -> "Laboratory":
        """A published checkpoint under a task whose tokens it knows."""
        folder, dtype = config.weights.folder, config.weights.compute_dtype
        architecture = peek_architecture(folder, dtype)
        if task.vocab_size > architecture.vocab_size:
            legal = f"its vocabulary of {architecture.vocab_size} must hold the task's {task.vocab_size} tokens"
            raise ConfigError("weights.path", config.weights.path, legal)
        shapes = abstract_model(architecture)
        stored_states(shapes.states, config.memory)  # refuses what cannot be held, before anything is loaded
        if abstract:
            return cls(config, task, shapes, placement)
        loaded = load_checkpoint(folder, dtype).model
        return cls(config, task, Model(loaded.structure, placement.put(loaded.params, "")), placement)

    def train_step(self) -> TrainStep:
        """The compiled training call."""
        train_config = self.config.train
        optimizer = make_optimizer(self.config.optimizer, train_config.num_steps)
        sizes = train_config.batch_size, train_config.accumulation
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
