"""What a config describes, built: the one place where task, model and memory meet."""

from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jax import Array

from kvlab.config import Config
from kvlab.memory.layout import MemoryLayout, stored_states
from kvlab.models.transformer import Transformer, merge, split
from kvlab.placement import Placement
from kvlab.random import named_key
from kvlab.schema import ConfigError
from kvlab.tasks import Task
from kvlab.training.optimizer import make_optimizer
from kvlab.training.step import TrainStep
from kvlab.typing import Params
from kvlab.weights import load_checkpoint
from kvlab.weights.checkpoint import abstract_model, peek_architecture


@dataclass(frozen=True)
class Laboratory:
    """What a config describes, built: task, model structure and fresh parameters."""

    config: Config
    task: Task
    structure: nnx.GraphDef[Transformer]
    params: Params
    states: tuple[dict[str, Any], ...]
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
        model = nnx.eval_shape(build, key)
        stored_states(model.states(), config.memory)  # refuses what cannot be held, before anything is compiled
        init = jax.jit(lambda key: split(build(key))[1])  # one program instead of one an array
        params = jax.eval_shape(init, key) if abstract else placement.put(init(key), "")
        return cls(config, task, split(model)[0], params, model.states(), placement)

    @classmethod
    def _pretrained(cls, config: Config, task: Task, placement: Placement, *, abstract: bool) -> "Laboratory":
        """A published checkpoint under a task whose tokens it knows."""
        folder, dtype = config.weights.folder, config.weights.compute_dtype
        architecture = peek_architecture(folder, dtype)
        if task.vocab_size > architecture.vocab_size:
            legal = f"its vocabulary of {architecture.vocab_size} must hold the task's {task.vocab_size} tokens"
            raise ConfigError("weights.path", config.weights.path, legal)
        if abstract:
            structure, params = abstract_model(architecture)
        else:
            loaded = load_checkpoint(folder, dtype)
            structure, params = loaded.structure, placement.put(loaded.params, "")
        return cls(config, task, structure, params, merge(structure, params).states(), placement)

    @property
    def model(self) -> Transformer:
        """The model with its parameters; printing it shows shapes and bytes."""
        return merge(self.structure, self.params)

    @property
    def num_params(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def train_step(self) -> TrainStep:
        """The compiled training call."""
        train_config = self.config.train
        optimizer = make_optimizer(self.config.optimizer, train_config.num_steps)
        sizes = train_config.batch_size, train_config.accumulation
        return TrainStep(self.structure, self.task, optimizer, *sizes, self.placement)

    def layout(self, max_len: int, max_sequences: int) -> MemoryLayout:
        """The memory for `max_sequences` sequences of up to `max_len` tokens."""
        return MemoryLayout.of(self.states, self.config.memory, max_sequences=max_sequences, max_len=max_len)
